//! Why the kernel killed a process, where it says so: a forbidden system call, or want of memory.

use crate::sandbox::Witness;
use crate::sandbox::cgroup::Groups;
use crate::tell::tell;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::rc::Rc;
use vm_spec::run_state::ProcessState;

/// Why a process was ended by a signal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Known {
    /// No more than that.
    Signal,
    /// The memory limit was reached.
    OutOfMemory,
}

/// Who can say it.
pub(super) struct Obituary {
    witness: Witness,
    groups: Option<Rc<Groups>>,
    /// Kills for want of memory that were told, by process name.
    told: BTreeMap<String, u64>,
}

impl Obituary {
    /// Before root is left.
    pub(super) fn begin(groups: Option<Rc<Groups>>) -> Self {
        Self {
            witness: Witness::begin(),
            groups,
            told: BTreeMap::new(),
        }
    }

    /// What is known of the end of `process` by `signal`; says which call was forbidden.
    pub(super) fn write(&mut self, process: Option<&ProcessState>, signal: u8) -> Known {
        let Some(process) = process else {
            return Known::Signal;
        };
        let (name, pid) = (&process.name, process.pid);
        if signal == Signal::SIGSYS as u8 {
            let role = process.role.policy().and_then(|name| name.parse().ok());
            let verdict = role.and_then(|role| self.witness.testify(Pid::from_raw(pid), role));
            if let Some(verdict) = verdict {
                tell(format_args!("bulkhead: {name} (pid {pid}): {verdict}"));
            }
        } else if signal == Signal::SIGKILL as u8
            && let Some(groups) = &self.groups
        {
            let (kills, told) = (groups.oom_kills(name), self.told.entry(name.clone()).or_default());
            if kills > *told {
                *told = kills;
                return Known::OutOfMemory;
            }
        }
        Known::Signal
    }
}
