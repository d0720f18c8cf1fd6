//! The spawner's children: who they are by now, and what the kernel tells of them.

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use vm_spec::control::exit_code;
use vm_spec::supervise::{AddedProcess, ExitStatus};

/// A process of the plan, or its latest successor.
pub(super) struct Worker {
    pub(super) pid: Pid,
    pub(super) reaped: bool,
    /// What it is, until it is started for the first time.
    pub(super) coming: Option<Box<AddedProcess>>,
    /// Another may have its place.
    pub(super) removed: bool,
}

impl Worker {
    pub(super) fn running(pid: Pid) -> Self {
        Self {
            pid,
            reaped: false,
            coming: None,
            removed: false,
        }
    }

    /// None that runs.
    pub(super) fn reaped() -> Self {
        Self {
            reaped: true,
            ..Self::running(Pid::from_raw(0))
        }
    }

    /// Its process id, while that is certain to be its own.
    pub(super) fn alive(&self) -> Option<Pid> {
        Some(self.pid).filter(|_| !self.reaped)
    }
}

/// What happened to a child.
pub(super) enum Change {
    /// It was reaped.
    Ended(ExitStatus),
    /// It was stopped, or (false) goes on.
    Stopped(bool),
}

/// The next of what happened to children, if anything did.
pub(super) fn next_change() -> Option<(Pid, Change)> {
    let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED | WaitPidFlag::WCONTINUED;
    loop {
        return match waitpid(None::<Pid>, Some(flags)) {
            Ok(WaitStatus::Exited(pid, code)) => Some((pid, Change::Ended(ExitStatus::Code(code as u8)))),
            Ok(WaitStatus::Signaled(pid, signal, _)) => {
                Some((pid, Change::Ended(ExitStatus::Signal(signal as u8))))
            }
            Ok(WaitStatus::Stopped(pid, _)) => Some((pid, Change::Stopped(true))),
            Ok(WaitStatus::Continued(pid)) => Some((pid, Change::Stopped(false))),
            Err(Errno::EINTR) => continue,
            _ => None,
        };
    }
}

/// The VM's exit code where a process ended so that none should, and how it ended in words.
pub(super) fn describe(status: ExitStatus) -> (u8, String) {
    match status {
        ExitStatus::Code(code) => (exit_code::ERROR, format!("exited with code {code}")),
        ExitStatus::OutOfMemory => (exit_code::ERROR, "was killed, out of memory".into()),
        ExitStatus::Signal(signal) if signal == Signal::SIGSYS as u8 => {
            (exit_code::SECCOMP, "was stopped by seccomp".into())
        }
        ExitStatus::Signal(signal) => (exit_code::ERROR, format!("was killed by signal {signal}")),
    }
}
