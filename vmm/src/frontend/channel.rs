//! Message I/O with a deadline. A back end that hangs, stops in the middle of a message or sends
//! without end costs its device, never the thread that waits here.

use super::backend_channel::BackendChannel;
use super::error::{Error, ReplyProblem};
use super::message::{HEADER_SIZE, Header};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zerocopy::{FromZeros, IntoBytes};

/// A request on its way: its name for errors, and until when it must be answered.
#[derive(Clone, Copy)]
pub(super) struct Exchange {
    pub(super) request: FrontendReq,
    pub(super) until: Instant,
    pub(super) after: Duration,
}

impl Exchange {
    /// To be answered within `after`, and no later than `limit`.
    pub(super) fn new(request: FrontendReq, after: Duration, limit: Instant) -> Self {
        Self {
            request,
            until: limit.min(Instant::now() + after),
            after,
        }
    }

    fn io(self, source: impl Into<io::Error>) -> Error {
        Error::Io {
            request: self.request,
            source: source.into(),
        }
    }

    pub(super) fn bad(self, problem: ReplyProblem) -> Error {
        Error::Reply {
            request: self.request,
            problem,
        }
    }
}

/// A reply: its payload, and the fd that came with it.
pub(super) struct Reply {
    pub(super) payload: Vec<u8>,
    pub(super) fd: Option<OwnedFd>,
}

/// The vhost-user socket.
pub(super) struct Channel {
    stream: UnixStream,
    /// Readable when the vmm shuts down: ends every wait.
    cancel: Arc<EventFd>,
}

impl Channel {
    pub(super) fn new(socket: OwnedFd, cancel: Arc<EventFd>) -> Result<Self, Error> {
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(true).map_err(|source| Error::Resource {
            what: "a non-blocking vhost-user socket",
            source,
        })?;
        Ok(Self { stream, cancel })
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// From now on waits end with `cancel`.
    pub(super) fn set_cancel(&mut self, cancel: Arc<EventFd>) {
        self.cancel = cancel;
    }

    /// Sends one message; `fds` travel with its first byte.
    pub(super) fn send(
        &mut self,
        exchange: Exchange,
        message: &[u8],
        fds: &[BorrowedFd<'_>],
        side: &mut BackendChannel,
    ) -> Result<(), Error> {
        let mut raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut sent = 0;
        while sent < message.len() {
            match self.stream.send_with_fds(&[&message[sent..]], &raw) {
                Ok(count) => {
                    sent += count;
                    raw.clear();
                }
                Err(error) => match Errno::from_raw(error.errno()) {
                    Errno::EAGAIN => self.wait(exchange, PollFlags::POLLOUT, side)?,
                    Errno::EINTR => {}
                    Errno::EPIPE | Errno::ECONNRESET => return Err(Error::Gone(exchange.request)),
                    errno => return Err(exchange.io(errno)),
                },
            }
        }
        Ok(())
    }

    /// Receives the reply to `exchange`, judged but for its payload.
    pub(super) fn receive(&mut self, exchange: Exchange, side: &mut BackendChannel) -> Result<Reply, Error> {
        let mut fd = None;
        let mut header = Header::new_zeroed();
        self.fill(exchange, header.as_mut_bytes(), &mut fd, side)?;
        header
            .check_reply(exchange.request.into())
            .map_err(|problem| exchange.bad(problem))?;
        let mut payload = vec![0; header.size as usize];
        self.fill(exchange, &mut payload, &mut fd, side)?;
        Ok(Reply {
            payload,
            fd: fd.map(OwnedFd::from),
        })
    }

    fn fill(
        &mut self,
        exchange: Exchange,
        buffer: &mut [u8],
        fd: &mut Option<File>,
        side: &mut BackendChannel,
    ) -> Result<(), Error> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.stream.recv_with_fd(&mut buffer[filled..]) {
                Ok((0, _)) => return Err(Error::Gone(exchange.request)),
                Ok((count, received)) => {
                    filled += count;
                    if received.is_some() && std::mem::replace(fd, received).is_some() {
                        return Err(exchange.bad(ReplyProblem::Fds));
                    }
                }
                Err(error) => match Errno::from_raw(error.errno()) {
                    Errno::EAGAIN => self.wait(exchange, PollFlags::POLLIN, side)?,
                    Errno::EINTR => {}
                    Errno::ENOBUFS => return Err(exchange.bad(ReplyProblem::Fds)),
                    Errno::ECONNRESET => return Err(Error::Gone(exchange.request)),
                    errno => return Err(exchange.io(errno)),
                },
            }
        }
        Ok(())
    }

    /// Waits until the socket is ready. Requests of the back end are answered meanwhile: it may
    /// wait for that answer before it gives its own.
    pub(super) fn wait(
        &self,
        exchange: Exchange,
        events: PollFlags,
        side: &mut BackendChannel,
    ) -> Result<(), Error> {
        loop {
            let left = exchange.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout {
                    request: exchange.request,
                    after: exchange.after,
                });
            }
            let mut fds = vec![
                PollFd::new(self.stream.as_fd(), events),
                PollFd::new(self.cancel.as_fd(), PollFlags::POLLIN),
            ];
            fds.extend(side.as_fd().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            // Rounded up, so that the last millisecond is not spun away.
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(exchange.io(errno)),
            }
            let ready = |i: usize| fds.get(i).is_some_and(|fd| fd.any().unwrap_or(true));
            let (socket, cancelled, request) = (ready(0), ready(1), ready(2));
            if cancelled {
                return Err(Error::Cancelled);
            }
            if request {
                side.service();
            }
            if socket {
                return Ok(());
            }
        }
    }

    /// Looks at a socket on which no answer is due.
    ///
    /// # Errors
    /// [`Error::Closed`] at end of file, [`Error::Unasked`] when there are bytes.
    pub(super) fn check_idle(&mut self) -> Result<(), Error> {
        let mut bytes = [0; HEADER_SIZE];
        match self.stream.recv_with_fd(&mut bytes) {
            Ok((0, _)) => Err(Error::Closed),
            Ok(_) => Err(Error::Unasked),
            Err(error) => match Errno::from_raw(error.errno()) {
                Errno::EAGAIN | Errno::EINTR => Ok(()),
                Errno::ECONNRESET => Err(Error::Closed),
                Errno::ENOBUFS => Err(Error::Unasked),
                errno => Err(Error::Socket(errno.into())),
            },
        }
    }
}
