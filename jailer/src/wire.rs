//! Datagrams of the control protocol on a `SOCK_SEQPACKET` socketpair ([`vm_spec::control`]).

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use serde::{Serialize, de::DeserializeOwned};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use vm_spec::control::{Envelope, MAX_MESSAGE, WireError};

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The socket.
    #[error("control socket")]
    Socket(#[source] io::Error),
    /// The message.
    #[error("control message")]
    Message(#[from] WireError),
}

/// What a receive found.
#[derive(Debug)]
pub enum Received<T> {
    /// A message, with its number.
    Message(u64, T),
    /// Nothing yet.
    Nothing,
    /// The peer is gone.
    End,
}

/// Sends one message without waiting: a peer that does not read its socket gets an error here.
///
/// # Errors
/// Any [`TransferError`].
pub fn send_message<T: Serialize + DeserializeOwned>(
    socket: BorrowedFd<'_>,
    id: u64,
    body: T,
) -> Result<(), TransferError> {
    let bytes = Envelope::new(id, body).encode()?;
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        match send(socket.as_raw_fd(), &bytes, flags) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(TransferError::Socket(e.into())),
        }
    }
}

/// Receives one message without waiting.
///
/// # Errors
/// Any [`TransferError`]: the peer does not speak the protocol and is to be treated as lost.
pub fn receive_message<T: Serialize + DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> Result<Received<T>, TransferError> {
    let mut bytes = vec![0; MAX_MESSAGE];
    // MSG_TRUNC: the true length is returned, so that a message that was cut is seen.
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
    loop {
        return match recv(socket.as_raw_fd(), &mut bytes, flags) {
            Ok(0) => Ok(Received::End),
            Ok(length) => {
                let bytes = bytes.get(..length).ok_or(WireError::TooLong(length))?;
                let envelope = Envelope::decode(bytes)?;
                Ok(Received::Message(envelope.id, envelope.body))
            }
            Err(Errno::EAGAIN) => Ok(Received::Nothing),
            // Told once, of a peer that went and left messages of ours unread; what it sent before
            // comes next, and then its end.
            Err(Errno::EINTR | Errno::ECONNRESET) => continue,
            Err(e) => Err(TransferError::Socket(e.into())),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::AsFd;
    use vm_spec::supervise::FromSupervisor;

    #[test]
    fn the_last_words_of_a_peer_that_did_not_listen_are_heard() {
        let kind = SockType::SeqPacket;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        send_message(ours.as_fd(), 1, FromSupervisor::KillAll).unwrap();
        let last = FromSupervisor::Finished { code: 7 };
        send_message(theirs.as_fd(), 2, last.clone()).unwrap();
        drop(theirs);
        let heard = || receive_message::<FromSupervisor>(ours.as_fd()).unwrap();
        assert!(matches!(heard(), Received::Message(2, words) if words == last));
        assert!(matches!(heard(), Received::End));
    }
}
