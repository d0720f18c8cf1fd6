//! Control messages with a descriptor attached (SCM_RIGHTS).
#![expect(unsafe_code, reason = "received numbers become owned descriptors")]

use crate::wire::{Received, TransferError};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use vm_spec::control::{Envelope, MAX_FDS, MAX_MESSAGE, WireError};

/// The most descriptors that the kernel passes with one message (unix(7)).
const SCM_MAX_FD: usize = 253;

/// As [`crate::wire::send_message`], with one descriptor; the receiver gets a duplicate.
///
/// # Errors
/// Any [`TransferError`].
pub fn send_with_fd<T: Serialize + DeserializeOwned>(
    socket: BorrowedFd<'_>,
    id: u64,
    body: T,
    fd: BorrowedFd<'_>,
) -> Result<(), TransferError> {
    send_with_fds(socket, id, body, &[fd])
}

/// As [`send_with_fd`], with several, at most [`MAX_FDS`].
///
/// # Errors
/// Any [`TransferError`].
pub fn send_with_fds<T: Serialize + DeserializeOwned>(
    socket: BorrowedFd<'_>,
    id: u64,
    body: T,
    fds: &[impl AsFd],
) -> Result<(), TransferError> {
    if fds.len() > MAX_FDS {
        return Err(WireError::TooManyFds(fds.len()).into());
    }
    let bytes = Envelope::new(id, body).encode()?;
    let numbers: Vec<RawFd> = fds.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        let parts = [IoSlice::new(&bytes)];
        match sendmsg::<()>(socket.as_raw_fd(), &parts, &rights, flags, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(TransferError::Socket(e.into())),
        }
    }
}

/// As [`crate::wire::receive_message`], with the descriptors that came along.
///
/// # Errors
/// Any [`TransferError`]: the peer does not speak the protocol and is to be treated as lost.
pub fn receive_with_fds<T: Serialize + DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> Result<(Received<T>, Vec<OwnedFd>), TransferError> {
    let mut bytes = vec![0; MAX_MESSAGE];
    // Room for all that the kernel passes on: of a message that is cut, what came already would be lost.
    let mut rights = cmsg_space!([RawFd; SCM_MAX_FD]);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let failed = |e: Errno| TransferError::Socket(e.into());
    let (length, cut, fds) = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut rights), flags) {
            Ok(message) => {
                let mut fds = Vec::new();
                for each in message.cmsgs().map_err(failed)? {
                    if let ControlMessageOwned::ScmRights(numbers) = each {
                        // SAFETY: the kernel made these descriptors for this process in recvmsg,
                        // a moment ago; nothing else owns them.
                        fds.extend(numbers.iter().map(|n| unsafe { OwnedFd::from_raw_fd(*n) }));
                    }
                }
                let cut = message
                    .flags
                    .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
                break (message.bytes, cut, fds);
            }
            Err(Errno::EAGAIN) => return Ok((Received::Nothing, Vec::new())),
            // As in `receive_message`.
            Err(Errno::EINTR | Errno::ECONNRESET) => {}
            Err(e) => return Err(failed(e)),
        }
    };
    if cut {
        return Err(WireError::TooLong(length).into());
    }
    if fds.len() > MAX_FDS {
        return Err(WireError::TooManyFds(fds.len()).into());
    }
    if length == 0 {
        return Ok((Received::End, fds));
    }
    let envelope = Envelope::decode(&bytes[..length])?;
    Ok((Received::Message(envelope.id, envelope.body), fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use nix::unistd::{pipe, read, write};
    use vm_spec::supervise::FromSupervisor;

    #[test]
    fn a_descriptor_arrives_with_its_message_only() {
        let kind = SockType::SeqPacket;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let (reader, writer) = pipe().unwrap();
        let message = || FromSupervisor::Kill { process: 3 };
        send_with_fd(ours.as_fd(), 9, message(), writer.as_fd()).unwrap();
        crate::wire::send_message(ours.as_fd(), 10, message()).unwrap();
        drop(writer);
        let (first, mut fds) = receive_with_fds::<FromSupervisor>(theirs.as_fd()).unwrap();
        assert!(matches!(
            first,
            Received::Message(9, FromSupervisor::Kill { process: 3 })
        ));
        assert_eq!(write(fds.pop().unwrap(), b"x"), Ok(1));
        assert!(fds.is_empty());
        assert_eq!(read(&reader, &mut [0; 2]), Ok(1));
        let (_, fds) = receive_with_fds::<FromSupervisor>(theirs.as_fd()).unwrap();
        assert!(fds.is_empty());
        drop(ours);
        let (end, _) = receive_with_fds::<FromSupervisor>(theirs.as_fd()).unwrap();
        assert!(matches!(end, Received::End));
    }

    /// A disk with the longest chain of images that a launcher opens.
    #[test]
    fn descriptors_of_a_long_chain_arrive_and_too_many_are_refused() {
        let kind = SockType::SeqPacket;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let send = |count| {
            let fds = vec![ours.as_fd(); count];
            send_with_fds(ours.as_fd(), 1, FromSupervisor::KillAll, &fds)
        };
        send(80).unwrap();
        let (_, fds) = receive_with_fds::<FromSupervisor>(theirs.as_fd()).unwrap();
        assert_eq!(fds.len(), 80);
        let refused = send(MAX_FDS + 1);
        assert!(
            matches!(refused, Err(TransferError::Message(WireError::TooManyFds(97)))),
            "{refused:?}"
        );
    }
}
