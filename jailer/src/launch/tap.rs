//! TAP interfaces (`linux/if_tun.h`): an existing one, or one in a network namespace of our own,
//! which needs no root. None is persistent: it goes with its last descriptor.
#![expect(unsafe_code, reason = "ioctls on TUN and sockets, and a fork")]

use crate::sandbox::caps;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socket, socketpair,
};
use nix::unistd::{ForkResult, Pid, fork, getegid, geteuid};
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;

/// The name of a TAP in a namespace of its own.
pub(crate) const PRIVATE_NAME: &str = "tap0";

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF as libc::c_int, libc::ifreq);
nix::ioctl_read_bad!(tun_get_iff, libc::TUNGETIFF as libc::c_int, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_address, libc::SIOCSIFADDR as libc::c_int, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_netmask, libc::SIOCSIFNETMASK as libc::c_int, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS as libc::c_int, libc::ifreq);

/// A TAP that can be given to its device process.
pub(crate) enum Opened {
    /// An open one.
    Ready(OwnedFd),
    /// One that its holder is making: half a millisecond in which others start.
    Private(Holder),
}

/// The process that holds a private TAP's namespace.
pub(crate) struct Holder {
    pub(crate) pid: Pid,
    /// The spec's field that asks for the TAP, for messages.
    pub(crate) field: String,
    /// Our end of its socket: the TAP comes over it, and the holder ends when it is closed.
    lifeline: Rc<OwnedFd>,
}

impl Holder {
    /// The same holder, which ends when both are dropped.
    pub(crate) fn share(&self) -> Self {
        Self {
            pid: self.pid,
            field: self.field.clone(),
            lifeline: Rc::clone(&self.lifeline),
        }
    }

    /// Waits for the TAP, which comes once. A holder that dies closes its end.
    pub(crate) fn receive(&self) -> Result<OwnedFd, TapError> {
        receive(&self.lifeline)
    }
}

