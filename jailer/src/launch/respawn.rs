//! Starting a device's process again: what is kept for it, and how.
//!
//! The forker holds every image and TAP for the VM's whole life, so that their locks never lapse
//! and a successor works on the same open file descriptions; no path is looked up again.

use super::plan::{Descriptor, Plan, ProcessPlan, Source};
use super::spawn::{Binaries, begin, of_back_end, pair};
use super::watch::Watch;
use crate::failure::Failure;
use crate::sandbox::SeccompMode;
use crate::sandbox::child::{Child, Parent, Starting};
use crate::tell::tell;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::SockType;
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;
use vm_spec::control::BACKEND_FDS;
use vm_spec::run_state::ProcessRole;
use vm_spec::supervise::{AddedProcess, Build, MOST_PROCESSES};

/// A successor has built its jail and executes its binary within this time, or is killed.
const JAIL_DEADLINE: Duration = Duration::from_secs(2);

/// By what the watches of a process are kept: its device's place, or another number for one that was added.
fn watched(process: usize, plan: &ProcessPlan) -> usize {
    plan.image_device().unwrap_or(MOST_PROCESSES + process)
}

/// What is kept for successors.
pub(crate) struct Respawner {
    /// By place in the plan, then those that were added; `None` for the vmm, which has no successor, and for those
    /// that were removed.
    processes: Vec<Option<ProcessPlan>>,
    /// How many of them are the plan's.
    planned: usize,
    /// Flags of every device process.
    common: Vec<String>,
    kept: BTreeMap<Source, OwnedFd>,
    /// Of the files that disks write: see [`watched`].
    watches: BTreeMap<usize, Vec<Watch>>,
    binaries: Binaries,
    /// Other builds, by place: those that serve instead, and those that are to be tried.
    adopted: BTreeMap<usize, OwnedFd>,
    candidates: BTreeMap<usize, OwnedFd>,
}

/// A successor that builds its jail.
pub(crate) struct Successor {
    /// For the vmm. Messages wait in its vhost-user socket until the process reads them.
    pub(crate) sockets: [OwnedFd; BACKEND_FDS],
    starting: Starting,
}

impl Respawner {
    /// Keeps of `table` what device processes are given; the rest is closed.
    pub(crate) fn keep(
        plan: &Plan,
        table: BTreeMap<Source, OwnedFd>,
        watches: BTreeMap<usize, Vec<Watch>>,
        binaries: Binaries,
    ) -> Self {
        let processes: Vec<Option<ProcessPlan>> = plan
            .workers
            .iter()
            .map(|worker| Some(worker.clone()).filter(|w| w.role.is_device()))
            .collect();
        let wanted = |source: &Source| {
            let mut given = processes.iter().flatten().flat_map(|p| &p.descriptors);
            // Its socket is made anew each time.
            !matches!(source, Source::BackEnd(_)) && given.any(|given| given.source == *source)
        };
        Self {
            kept: table.into_iter().filter(|(source, _)| wanted(source)).collect(),
            watches,
            planned: processes.len(),
            processes,
            common: plan.common.clone(),
            binaries,
            adopted: BTreeMap::new(),
            candidates: BTreeMap::new(),
        }
    }

    /// Keeps another build of `process`, instead of the last that was kept for it.
    pub(crate) fn keep_candidate(&mut self, process: usize, binary: OwnedFd) {
        if self.processes.get(process).is_some_and(Option::is_some) {
            self.candidates.insert(process, binary);
        }
    }

    /// Keeps another TAP for `process`, in the place of one that is gone.
    pub(crate) fn keep_tap(&mut self, process: usize, queues: Vec<OwnedFd>) {
        let Some(Some(plan)) = self.processes.get(process) else {
            return;
        };
        let taps = plan.descriptors.iter().map(|given| given.source);
        let taps = taps.filter(|source| matches!(source, Source::Tap(..)));
        self.kept.extend(taps.zip(queues));
    }

    /// Keeps what one more process takes, at `process`: behind all others, or where one was removed.
    pub(crate) fn add(&mut self, process: usize, added: AddedProcess, fds: Vec<OwnedFd>) {
        let free = match self.processes.get(process) {
            Some(place) => process > 0 && place.is_none(),
            None => process == self.processes.len(),
        };
        let kind = match added.role {
            ProcessRole::Disk => "vhost-user-blk",
            ProcessRole::Net => "vhost-user-net",
            _ => return,
        };
        if !free || process >= MOST_PROCESSES || fds.len() != added.descriptors() {
            return;
        }
        let mut fds = fds.into_iter();
        self.adopted.extend(fds.next().map(|binary| (process, binary)));
        let watches = fds.by_ref().take(added.watches.into()).map(Watch::of);
        self.watches.insert(MOST_PROCESSES + process, watches.collect());
        let mut descriptors = Vec::new();
        for about in added.fds {
            let source = match about.number == added.socket.0 {
                true => Source::BackEnd(process),
                false => Source::Added(process, about.number),
            };
            if source != Source::BackEnd(process) {
                self.kept.extend(fds.next().map(|fd| (source, fd)));
            }
            descriptors.push(Descriptor {
                source,
                what: about.what,
                kept: about.kept,
            });
        }
        let mut arguments = added.arguments;
        arguments.extend(self.common.iter().cloned());
        let plan = ProcessPlan {
            name: added.name,
            role: added.role,
            binary: kind,
            arguments,
            descriptors,
            made: added.made,
        };
        match self.processes.get_mut(process) {
            Some(place) => *place = Some(plan),
            None => self.processes.push(Some(plan)),
        }
    }

