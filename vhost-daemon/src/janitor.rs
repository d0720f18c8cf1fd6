//! A listening socket's path is removed when the process ends, whatever ends it.
//!
//! The confined process cannot remove a path. So a child, forked before there are threads, keeps
//! one pipe and the right to: it sleeps until the other end of the pipe is closed, which the
//! kernel does even after `kill -9`, removes the path if the socket is still the one that was made
//! here, and ends.
#![expect(unsafe_code, reason = "forks")]

use nix::unistd::{ForkResult, fork, pipe2};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The parent's side. Dropping it removes the path and waits until that is done.
#[derive(Debug)]
pub(crate) struct Janitor {
    lifeline: Option<OwnedFd>,
    done: OwnedFd,
}

impl Janitor {
    /// Watches over `path`, a socket that this process has just made. To be called while this
    /// process has one thread.
    pub(crate) fn watch(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let identity = identity(&path)?;
        let (life, lifeline) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let (done, busy) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        // SAFETY: there is one thread, so the child finds no lock held and no state half-changed.
        match unsafe { fork() }? {
            ForkResult::Parent { .. } => Ok(Self {
                lifeline: Some(lifeline),
                done,
            }),
            ForkResult::Child => {
                keep_only([life.as_raw_fd(), busy.as_raw_fd()]);
                wait_and_remove(&life, &path, identity);
                // SAFETY: ends this child without running the parent's destructors.
                unsafe { libc::_exit(0) }
            }
        }
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.lifeline.take());
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

/// In the child: SIGTERM and SIGINT are blocked, as in the parent.
fn wait_and_remove(life: &OwnedFd, path: &PathBuf, made: (u64, u64)) {
    while nix::unistd::read(life, &mut [0; 1]) == Err(nix::errno::Errno::EINTR) {}
    if identity(path).is_ok_and(|found| found == made) {
        let _ = fs::remove_file(path);
    }
}

/// In the child: closes everything but standard input, output, error and `kept`, so that neither
/// the image nor the parent's end of a pipe stays open here.
fn keep_only(mut kept: [i32; 2]) {
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
    use std::os::unix::net::UnixListener;

    /// A path that no other test uses.
    fn socket(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("janitor-{name}-{}", std::process::id()))
    }

    #[test]
    fn the_path_goes_with_its_owner() {
        let path = socket("gone");
        let _listener = UnixListener::bind(&path).unwrap();
        let janitor = Janitor::watch(&path).unwrap();
        assert!(path.exists());
        drop(janitor);
        assert!(!path.exists());
    }

    #[test]
    fn a_successors_socket_stays() {
        let path = socket("stays");
        let first = UnixListener::bind(&path).unwrap();
        let janitor = Janitor::watch(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = UnixListener::bind(&path).unwrap();
        drop(janitor);
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
        drop(first);
    }
}
