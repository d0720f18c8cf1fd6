//! The reaper: a process that does nothing until the spawner is gone, however it went, and then
//! removes what a process's death does not remove by itself: the run-time folder and the
//! terminal's raw mode. (Children die with the spawner by PR_SET_PDEATHSIG.)
#![expect(unsafe_code, reason = "a fork")]

use super::run_dir::RunDir;
use super::terminal::{self, Saved};
use crate::sandbox::cgroup::Place;
use crate::tell::tell;
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid, pipe2, read, setsid, write};
use std::os::fd::{AsRawFd, OwnedFd};

/// What the spawner writes before it ends as it should.
const IN_ORDER: u8 = b'.';
/// One for each reaper that may be waiting.
const ALL_IN_ORDER: [u8; 2] = [IN_ORDER; 2];

/// The spawner's end.
pub(crate) struct Reaper {
    pub(crate) pid: Pid,
    pipe: OwnedFd,
}

impl Reaper {
    /// Starts the reaper, and a second one where `spawner_removes_all` is false: the spawner cannot remove what is
    /// to be removed, should the first be killed. Only its own pipe, standard error, the terminal and the run-time
    /// folder's lock may be open besides: everything else is opened after it.
    ///
    /// The calling process must have one thread only.
    pub(crate) fn start(
        run_dir: &RunDir,
        saved: Option<&Saved>,
        groups: Option<&Place>,
        spawner_removes_all: bool,
    ) -> nix::Result<Self> {
        let (ours, theirs) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let spawner = getpid();
        // SAFETY: this process has one thread, so the child may do whatever the parent might.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                pipe: theirs,
            }),
            ForkResult::Child => {
                drop(theirs);
                reap(
                    &ours,
                    &Remains {
                        run_dir,
                        saved,
                        groups,
                        spawner,
                    },
                    spawner_removes_all,
                );
                // SAFETY: ends the child without running what the parent registered.
                unsafe { libc::_exit(0) }
            }
        }
    }

    /// Says that the spawner ends as it should, and lets the reaper clean up; whether it did.
    pub(crate) fn dismiss(self) -> bool {
        let _ = write(&self.pipe, &ALL_IN_ORDER);
        drop(self.pipe);
        waitpid(self.pid, None) == Ok(WaitStatus::Exited(self.pid, 0))
    }
}

/// The life of the reaper.
fn reap(pipe: &OwnedFd, remains: &Remains<'_>, spawner_removes_all: bool) {
    let mut second = None;
    if !spawner_removes_all {
        // SAFETY: this process has one thread, so the child may do whatever the parent might.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                wait(pipe, remains.run_dir);
                remains.clean_up();
                return;
            }
            Ok(ForkResult::Parent { child }) => second = Some(child),
            // The next command sweeps what one reaper leaves.
            Err(_) => {}
        }
    }
    let in_order = wait(pipe, remains.run_dir);
    if second.is_some() {
        // It holds the folder's lock too: the VM is over when both let go. One after the other, since groups are
        // removed by name, which may be another VM's once the folder is gone.
        let _ = waitpid(second, None);
    }
    remains.clean_up();
    if !in_order {
        let spawner = remains.spawner;
        tell(format_args!(
            "bulkhead: the spawner (pid {spawner}) died: its VM was ended"
        ));
    }
}

/// Waits for the spawner's end; whether it said that it ends as it should.
fn wait(pipe: &OwnedFd, run_dir: &RunDir) -> bool {
    // A Ctrl-C, a hang-up or a stop of the terminal's group is not meant for the reaper.
    let _ = setsid();
    for each in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGTTOU] {
        // SAFETY: ignoring runs no code of ours.
        let _ = unsafe { signal(each, SigHandler::SigIgn) };
    }
    close_others(pipe.as_raw_fd(), run_dir);
    let mut byte = [0];
    loop {
        match read(pipe, &mut byte) {
            Err(Errno::EINTR) => {}
            other => return other == Ok(1),
        }
    }
}

/// What is left behind when all processes are gone.
struct Remains<'a> {
    run_dir: &'a RunDir,
    saved: Option<&'a Saved>,
    groups: Option<&'a Place>,
    spawner: Pid,
}

impl Remains<'_> {
    fn clean_up(&self) {
        if let Some(saved) = self.saved {
            terminal::restore(saved);
        }
        if let Some(groups) = self.groups {
            groups.remove();
        }
        self.run_dir.remove_if_there();
    }
}

/// Standard output may be a pipe whose reader waits for its end.
fn close_others(pipe: i32, run_dir: &RunDir) {
    let lock = run_dir.lock_number();
    let (low, high) = (pipe.min(lock), pipe.max(lock));
    for (first, last) in [(1, 1), (3, low - 1), (low + 1, high - 1), (high + 1, i32::MAX)] {
        if first <= last {
            // SAFETY: no Rust value that owns one of these is used or dropped in this process
            // again.
            unsafe { crate::inherit::close_range(first as u32, last as u32) };
        }
    }
}
