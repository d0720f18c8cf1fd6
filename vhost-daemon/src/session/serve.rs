//! The loop of the main thread: messages, configuration changes, and the signal to end.

use super::direct::Next;
use super::{Session, SessionError, direct};
use crate::signals::Termination;
use crate::wait::{self, is_ready};
use jailer::sandbox::Locked;
use nix::poll::{PollFd, PollFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

/// For the rest of a message after its first byte, and for room for its answer.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(2);
/// Between two looks for it.
const MESSAGE_LOOK: Duration = Duration::from_millis(5);

/// Why a session ended without an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// The front end closed the connection.
    Disconnected,
    /// SIGTERM or SIGINT.
    Terminated,
}

/// Why a session ended otherwise.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket or a wait failed.
    #[error("the vhost-user connection failed")]
    Io(#[from] io::Error),
    /// A message that breaks the protocol, or that could not be answered.
    #[error("the vhost-user session ended: {0}")]
    Protocol(String),
    /// Winding down failed.
    #[error(transparent)]
    Session(#[from] SessionError),
}

pub(crate) fn lock(session: &Mutex<Session>) -> MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves one front end to its end, then drains, forgets it and flushes.
///
/// The token shows that the process is confined: from here on it handles what a guest wrote.
pub(crate) fn serve(
    _locked: &Locked,
    session: &Arc<Mutex<Session>>,
    socket: UnixStream,
    termination: &Termination,
) -> Result<End, ServeError> {
    let end = messages(session, socket, termination);
    // Whatever ended the session, no I/O may outlive it.
    lock(session).end()?;
    end
}

pub(crate) fn messages(
    session: &Arc<Mutex<Session>>,
    socket: UnixStream,
    termination: &Termination,
) -> Result<End, ServeError> {
    let watched = socket.try_clone()?;
    let mut handler = BackendReqHandler::from_stream(socket, Arc::clone(session));
    loop {
        let ready = wait(watched.as_fd(), termination, session)?;
        if ready.termination {
            termination.acknowledge();
            return Ok(End::Terminated);
        }
        if !ready.source {
            continue;
        }
        match whole_message(&watched, termination)? {
            Whole::Terminated => return Ok(End::Terminated),
            Whole::Ours(size) => {
                direct::handle(&mut lock(session), watched.as_fd(), size)?;
                continue;
            }
            Whole::Crates => {}
        }
        if let Room::Terminated = room_for_an_answer(&watched, termination)? {
            return Ok(End::Terminated);
        }
        match handler.handle_request() {
            Ok(()) | Err(VhostError::ReqHandlerError(_)) => {}
            Err(VhostError::Disconnected) => return Ok(End::Disconnected),
            Err(VhostError::SocketBroken(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Ok(End::Disconnected);
            }
            Err(error) => return Err(ServeError::Protocol(error.to_string())),
        }
    }
}

/// A message that can be read without waiting for its rest.
enum Whole {
    Ours(usize),
    Crates,
    Terminated,
}

/// Waits for the rest of a message that has begun; no event tells of it, since what is there already
/// keeps the socket readable.
fn whole_message(socket: &UnixStream, termination: &Termination) -> Result<Whole, ServeError> {
    let end = Instant::now() + MESSAGE_DEADLINE;
    loop {
        match direct::peek(socket.as_fd()) {
            Next::Ours(size) => return Ok(Whole::Ours(size)),
            Next::Crates => return Ok(Whole::Crates),
            Next::Part if Instant::now() >= end => {
                return Err(ServeError::Protocol("a message does not end".to_owned()));
            }
            Next::Part => {}
        }
        let mut fds = [
            PollFd::new(termination.as_fd(), PollFlags::POLLIN),
            // POLLHUP is always told.
            PollFd::new(socket.as_fd(), PollFlags::empty()),
        ];
        wait::wait(&mut fds, Some(MESSAGE_LOOK))?;
        let [ended, hung_up] = fds.map(|fd| is_ready(&fd));
        if ended {
            termination.acknowledge();
            return Ok(Whole::Terminated);
        }
        if hung_up {
            // No rest will come: reading does not wait.
            return Ok(Whole::Crates);
        }
    }
}

/// Whether an answer can be sent without waiting for the front end to take older ones.
enum Room {
    Enough,
    Terminated,
}

/// Waits for room in the socket; the crate waits for ever when it sends. A socket that is writable
/// at all has three quarters of its buffer free.
fn room_for_an_answer(socket: &UnixStream, termination: &Termination) -> Result<Room, ServeError> {
    let end = Instant::now() + MESSAGE_DEADLINE;
    loop {
        let mut fds = [
            PollFd::new(termination.as_fd(), PollFlags::POLLIN),
            PollFd::new(socket.as_fd(), PollFlags::POLLOUT),
        ];
        let left = end.saturating_duration_since(Instant::now());
        wait::wait(&mut fds, Some(left))?;
        let [ended, writable] = fds.map(|fd| is_ready(&fd));
        if ended {
            termination.acknowledge();
            return Ok(Room::Terminated);
        }
        if writable {
            return Ok(Room::Enough);
        }
        if left.is_zero() {
            return Err(ServeError::Protocol("the front end takes no answers".to_owned()));
        }
    }
}

/// What there is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ready {
    /// What was waited for.
    pub(crate) source: bool,
    /// The process is asked to end.
    pub(crate) termination: bool,
}

/// Waits for `source` without a limit: a guest that changes nothing is no fault. What the device waits for by
/// itself is done meanwhile, whether there is a front end or not.
pub(crate) fn wait(
    source: BorrowedFd<'_>,
    termination: &Termination,
    session: &Mutex<Session>,
) -> io::Result<Ready> {
    // Asked for each time: a device may have nothing more to wait for.
    let config = lock(session).config_sources()?;
    let mut fds = vec![
        PollFd::new(source, PollFlags::POLLIN),
        PollFd::new(termination.as_fd(), PollFlags::POLLIN),
    ];
    fds.extend(config.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
    wait::wait(&mut fds, None)?;
    let ready = Ready {
        source: is_ready(&fds[0]),
        termination: is_ready(&fds[1]),
    };
    if fds[2..].iter().any(is_ready) && !ready.termination {
        let mut session = lock(session);
        if session.device.config_changed() {
            session.send_config_change();
        }
    }
    Ok(ready)
}
