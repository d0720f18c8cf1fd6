//! Who holds a listening socket: accepts front ends for the confined process, which may not, and removes
//! the socket's path, if that was made here, when that process ends, whatever ends it.
//!
//! It is a child, forked before there are threads. It keeps the listening socket, one end of a socket
//! pair and the right to remove a path, and it sees no byte of a front end. Asked to, it accepts one
//! connection and hands it over. When the other end of the pair is closed, which the kernel does even
//! after `kill -9`, it removes the path if the socket is still the one that was made here, and ends.
#![expect(unsafe_code, reason = "forks")]

use crate::wait::{is_ready, wait};
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::{ForkResult, fork, pipe2};
use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// What asks for a front end, and comes with it.
const NEXT: &[u8] = b"+";

/// The parent's side. Dropping it removes the path and waits until that is done.
#[derive(Debug)]
pub(crate) struct Doorkeeper {
    /// Its end is the doorkeeper's, too.
    channel: Option<UnixStream>,
    done: OwnedFd,
}

impl Doorkeeper {
    /// Gives `listener` to a doorkeeper, with the `path` that this process has just bound it to, if it has. To be
    /// called while this process has one thread.
    pub(crate) fn start(listener: UnixListener, path: Option<&Path>) -> io::Result<Self> {
        let made = path.map(Made::just_now).transpose()?;
        let (channel, theirs) = UnixStream::pair()?;
        let (done, busy) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        // SAFETY: there is one thread, so the child finds no lock held and no state half-changed.
        match unsafe { fork() }? {
            ForkResult::Parent { .. } => Ok(Self {
                channel: Some(channel),
                done,
            }),
            ForkResult::Child => {
                keep_only([listener.as_raw_fd(), theirs.as_raw_fd(), busy.as_raw_fd()]);
                keep_the_door(&listener, &theirs);
                if let Some(made) = made {
                    made.remove();
                }
                // SAFETY: ends this child without running the parent's destructors.
                unsafe { libc::_exit(0) }
            }
        }
    }

    /// Asks for the next front end: it comes as a descriptor over [`Self::as_fd`].
    pub(crate) fn ask(&self) -> io::Result<()> {
        Ok(nix::unistd::write(self.as_fd(), NEXT).map(drop)?)
    }
}

impl AsFd for Doorkeeper {
    /// Readable when a front end is there.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.channel {
            Some(channel) => channel.as_fd(),
            // Only while it is being dropped.
            None => self.done.as_fd(),
        }
    }
}

impl Drop for Doorkeeper {
    fn drop(&mut self) {
        drop(self.channel.take());
        // End of file: the child is done. It does two system calls in between; there is nothing to
        // wait for but its turn on the CPU.
        let _ = nix::unistd::read(&self.done, &mut [0; 1]);
    }
}

/// Device and inode.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// In the child, until the parent is gone. SIGTERM and SIGINT are blocked, as in the parent.
fn keep_the_door(listener: &UnixListener, parent: &UnixStream) {
    let mut asked = false;
    loop {
        let mut fds = [
            PollFd::new(parent.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        let awaited = if asked { &mut fds[..] } else { &mut fds[..1] };
        if wait(awaited, None).is_err() {
            return;
        }
        let [ordered, incoming] = fds.map(|fd| is_ready(&fd));
        if ordered {
            match nix::unistd::read(parent, &mut [0; 1]) {
                Ok(1) => asked = true,
                _ => return,
            }
        }
        if incoming && asked {
            // One that has hung up already is nobody.
            let Ok((socket, _)) = listener.accept() else {
                continue;
            };
            asked = false;
            if hand_over(parent, &socket).is_err() {
                return;
            }
        }
    }
}

fn hand_over(parent: &UnixStream, socket: &UnixStream) -> nix::Result<()> {
    let fds = [socket.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    let next = [IoSlice::new(NEXT)];
    sendmsg::<()>(parent.as_raw_fd(), &next, &control, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

/// A path that was made here.
struct Made {
    path: PathBuf,
    identity: (u64, u64),
}

impl Made {
    fn just_now(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let identity = identity(&path)?;
        Ok(Self { path, identity })
    }

    fn remove(&self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// In the child: closes everything but standard input, output, error and `kept`, so that neither
/// the image nor the parent's end of a pipe stays open here.
fn keep_only(mut kept: [i32; 3]) {
    kept.sort_unstable();
    let mut first = 3;
    for number in kept {
        close_range(first, number - 1);
        first = number + 1;
    }
    close_range(first, i32::MAX);
}

fn close_range(first: i32, last: i32) {
    if first > last {
        return;
    }
    // SAFETY: these descriptors belong to the parent's copy of their owners; nothing here uses them.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptors::receive;
    use std::io::{Read, Write};

    /// A path that no other test uses.
    fn socket(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("doorkeeper-{name}-{}", std::process::id()))
    }

    #[test]
    fn the_path_goes_with_its_owner() {
        let path = socket("gone");
        let keeper = Doorkeeper::start(UnixListener::bind(&path).unwrap(), Some(&path)).unwrap();
        assert!(path.exists());
        drop(keeper);
        assert!(!path.exists());
    }

    #[test]
    fn the_path_of_someone_else_stays() {
        let path = socket("kept");
        let keeper = Doorkeeper::start(UnixListener::bind(&path).unwrap(), None).unwrap();
        drop(keeper);
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_successors_socket_stays() {
        let path = socket("stays");
        let keeper = Doorkeeper::start(UnixListener::bind(&path).unwrap(), Some(&path)).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = UnixListener::bind(&path).unwrap();
        drop(keeper);
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn front_ends_come_one_for_each_question() {
        let path = socket("front-ends");
        let keeper = Doorkeeper::start(UnixListener::bind(&path).unwrap(), Some(&path)).unwrap();
        let mut clients = [1, 2].map(|_| UnixStream::connect(&path).unwrap());
        for client in &mut clients {
            keeper.ask().unwrap();
            let (_, mut fds) = receive(keeper.as_fd(), &mut [0]).unwrap();
            let mut served = UnixStream::from(fds.pop().unwrap());
            served.write_all(b"hello").unwrap();
            let mut answer = [0; 5];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"hello");
        }
        // Not asked for: it stays in the listener's queue.
        let _third = UnixStream::connect(&path).unwrap();
        let mut fds = [PollFd::new(keeper.as_fd(), PollFlags::POLLIN)];
        wait(&mut fds, Some(std::time::Duration::from_millis(50))).unwrap();
        assert!(!is_ready(&fds[0]));
    }
}