/// Why there is no TAP.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TapError {
    #[error("there is no interface '{0}'")]
    Missing(String),
    #[error("the interface '{0}' is busy")]
    Busy(String),
    #[error("'{0}' is no interface name: at most 15 characters, and no '/'")]
    Name(String),
    #[error("cannot open /dev/net/tun")]
    Device(#[source] io::Error),
    #[error("cannot attach to the interface")]
    Attach(#[source] io::Error),
    #[error("cannot make a network namespace: {0}")]
    Namespace(String),
    #[error("it is not open")]
    NotOpen(#[source] io::Error),
    #[error("it is busy: another NIC of this VM has it")]
    BusyDescriptor,
    #[error("it is no TAP with an interface")]
    NoTap(#[source] Errno),
}

/// Attaches to the interface `name`, which must exist.
pub(crate) fn open_existing(name: &str) -> Result<Opened, TapError> {
    if name.is_empty() || name.len() > 15 || name.contains('/') || name.starts_with('.') {
        return Err(TapError::Name(name.to_owned()));
    }
    // TUNSETIFF would make one that does not exist. Not looked for in /sys, which may be mounted in
    // another network namespace than ours.
    if if_nametoindex(name).is_err() {
        return Err(TapError::Missing(name.to_owned()));
    }
    attach(name).map(Opened::Ready)
}

/// Takes over a TAP that whoever started us opened.
pub(crate) fn inherited(fd: i32) -> Result<Opened, TapError> {
    let busy = |e: &io::Error| e.raw_os_error() == Some(libc::EBUSY);
    let fd = crate::inherit::take(vm_spec::control::FdNumber(fd)).map_err(|e| match busy(&e) {
        true => TapError::BusyDescriptor,
        false => TapError::NotOpen(e),
    })?;
    let mut about = request_for("");
    // SAFETY: `about` is a live ifreq, which TUNGETIFF fills in.
    unsafe { tun_get_iff(fd.as_raw_fd(), &raw mut about) }.map_err(TapError::NoTap)?;
    Ok(Opened::Ready(fd))
}

fn attach(name: &str) -> Result<OwnedFd, TapError> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(TapError::Device)?;
    let mut request = request_for(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: `request` is a live ifreq, which TUNSETIFF reads and writes.
    match unsafe { tun_set_iff(tun.as_raw_fd(), &raw const request) } {
        Ok(_) => {}
        Err(Errno::EBUSY) => return Err(TapError::Busy(name.to_owned())),
        Err(e) => return Err(TapError::Attach(e.into())),
    }
    nonblocking(&tun).map_err(TapError::Attach)?;
    Ok(tun.into())
}

fn nonblocking(file: &File) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(file, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// An ifreq for `name`, which is shorter than IFNAMSIZ.
fn request_for(name: &str) -> libc::ifreq {
    // SAFETY: every field of ifreq may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name[..15].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// Starts the making of a TAP in a network namespace of its own, with `address` on the host's side
/// and up. A child process holds the namespace until we end: whoever enters it reaches the guest. `field` is what messages name.
pub(crate) fn private(field: &str, address: Ipv4Addr, prefix: u8) -> Result<Opened, TapError> {
    let failed = |e: Errno| TapError::Namespace(e.to_string());
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(failed)?;
    // SAFETY: this process has one thread, so the child may do whatever the parent might.
    match unsafe { fork() }.map_err(failed)? {
        ForkResult::Child => {
            drop(ours);
            hold(&theirs, address, prefix)
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            Ok(Opened::Private(Holder {
                pid: child,
                field: field.to_owned(),
                lifeline: Rc::new(ours),
            }))
        }
    }
}

/// The child: makes the TAP, hands it over, and stays.
fn hold(socket: &OwnedFd, address: Ipv4Addr, prefix: u8) -> ! {
    let made = make_private(address, prefix);
    let sent = match &made {
        Ok(tap) => {
            let fds = [tap.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&fds)];
            send(socket, b"+", &rights)
        }
        Err(message) => send(socket, message.as_bytes(), &[]),
    };
    if made.is_ok() && sent.is_ok() {
        drop(made);
        stay(socket);
    }
    // SAFETY: ends the child without running what the parent registered for its own exit.
    unsafe { libc::_exit(1) }
}

fn send(socket: &OwnedFd, text: &[u8], rights: &[ControlMessage<'_>]) -> nix::Result<usize> {
    let data = [IoSlice::new(text)];
    sendmsg::<()>(socket.as_raw_fd(), &data, rights, MsgFlags::empty(), None)
}

/// Holds the namespace, and nothing else, until the spawner ends: its end of `socket` closes. (A
/// death signal would not do: a spawner that left root may not signal what it made before.)
fn stay(socket: &OwnedFd) {
    let number = socket.as_raw_fd();
    for (first, last) in [(0, number - 1), (number + 1, i32::MAX)] {
        // SAFETY: this process uses no other descriptor from here to its end.
        unsafe { crate::inherit::close_range(first as u32, last as u32) };
    }
    let _ = nix::unistd::setsid();
    let _ = nix::unistd::chdir(c"/");
    let _ = caps::drop_all();
    let _ = nix::sys::prctl::set_no_new_privs();
    while nix::unistd::read(socket, &mut [0]) == Err(Errno::EINTR) {}
}

fn make_private(address: Ipv4Addr, prefix: u8) -> Result<OwnedFd, String> {
    let (uid, gid) = (geteuid(), getegid());
    let mut flags = CloneFlags::CLONE_NEWNET;
    if !uid.is_root() {
        flags |= CloneFlags::CLONE_NEWUSER;
    }
    unshare(flags).map_err(|e| e.to_string())?;
    if !uid.is_root() {
        for (file, text) in [
            ("setgroups", "deny".to_owned()),
            ("uid_map", format!("0 {uid} 1")),
            ("gid_map", format!("0 {gid} 1")),
        ] {
            fs::write(format!("/proc/self/{file}"), text).map_err(|e| format!("{file}: {e}"))?;
        }
    }
    // Opened inside: a descriptor from outside belongs to the network namespace it came from.
    let tap = attach(PRIVATE_NAME).map_err(|e| crate::failure::chain(&e))?;
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(|e| e.to_string())?;
    let mask = Ipv4Addr::from_bits(u32::MAX << (32 - u32::from(prefix)));
    configure(&socket, PRIVATE_NAME, Some((address, mask))).map_err(|e| format!("address: {e}"))?;
    configure(&socket, "lo", None).map_err(|e| format!("lo: {e}"))?;
    Ok(tap)
}

fn configure(socket: &OwnedFd, name: &str, address: Option<(Ipv4Addr, Ipv4Addr)>) -> nix::Result<()> {
    let fd = socket.as_raw_fd();
    let mut request = request_for(name);
    if let Some((address, mask)) = address {
        request.ifr_ifru.ifru_addr = socket_address(address);
        // SAFETY: `request` is a live ifreq with an address in it.
        unsafe { set_address(fd, &raw const request) }?;
        request.ifr_ifru.ifru_addr = socket_address(mask);
        // SAFETY: as above.
        unsafe { set_netmask(fd, &raw const request) }?;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: `request` is a live ifreq with flags in it.
    unsafe { set_flags(fd, &raw const request) }.map(drop)
}

/// A sockaddr_in as a sockaddr: family, port 0, address.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data,
    }
}

fn receive(socket: &OwnedFd) -> Result<OwnedFd, TapError> {
    let mut text = [0; 256];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut data = [IoSliceMut::new(&mut text)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut data,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .map_err(|e| TapError::Namespace(e.to_string()))?;
    let length = message.bytes;
    let fd = message.cmsgs().ok().and_then(|mut all| {
        all.find_map(|one| match one {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        })
    });
    match fd {
        // SAFETY: the kernel has just made this descriptor for us.
        Some(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        None => Err(TapError::Namespace(
            String::from_utf8_lossy(&text[..length]).into_owned(),
        )),
    }
}
