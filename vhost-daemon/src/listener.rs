//! `--socket-path`: a listening socket that a dead predecessor's does not block; or one that is inherited.

use crate::descriptors::receive;
use crate::doorkeeper::Doorkeeper;
use crate::session::{Session, wait};
use crate::signals::Termination;
use nix::sys::socket::{SockType, getsockopt, sockopt};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Mutex;

/// A bound socket, in the hands of a doorkeeper.
#[derive(Debug)]
pub(crate) struct Listener(Doorkeeper);

impl Listener {
    /// Listens on `path` until dropped. A socket that is there already is replaced if nobody listens
    /// on it. To be called while this process has one thread.
    ///
    /// # Errors
    /// When somebody does, or the path is something else.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let socket = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_dead(path)? => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)
            }
            other => other,
        };
        Doorkeeper::start(socket?, Some(path)).map(Self)
    }

    /// Listens on a socket that someone else has made, and keeps. To be called while this process has one thread.
    ///
    /// # Errors
    /// When it is no stream socket of the Unix domain, or does not listen.
    pub(crate) fn inherited(fd: OwnedFd) -> io::Result<Self> {
        let stream = getsockopt(&fd, sockopt::SockType)? == SockType::Stream;
        if !stream || !getsockopt(&fd, sockopt::AcceptConn)? {
            let why = "it is not a stream socket that listens";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let listener = UnixListener::from(fd);
        // Fails in another domain.
        listener.local_addr()?;
        Doorkeeper::start(listener, None).map(Self)
    }

    /// The next front end; `None` when the process is asked to end. The device of `session` does meanwhile what it
    /// is asked for otherwise.
    pub(crate) fn accept(
        &self,
        termination: &Termination,
        session: &Mutex<Session>,
    ) -> io::Result<Option<UnixStream>> {
        self.0.ask()?;
        loop {
            let ready = wait(self.0.as_fd(), termination, session)?;
            if ready.termination {
                termination.acknowledge();
                return Ok(None);
            }
            if ready.source {
                let (_, mut fds) = receive(self.0.as_fd(), &mut [0])?;
                let socket = fds.pop().ok_or(io::ErrorKind::ConnectionAborted)?;
                return Ok(Some(UnixStream::from(socket)));
            }
        }
    }
}

fn is_dead(path: &Path) -> io::Result<bool> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Ok(false);
    }
    let refused =
        UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    Ok(refused)
}
