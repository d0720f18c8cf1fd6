//! Why the kernel killed a process, where it says so: a forbidden system call, or want of memory.

use super::plan::Plan;
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
    /// Where the processes' groups are among the VM's, by the processes' names.
    places: BTreeMap<String, usize>,
    /// Kills for want of memory that were told, by place.
    told: BTreeMap<usize, u64>,
}

impl Obituary {
    /// Before root is left.
    pub(super) fn begin(plan: &Plan, groups: Option<Rc<Groups>>) -> Self {
        let places = plan.processes().zip(0..);
        Self {
            witness: Witness::begin(),
            groups,
            places: places
                .map(|(process, place)| (process.name.clone(), place))
                .collect(),
            told: BTreeMap::new(),
        }
    }

    /// The process `name` is in the group at `place`.
    pub(super) fn note(&mut self, name: &str, place: usize) {
        self.places.insert(name.to_owned(), place);
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
            && let (Some(groups), Some(&place)) = (&self.groups, self.places.get(name))
        {
            let (kills, told) = (groups.oom_kills(place), self.told.entry(place).or_default());
            if kills > *told {
                *told = kills;
                return Known::OutOfMemory;
            }
        }
        Known::Signal
    }
}