    /// Lets go of all that is kept for a process that was reaped: its image is nobody's any more.
    pub(crate) fn remove(&mut self, process: usize) {
        let Some(plan) = self.processes.get_mut(process).and_then(Option::take) else {
            return;
        };
        self.watches.remove(&watched(process, &plan));
        // The null device is others' too.
        for given in plan
            .descriptors
            .iter()
            .filter(|given| given.source != Source::Null)
        {
            self.kept.remove(&given.source);
        }
        self.adopted.remove(&process);
        self.candidates.remove(&process);
    }

    /// The candidate serves.
    pub(crate) fn adopt(&mut self, process: usize) {
        if let Some(binary) = self.candidates.remove(&process) {
            self.adopted.insert(process, binary);
        }
    }

    /// What becomes of forbidden system calls.
    pub(crate) fn seccomp(&self) -> SeccompMode {
        self.binaries.seccomp()
    }

    /// The numbers of all that it keeps.
    pub(crate) fn descriptors(&self) -> Vec<RawFd> {
        let kept = self.kept.values().map(AsRawFd::as_raw_fd);
        let watches = self.watches.values().flatten().map(Watch::number);
        kept.chain(watches).chain(self.binaries.descriptors()).collect()
    }

    fn binary(&self, process: usize, build: Build, plan: &ProcessPlan) -> Option<BorrowedFd<'_>> {
        match build {
            Build::Candidate => self.candidates.get(&process).map(AsFd::as_fd),
            Build::Current => match self.adopted.get(&process) {
                Some(binary) => Some(binary.as_fd()),
                None => Some(self.binaries.of(plan)),
            },
        }
    }

    /// Whether the host lost what predecessors of this process wrote.
    fn has_lost_writes(&self, process: usize, plan: &ProcessPlan) -> bool {
        let watches = self.watches.get(&watched(process, plan));
        // Each is asked: it may be told only now.
        watches
            .into_iter()
            .flatten()
            .filter(|watch| watch.has_lost())
            .count()
            > 0
    }

    /// Starts a process of `build` in the place of `process`, which has been reaped.
    ///
    /// # Errors
    /// A [`Failure`] when there is no such device process or it cannot be made.
    pub(crate) fn start(&self, process: usize, build: Build) -> Result<Successor, Failure> {
        let Some(Some(plan)) = self.processes.get(process) else {
            return Err(Failure::host(format!("process {process} has no successor")));
        };
        let (sockets, theirs) = pair(SockType::Stream)
            .and_then(|(socket, theirs)| Ok((of_back_end(socket)?, theirs)))
            .map_err(|e| Failure::host("cannot make its sockets").because(&e))?;
        let has = |given: &Descriptor| {
            matches!(given.source, Source::BackEnd(_)) || self.kept.contains_key(&given.source)
        };
        if !plan.descriptors.iter().all(has) {
            return Err(Failure::host("not all of its descriptors came"));
        }
        let lookup = |source| match source {
            Source::BackEnd(_) => theirs.as_fd(),
            other => self.kept[&other].as_fd(),
        };
        let binary = self
            .binary(process, build, plan)
            .ok_or_else(|| Failure::host("there is no other build"))?;
        let mut plan = plan.clone();
        if self.has_lost_writes(process, &plan) {
            plan.arguments.push("--writes-lost".into());
        }
        // The supervisor's place is behind the plan's.
        let place = process + usize::from(process >= self.planned);
        let starting = begin(
            (place, &plan),
            &lookup,
            &self.binaries,
            binary,
            Parent::CallersParent,
        )?;
        Ok(Successor { sockets, starting })
    }
}

impl Successor {
    /// Its process id.
    pub(crate) fn pid(&self) -> Pid {
        self.starting.pid()
    }

    /// Waits, with a deadline, until it executes its binary. One that fails ends, and is reaped as
    /// any other; what it failed in is told here.
    pub(crate) fn finish(self) -> Option<Child> {
        let pid = self.pid();
        let mut ready = [PollFd::new(self.starting.report(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(JAIL_DEADLINE).unwrap_or(PollTimeout::MAX);
        if poll(&mut ready, timeout) == Ok(0) {
            tell(format_args!(
                "bulkhead: pid {pid} did not build its jail within {JAIL_DEADLINE:?}: killed"
            ));
            let _ = kill(pid, Signal::SIGKILL);
            return None;
        }
        match self.starting.finish() {
            Ok(child) => Some(child),
            Err(error) => {
                tell(format_args!("bulkhead: {}", crate::tell::chain(&error)));
                None
            }
        }
    }
}
