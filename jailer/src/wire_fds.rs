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

/// What one receive brought.
#[derive(Debug)]
pub struct Brought {
    /// Bytes.
    pub length: usize,
    /// The kernel's word on what was cut.
    pub flags: MsgFlags,
    /// They close at exec. None where not all came (MSG_CTRUNC): those that did are closed.
    pub fds: Vec<OwnedFd>,
}

/// Receives once, as recvmsg(2) with `flags`; `rights` has room for descriptors (`cmsg_space!`), and is zeroed.
///
/// # Errors
/// The system's.
pub fn receive_rights(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    mut rights: Vec<u8>,
    flags: MsgFlags,
) -> nix::Result<Brought> {
    let mut parts = [IoSliceMut::new(bytes)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut rights), flags)?;
    let (length, flags) = (message.bytes, message.flags);
    let mut fds = Vec::new();
    if flags.contains(MsgFlags::MSG_CTRUNC) {
        drop(owned(&truncated(&rights)));
    } else {
        for each in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = each {
                fds.extend(owned(&numbers));
            }
        }
    }
    Ok(Brought { length, flags, fds })
}

/// Owns descriptors that the kernel made for this process in recvmsg, a moment ago.
fn owned(numbers: &[RawFd]) -> Vec<OwnedFd> {
    let numbers = numbers.iter();
    // SAFETY: nothing else owns them: each comes from one message, which is looked at once.
    numbers.map(|n| unsafe { OwnedFd::from_raw_fd(*n) }).collect()
}

/// What came with a message of which not all came. `rights` is zeroed but for what the kernel wrote: at most one
/// header of 16 bytes (its length, SOL_SOCKET, SCM_RIGHTS) with numbers behind it.
fn truncated(rights: &[u8]) -> Vec<RawFd> {
    const HEADER: usize = 16;
    let word = |at: usize| Some(i32::from_ne_bytes(*rights.get(at..)?.first_chunk()?));
    let length = word(0).and_then(|length| usize::try_from(length).ok());
    let numbers = rights.get(HEADER..length.unwrap_or(0)).unwrap_or_default();
    if word(12) != Some(libc::SCM_RIGHTS) {
        return Vec::new();
    }
    let numbers = numbers.as_chunks().0.iter();
    numbers.map(|four| i32::from_ne_bytes(*four)).collect()
}

/// As [`crate::wire::receive_message`], with the descriptors that came along; without any where this process has no
/// room for all.
///
/// # Errors
/// Any [`TransferError`]: the peer does not speak the protocol and is to be treated as lost.
pub fn receive_with_fds<T: Serialize + DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> Result<(Received<T>, Vec<OwnedFd>), TransferError> {
    let mut bytes = vec![0; MAX_MESSAGE];
    // Room for all that the kernel passes on: of a message that is cut, what came already would be lost.
    let Brought { length, flags, fds } = loop {
        let rights = cmsg_space!([RawFd; SCM_MAX_FD]);
        match receive_rights(socket, &mut bytes, rights, MsgFlags::MSG_DONTWAIT) {
            Ok(brought) => break brought,
            Err(Errno::EAGAIN) => return Ok((Received::Nothing, Vec::new())),
            // As in `receive_message`.
            Err(Errno::EINTR | Errno::ECONNRESET) => {}
            Err(e) => return Err(TransferError::Socket(e.into())),
        }
    };
    if flags.contains(MsgFlags::MSG_TRUNC) {
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
    use nix::fcntl::OFlag;
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use nix::unistd::{pipe, pipe2, read, write};
    use std::os::fd::AsFd;
    use std::process::Command;
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

    #[test]
    fn what_came_of_a_truncated_message_is_closed() {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let (reader, writer) = pipe().unwrap();
        crate::inherit::set_nonblocking(reader.as_fd()).unwrap();
        send_with_fds(ours.as_fd(), 1, FromSupervisor::KillAll, &[writer.as_fd(); 4]).unwrap();
        drop(writer);
        let room = cmsg_space!([RawFd; 2]);
        let brought = receive_rights(theirs.as_fd(), &mut [0; 100], room, MsgFlags::empty()).unwrap();
        assert!(brought.flags.contains(MsgFlags::MSG_CTRUNC) && brought.fds.is_empty());
        assert_eq!(read(&reader, &mut [0]), Ok(0));
        // Where there was no room for a single one.
        assert!(truncated(&[0; 40]).is_empty());
    }

    /// In a process of its own, whose limit that is.
    #[test]
    fn a_message_comes_alone_where_there_is_no_room_for_its_descriptors() {
        const ALONE: &str = "BULKHEAD_TEST_ALONE";
        if std::env::var_os(ALONE).is_none() {
            let name = std::thread::current().name().unwrap().to_owned();
            let mut test = Command::new(std::env::current_exe().unwrap());
            let output = test.args(["--exact", &name]).env(ALONE, "1").output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            return assert!(output.status.success() && said.contains("1 passed"), "{said}");
        }
        let kind = SockType::SeqPacket;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
        let two = [writer.as_fd(); 2];
        send_with_fds(ours.as_fd(), 9, FromSupervisor::Kill { process: 3 }, &two).unwrap();
        drop(writer);
        // For one more, which has the writer's number.
        let most = ours.try_clone().unwrap().as_raw_fd() + 1;
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, most.unsigned_abs().into(), hard).unwrap();
        let (message, fds) = receive_with_fds::<FromSupervisor>(theirs.as_fd()).unwrap();
        assert!(
            matches!(message, Received::Message(9, FromSupervisor::Kill { process: 3 })),
            "{message:?}"
        );
        assert!(fds.is_empty());
        assert_eq!(read(&reader, &mut [0]), Ok(0), "what came is open");
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
        send(32).unwrap();
        let (_, fds) = receive_with_fds::<FromSupervisor>(theirs.as_fd()).unwrap();
        assert_eq!(fds.len(), 32);
        let refused = send(MAX_FDS + 1);
        assert!(
            matches!(refused, Err(TransferError::Message(WireError::TooManyFds(41)))),
            "{refused:?}"
        );
    }
}
