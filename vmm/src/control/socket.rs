//! SOCK_SEQPACKET: receive without blocking, send with a deadline.

use jailer::wire_fds::receive_rights;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{MsgFlags, send};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use vm_spec::control::{Envelope, FromVmm, MAX_FDS, MAX_MESSAGE, ToVmm, WireError};

/// Longest that a message to the supervisor waits for room in its socket.
const SEND_DEADLINE: Duration = Duration::from_secs(2);

/// What is wrong with the control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A system call failed.
    #[error("cannot {what} the control socket")]
    System {
        /// `receive from`, `send to` or `wait for`.
        what: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// What came is no message.
    #[error("the control socket carried something else than a message")]
    Wire(#[from] WireError),
    /// The datagram did not fit.
    #[error("a control message is longer than the protocol allows")]
    TooLong,
    /// The supervisor does not read.
    #[error("the supervisor takes no messages")]
    Deadline,
    /// The first message never came.
    #[error("no configuration came within {0:?}")]
    NoConfig(Duration),
    /// The supervisor closed the socket.
    #[error("the supervisor is gone")]
    Closed,
    /// Something other than `Start` came first.
    #[error("the first control message is no configuration")]
    NotStart,
}

/// What a receive found.
pub enum Incoming {
    /// A message, with its descriptors.
    Message(Box<Envelope<ToVmm>>, Vec<OwnedFd>),
    /// Nothing now.
    Nothing,
    /// End of file: the supervisor is gone.
    Closed,
}

/// The vmm's end.
pub struct ControlSocket {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

fn failed(what: &'static str) -> impl FnOnce(Errno) -> ControlError {
    move |source| ControlError::System { what, source }
}

impl ControlSocket {
    /// Takes the connected socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            buffer: vec![0; MAX_MESSAGE],
        }
    }

    /// For polling.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Receives one message if there is one, without descriptors where this process has no room for all.
    ///
    /// # Errors
    /// Any [`ControlError`]; the message is lost then.
    pub fn receive(&mut self) -> Result<Incoming, ControlError> {
        let rights = cmsg_space!([RawFd; MAX_FDS]);
        let (socket, flags) = (self.socket.as_fd(), MsgFlags::MSG_DONTWAIT);
        let received = match receive_rights(socket, &mut self.buffer, rights, flags) {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Incoming::Nothing),
            Err(Errno::ECONNRESET) => return Ok(Incoming::Closed),
            Err(errno) => return Err(failed("receive from")(errno)),
        };
        if received.flags.contains(MsgFlags::MSG_TRUNC) {
            return Err(ControlError::TooLong);
        }
        if received.length == 0 {
            return Ok(Incoming::Closed);
        }
        let message = Envelope::decode(&self.buffer[..received.length])?;
        // A request that lacks its descriptors is refused.
        Ok(Incoming::Message(Box::new(message), received.fds))
    }

    /// Waits for a message.
    ///
    /// # Errors
    /// Any [`ControlError`]; [`ControlError::NoConfig`] after `limit`.
    pub fn receive_within(&mut self, limit: Duration) -> Result<Incoming, ControlError> {
        let deadline = Instant::now() + limit;
        loop {
            match self.receive()? {
                Incoming::Nothing => {}
                other => return Ok(other),
            }
            if !self.wait(PollFlags::POLLIN, deadline)? {
                return Err(ControlError::NoConfig(limit));
            }
        }
    }

    /// Sends one message; `id` is the request's that it answers, or 0.
    ///
    /// # Errors
    /// Any [`ControlError`].
    pub fn send(&self, id: u64, body: FromVmm) -> Result<(), ControlError> {
        let bytes = Envelope::new(id, body).encode()?;
        let deadline = Instant::now() + SEND_DEADLINE;
        loop {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.socket.as_raw_fd(), &bytes, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if !self.wait(PollFlags::POLLOUT, deadline)? {
                        return Err(ControlError::Deadline);
                    }
                }
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(ControlError::Closed),
                Err(errno) => return Err(failed("send to")(errno)),
            }
        }
    }

    fn wait(&self, events: PollFlags, deadline: Instant) -> Result<bool, ControlError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let mut fds = [PollFd::new(self.socket.as_fd(), events)];
        let timeout = u16::try_from(left.as_millis()).unwrap_or(u16::MAX).max(1);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(true),
            Err(errno) => Err(failed("wait for")(errno)),
        }
    }
}
