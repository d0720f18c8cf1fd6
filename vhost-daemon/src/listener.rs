//! `--socket-path`: a listening socket that a dead predecessor's does not block.

use crate::janitor::Janitor;
use crate::signals::Termination;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// A bound socket and the path's janitor.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    _janitor: Janitor,
}

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
        let socket = socket?;
        let janitor = Janitor::watch(path)?;
        Ok(Self {
            socket,
            _janitor: janitor,
        })
    }

    /// The next front end; `None` when the process is asked to end.
    pub(crate) fn accept(&self, termination: &Termination) -> io::Result<Option<UnixStream>> {
        loop {
            let mut fds = [
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(termination.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let [incoming, ending] = fds.map(|fd| fd.any().unwrap_or(false));
            if ending {
                termination.acknowledge();
                return Ok(None);
            }
            if incoming {
                return self.socket.accept().map(|(socket, _)| Some(socket));
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
