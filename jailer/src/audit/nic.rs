//! A TAP for the network process's probes, in a network namespace that nothing else is in and
//! that ends with the descriptor.
#![expect(unsafe_code, reason = "an ioctl on TUN, and a fork")]

use crate::wire_fds::receive_rights;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};
use std::fs::OpenOptions;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF as libc::c_int, libc::ifreq);

/// Makes the TAP. Its namespace is a child's, which ends before this returns; the descriptor
/// alone keeps it. The calling process must have one thread.
pub(crate) fn tap() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    // SAFETY: this process has one thread, so the child may do whatever the parent might.
    match unsafe { fork() }? {
        ForkResult::Child => {
            // Without a descriptor the parent sees the end of the socket.
            let _ = make().and_then(|tap| send(&theirs, &tap));
            // SAFETY: ends the child without running what the parent registered.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let tap = receive(&ours);
            waitpid(child, None)?;
            tap
        }
    }
}

fn make() -> io::Result<OwnedFd> {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
    // Opened in the namespace that it belongs to.
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: every field of ifreq may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: `request` is a live ifreq, which TUNSETIFF reads and writes.
    unsafe { tun_set_iff(tun.as_raw_fd(), &raw const request) }?;
    Ok(tun.into())
}

fn send(socket: &OwnedFd, tap: &OwnedFd) -> io::Result<()> {
    let fds = [tap.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&[1])],
        &rights,
        MsgFlags::empty(),
        None,
    )?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let room = nix::cmsg_space!([i32; 1]);
    let mut brought = receive_rights(socket.as_fd(), &mut [0], room, MsgFlags::empty())?;
    brought.fds.pop().ok_or_else(|| Errno::EPERM.into())
}
