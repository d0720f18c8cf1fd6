//! A line between the relay of a `user` NIC and the connector: the relay says that its passt is gone, and is
//! given the socket of another.
#![expect(unsafe_code, reason = "a descriptor that comes over a socket")]

use crate::launch::machine::{Backend, Device};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, send, sendmsg, socketpair,
};
use std::collections::BTreeMap;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// One end of each line, by the device's id.
pub(crate) type Lines = BTreeMap<String, OwnedFd>;

/// Nobody waits for the other end, whose loss is an error, and no signal.
const FLAGS: MsgFlags = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_NOSIGNAL);

/// Makes a line for each NIC that a relay serves: the relays' ends, and the connector's.
pub(crate) fn make(devices: &[Device]) -> nix::Result<(Lines, Lines)> {
    let (mut relays, mut connectors) = (Lines::new(), Lines::new());
    for device in devices {
        if let Backend::Net(nic) = &device.backend
            && nic.has_relay()
        {
            let kind = SockType::SeqPacket;
            let (relay, connector) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?;
            relays.insert(device.id.clone(), relay);
            connectors.insert(device.id.clone(), connector);
        }
    }
    Ok((relays, connectors))
}

/// The relay says that its passt is gone.
pub(super) fn say(line: &OwnedFd) -> nix::Result<()> {
    send(line.as_raw_fd(), b"-", FLAGS).map(drop)
}

/// Whether the relay has said so; an error where it is gone itself.
pub(crate) fn hear(line: &OwnedFd) -> nix::Result<bool> {
    match recv(line.as_raw_fd(), &mut [0], FLAGS) {
        Ok(0) => Err(Errno::EPIPE),
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Gives the relay the socket of another passt.
pub(crate) fn give(line: &OwnedFd, stream: &OwnedFd) -> nix::Result<()> {
    let fds = [stream.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(line.as_raw_fd(), &[IoSlice::new(b"+")], &rights, FLAGS, None).map(drop)
}

/// The socket of another passt, if there is one; an error where none will come. Takes no memory.
pub(super) fn take(line: &OwnedFd) -> nix::Result<Option<OwnedFd>> {
    let mut byte = 0_u8;
    let mut part = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // Aligned as a header is.
    let mut space = [0_u64; 4];
    // SAFETY: all-zero is a message without a name and without parts.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = space.as_mut_ptr().cast();
    // SAFETY: computes a number. Room for one descriptor: the kernel installs no more.
    message.msg_controllen = unsafe { libc::CMSG_LEN(size_of::<RawFd>() as u32) as _ };
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `message` names one byte and `space`, both alive and large enough.
    let received = unsafe { libc::recvmsg(line.as_raw_fd(), &raw mut message, flags) };
    match Errno::result(received) {
        Ok(0) => return Err(Errno::EPIPE),
        Ok(_) => {}
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
        Err(e) => return Err(e),
    }
    // SAFETY: the kernel set what `message` names.
    let first = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: a header that the kernel wrote lies in `space`.
    let first = unsafe { first.as_ref() };
    let Some(first) = first.filter(|h| (h.cmsg_level, h.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS))
    else {
        return Ok(None);
    };
    // SAFETY: computes where the data behind a header of `space` lies.
    let data = unsafe { libc::CMSG_DATA(first) };
    // SAFETY: it is the number of a descriptor.
    let number = unsafe { data.cast::<RawFd>().read_unaligned() };
    // SAFETY: the kernel has just made it for us.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(number) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{pipe, read, write};

    #[test]
    fn a_relay_that_says_so_is_given_another() {
        let kind = SockType::SeqPacket;
        let (relay, connector) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        assert_eq!(hear(&connector), Ok(false));
        assert!(take(&relay).unwrap().is_none());
        say(&relay).unwrap();
        assert_eq!(hear(&connector), Ok(true));
        let (reader, writer) = pipe().unwrap();
        give(&connector, &writer).unwrap();
        drop(writer);
        let given = take(&relay).unwrap().unwrap();
        assert_eq!(write(&given, b"x"), Ok(1));
        drop(given);
        let mut bytes = [0; 2];
        assert_eq!(
            (read(&reader, &mut bytes), read(&reader, &mut bytes)),
            (Ok(1), Ok(0))
        );
        // A word without a descriptor is none.
        assert_eq!(send(connector.as_raw_fd(), b"+", FLAGS), Ok(1));
        assert!(take(&relay).unwrap().is_none());
        drop(connector);
        assert!(take(&relay).is_err() && say(&relay).is_err());
    }
}
