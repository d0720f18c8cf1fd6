//! What others can read of a running VM: its state, and what happened.

use super::connector::Connector;
use super::identity::Settled;
use super::obituary::{Known, Obituary};
use super::plan::Plan;
use super::run_dir::RunDir;
use super::supervise::Event;
use super::{Jail, net, spawn};
use crate::clock::monotonic_ns;
use crate::tell::tell;
use nix::unistd::{Pid, getpid};
use std::time::{Duration, SystemTime};
use vm_spec::events;
use vm_spec::run_state::{self, ProcessRole, ProcessState, RunState};
use vm_spec::supervise::ExitStatus;

/// The state and the events in the run-time folder. They are for others to read: a full disk does not end the VM.
pub(super) struct Record<'a> {
    run_dir: &'a RunDir,
    state: RunState,
    obituary: Obituary,
    who: Who,
}

/// Who processes that are added become.
#[derive(Clone, Copy)]
pub(super) struct Who {
    pub(super) identity: Settled,
    pub(super) jailed: bool,
}

impl<'a> Record<'a> {
    /// Writes `state` down for the first time.
    pub(super) fn begin(run_dir: &'a RunDir, state: RunState, obituary: Obituary, who: Who) -> Self {
        let record = Self {
            run_dir,
            state,
            obituary,
            who,
        };
        record.save();
        record
    }

    /// Writes down what has happened.
    pub(super) fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Running {
                started_ns,
                first_instruction_ns,
            } => {
                self.state.machine_started_ns = Some(started_ns);
                self.state.first_instruction_ns = Some(first_instruction_ns);
            }
            Event::Forked(pid) => {
                let forker = unjailed("forker", ProcessRole::Forker, pid);
                self.state.processes.push(forker);
            }
            Event::Respawned { predecessor, pid } => {
                let of = |process: &&mut ProcessState| process.pid == predecessor.as_raw();
                if let Some(process) = self.state.processes.iter_mut().find(of) {
                    process.pid = pid.as_raw();
                }
            }
            Event::Added { plan, place, pid } => {
                self.obituary.note(&plan.name, place);
                self.state.processes.push(ProcessState {
                    name: plan.name,
                    role: plan.role,
                    pid: pid.as_raw(),
                    id: self.who.identity.outside(place),
                    jailed: self.who.jailed,
                    fds: plan.fds,
                    made: plan.made,
                });
            }
            Event::Removed { name, holder } => {
                let is_it = |process: &ProcessState| {
                    (process.role.is_device() && process.name == name)
                        || holder.is_some_and(|holder| process.pid == holder.as_raw())
                };
                self.state.processes.retain(|process| !is_it(process));
            }
            Event::Signalled(pid, signal, why) => {
                let process = self.state.processes.iter().find(|p| p.pid == pid.as_raw());
                if self.obituary.write(process, signal) == Known::OutOfMemory {
                    *why = ExitStatus::OutOfMemory;
                }
                return;
            }
            Event::Ending => return,
            Event::Happened(event) => {
                if let Err(error) = self.run_dir.write_event(&event) {
                    tell(format_args!(
                        "bulkhead: cannot write {}: {error}",
                        events::FILE_NAME
                    ));
                }
                return;
            }
        }
        self.save();
    }

    /// Writes down that the VM is over.
    pub(super) fn end(mut self, code: u8) {
        self.state.ended_ns = Some(monotonic_ns());
        self.state.exit_code = Some(code);
        self.save();
    }

    fn save(&self) {
        if let Err(error) = self.run_dir.write_state(&self.state) {
            tell(format_args!(
                "bulkhead: cannot write {}: {error}",
                self.run_dir.path().join(run_state::FILE_NAME).display()
            ));
        }
    }
}

fn unjailed(name: &str, role: ProcessRole, pid: Pid) -> ProcessState {
    ProcessState {
        name: name.to_owned(),
        role,
        pid: pid.as_raw(),
        id: None,
        jailed: false,
        fds: Vec::new(),
        made: Vec::new(),
    }
}

/// What time it was at `since`, a moment ago.
fn wall_clock(since: u64) -> u64 {
    let ago = Duration::from_nanos(monotonic_ns().saturating_sub(since));
    let then = SystemTime::now().checked_sub(ago);
    let then = then.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
    then.unwrap_or_default().as_secs()
}

/// The processes that are no part of the plan.
pub(super) fn helpers(
    reaper: Pid,
    connector: Option<&Connector>,
    holders: &[(String, net::Holder)],
) -> Vec<ProcessState> {
    let mut processes = vec![
        unjailed("spawner", ProcessRole::Spawner, getpid()),
        unjailed("reaper", ProcessRole::Reaper, reaper),
    ];
    let connector = connector.map(|connector| connector.pid);
    processes.extend(connector.map(|pid| unjailed("connector", ProcessRole::Connector, pid)));
    for (_, holder) in holders {
        processes.push(unjailed("netns", ProcessRole::NetNamespace, holder.pid));
    }
    processes
}

/// The VM as it begins.
pub(super) fn describe(
    plan: &Plan,
    running: &spawn::Running,
    mut processes: Vec<ProcessState>,
    identity: Settled,
    launched_ns: u64,
) -> RunState {
    let jailed = plan.workers.iter().zip(&running.workers);
    for (place, (process, child)) in jailed
        .chain([(&plan.supervisor, &running.supervisor)])
        .enumerate()
    {
        processes.push(ProcessState {
            name: process.name.clone(),
            role: process.role,
            pid: child.pid.as_raw(),
            id: identity.outside(place),
            jailed: plan.jail == Jail::On,
            fds: process.fd_states(),
            made: process.made.clone(),
        });
    }
    RunState {
        version: run_state::VERSION,
        name: plan.name.clone(),
        identity: identity.kind(),
        processes,
        launched_ns,
        launched_unix: wall_clock(launched_ns),
        spawned_ns: monotonic_ns(),
        machine_started_ns: None,
        first_instruction_ns: None,
        ended_ns: None,
        exit_code: None,
    }
}
