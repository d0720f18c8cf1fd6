//! `bulkhead run`: from a spec to an exit code.
//!
//! ```text
//!   machine (check) -> reaper -> inputs (open) -> plan -> spawn -> supervise
//! ```

mod chain;
mod connector;
mod disk;
mod forker;
pub(crate) mod identity;
pub(crate) mod image;
mod inputs;
mod kernel;
mod machine;
pub(crate) mod net;
mod obituary;
mod plan;
pub(crate) mod probe;
mod qcow2;
mod reaper;
mod respawn;
mod run_dir;
pub(crate) mod spawn;
mod supervise;
mod terminal;
mod watch;

#[cfg(feature = "fuzzing")]
#[path = "../../fuzz/launch.rs"]
pub(crate) mod fuzz;

use crate::failure::Failure;
use crate::sandbox::cgroup::{CgroupError, Groups, Place};
use crate::sandbox::{Root, SeccompMode, share_cores_within};
use connector::Connector;
use identity::{Identities, Settled};
use inputs::{BackendInput, Inputs};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, getpid};
use obituary::{Known, Obituary};
use plan::{Choices, Plan};
use reaper::Reaper;
use run_dir::RunDir;
use spawn::Ends;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use vm_spec::events::{self, VmEvent};
use vm_spec::run_state::{self, ProcessRole, ProcessState, RunState};
use vm_spec::spec::VmSpec;
use vm_spec::supervise::ExitStatus;

/// Whether a VM's processes are jailed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Jail {
    /// As they should be.
    On,
    /// No namespaces, no empty root, no resource limits, no filters: to tell a fault of the jail from
    /// one of a process. What a process denies itself (Landlock, capabilities) stays denied.
    Off,
}

/// How to run, beside what to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Off for finding faults only: whoever chooses it is warned.
    pub jail: Jail,
    /// What becomes of forbidden system calls.
    pub seccomp: SeccompMode,
    /// `error`, `warn`, `info`, `debug` or `trace`, for every process.
    pub log_level: String,
    /// Log lines are JSON objects.
    pub log_json: bool,
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    // The clock always exists.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| Duration::from(t).as_nanos() as u64)
}

/// The run-time folder of the running VM `name`.
///
/// # Errors
/// A [`Failure`] when there is none.
pub fn run_folder(name: &str) -> Result<PathBuf, Failure> {
    run_dir::find(name).ok_or_else(|| {
        Failure::usage(format!("no VM '{name}' runs")).hint("give the name that run was given")
    })
}

/// The run-time folders of this user's VMs; also of some that are over.
///
/// # Errors
/// A [`Failure`] when someone else could have made them.
pub fn run_folders() -> Result<Vec<PathBuf>, Failure> {
    run_dir::all()
}

/// Whether the VM whose run-time folder `folder` is runs, and `spawner` is its spawner.
///
/// # Errors
/// When the folder is gone.
pub fn is_run_by(folder: &std::path::Path, spawner: i32) -> std::io::Result<bool> {
    run_dir::is_locked_by(folder, spawner)
}

/// Connects to the supervisor of the VM whose run-time folder `folder` is.
///
/// # Errors
/// When nobody listens there.
pub fn connect_to(folder: &std::path::Path) -> std::io::Result<std::os::fd::OwnedFd> {
    run_dir::connect_to(folder)
}

/// What `bulkhead run --dry-run` prints. Opens everything, runs nothing.
///
/// # Errors
/// Any [`Failure`] that [`run`] would have met before it starts a process.
pub fn dry_run(spec: &VmSpec, options: &Options) -> Result<String, Failure> {
    let (name, mut devices) = machine::check(spec, &default_name())?;
    net::choose_servers(&mut devices);
    let mut inputs = inputs::open(spec, &devices)?;
    inputs.settle()?;
    let plan = make_plan(spec, &name, &devices, options, &inputs, false);
    let identity = identity::describe(&spawn::installed());
    Ok(plan.describe(&identity))
}

/// Runs a VM to its end and returns the exit code. The calling process must have one thread.
///
/// # Errors
/// A [`Failure`] when it could not be started.
pub fn run(spec: &VmSpec, options: &Options, launched_ns: u64) -> Result<u8, Failure> {
    let (name, mut devices) = machine::check(spec, &default_name())?;
    net::choose_servers(&mut devices);
    if options.jail == Jail::Off {
        eprintln!("bulkhead: warning: --jail=off: nothing is around a process that is broken into");
    } else if let Some(warning) = options.seccomp.warning() {
        eprintln!("bulkhead: warning: --seccomp={}: {warning}", options.seccomp);
    }
    let limited = !spec.limits.controllers().is_empty();
    // As early as can be: a user's range takes longer to get than all that comes before its use.
    let early = match limited {
        true => None,
        false => Some(Identities::begin(&spawn::installed())?),
    };
    let run_dir = run_dir::create(&name)?;
    // Before any other process is made: all are in the VM's groups.
    let place = match limited {
        true => Some(Place::find(&name).and_then(Place::claim).map_err(no_limits)?),
        false => None,
    };
    let identities = match early.map_or_else(|| Identities::begin(&spawn::installed()), Ok) {
        Ok(identities) => identities,
        Err(failure) => {
            // There is no reaper yet.
            place.iter().for_each(Place::remove);
            run_dir.remove();
            return Err(failure);
        }
    };
    let saved = terminal::save();
    let signals = supervise::block_signals().map_err(|e| Failure::host("cannot take signals").because(&e))?;
    let reaper = Reaper::start(&run_dir, saved.as_ref(), place.as_ref())
        .map_err(|e| Failure::host("cannot start the reaper").because(&e))?;
    let result = (|| {
        // Before anything that it need not hold is opened.
        let connector = Connector::start(&devices)
            .map_err(|e| Failure::host("cannot start the connector").because(&e))?;
        let mut inputs = inputs::open(spec, &devices)?;
        inputs.begin_captures(&devices)?;
        inputs.make_links(&run_dir, &devices)?;
        // Until the end of this block: their namespaces end with these.
        let holders = inputs.holders();
        let plan = make_plan(spec, &name, &devices, options, &inputs, saved.is_some());
        let clients = run_dir
            .listen()
            .map_err(|e| Failure::host("cannot make the VM's control socket").because(&e))?;
        let groups = make_groups(spec, place, &plan, &inputs)?;
        let mut binaries = spawn::Binaries::open(&plan, groups.clone())?;
        let mut obituary = Obituary::begin(groups.clone());
        let root = match options.jail {
            Jail::On => Root::Empty,
            Jail::Off => Root::Kept,
        };
        let (identity, anchor) = identities.enter(root, |uid, gid| {
            if let Some(groups) = &groups {
                groups.give_to(uid, gid).map_err(std::io::Error::other)?;
            }
            run_dir.give_to(uid, gid)
        })?;
        binaries.run_as(identity);
        nix::sys::prctl::set_no_new_privs()
            .map_err(|e| Failure::host("cannot give up new privileges").because(&e))?;
        if let Some(saved) = &saved {
            terminal::make_raw(saved);
        }
        let helpers = describe_helpers(&reaper, connector.as_ref(), &holders);
        let connector = connector.map(|connector| connector.socket);
        let running = spawn::spawn(&plan, inputs, binaries, Ends { clients, connector })?;
        drop(anchor);
        let mut state = describe(&plan, &running, helpers, identity, launched_ns);
        save_state(&run_dir, &state);
        let guards = holders
            .iter()
            .map(|holder| (holder.pid, "holder of a network namespace"))
            .chain([(reaper.pid, "reaper")])
            .collect();
        let grace = Duration::from_secs(spec.power_off_grace.into());
        let spawner = supervise::Spawner::new(running, guards, signals, grace);
        let code = spawner.serve(&mut |event| {
            match event {
                supervise::Event::Running {
                    started_ns,
                    first_instruction_ns,
                } => {
                    state.machine_started_ns = Some(started_ns);
                    state.first_instruction_ns = Some(first_instruction_ns);
                }
                supervise::Event::Forked(pid) => {
                    let forker = unjailed("forker", ProcessRole::Forker, pid);
                    state.processes.push(forker);
                }
                supervise::Event::Respawned { predecessor, pid } => {
                    let of = |process: &&mut ProcessState| process.pid == predecessor.as_raw();
                    if let Some(process) = state.processes.iter_mut().find(of) {
                        process.pid = pid.as_raw();
                    }
                }
                supervise::Event::Signalled(pid, signal, why) => {
                    let process = state.processes.iter().find(|p| p.pid == pid.as_raw());
                    if obituary.write(process, signal) == Known::OutOfMemory {
                        *why = ExitStatus::OutOfMemory;
                    }
                    return;
                }
                supervise::Event::Happened(event) => return note(&run_dir, &event),
            }
            save_state(&run_dir, &state);
        });
        state.ended_ns = Some(monotonic_ns());
        state.exit_code = Some(code);
        save_state(&run_dir, &state);
        Ok(code)
    })();
    if let Some(saved) = &saved {
        terminal::restore(saved);
    }
    if !reaper.dismiss() {
        run_dir.remove();
    }
    result
}

fn default_name() -> String {
    format!("vm-{}", getpid())
}

fn make_plan(
    spec: &VmSpec,
    name: &str,
    devices: &[machine::Device],
    options: &Options,
    inputs: &Inputs,
    raw_terminal: bool,
) -> Plan {
    let chains = inputs.backends.iter().map(|backend| match backend {
        BackendInput::Images(images) => images.layers.iter().map(|layer| layer.format).collect(),
        _ => Vec::new(),
    });
    let choices = Choices {
        jail: options.jail,
        seccomp: match options.jail {
            Jail::On => options.seccomp,
            Jail::Off => SeccompMode::Off,
        },
        log_level: &options.log_level,
        log_json: options.log_json,
        has_input: terminal::has_input(),
        raw_terminal,
        chains: chains.collect(),
    };
    plan::plan(spec, name, devices, &choices)
}

/// The VM's groups with its limits; `None` where the spec limits nothing.
fn make_groups(
    spec: &VmSpec,
    place: Option<Place>,
    plan: &Plan,
    inputs: &Inputs,
) -> Result<Option<Rc<Groups>>, Failure> {
    if spec.limits.core_scheduling {
        share_cores_within().map_err(|e| {
            Failure::host("limits.core-scheduling: the kernel refuses it")
                .because(&e)
                .hint("it needs a kernel with CONFIG_SCHED_CORE, and cores with siblings")
        })?;
    }
    let Some(place) = place else { return Ok(None) };
    let processes = plan.workers.iter().chain([&plan.supervisor]);
    let children: Vec<_> = processes
        .map(|process| {
            (
                process.name.clone(),
                process.image_device().and_then(|n| inputs.disk_of(n)),
            )
        })
        .collect();
    let groups = Groups::make(place, &spec.limits, &children).map_err(no_limits)?;
    Ok(Some(Rc::new(groups)))
}

fn no_limits(error: CgroupError) -> Failure {
    let hint = match error {
        CgroupError::Shared(_) | CgroupError::File(..) => {
            "systemd-run --user --scope -p Delegate=yes bulkhead run ... gives it a group of its own"
        }
        CgroupError::InUse(_) => "give another name, or end that VM first",
        CgroupError::None | CgroupError::Controller { .. } => {
            "bulkhead doctor says what the host offers; without [limits] none are needed"
        }
    };
    Failure::host("limits: cannot be kept").because(&error).hint(hint)
}

/// As [`save_state`].
fn note(run_dir: &RunDir, event: &VmEvent) {
    if let Err(error) = run_dir.write_event(event) {
        eprintln!("bulkhead: cannot write {}: {error}", events::FILE_NAME);
    }
}

/// The state is for others to read: a full disk does not end the VM.
fn save_state(run_dir: &RunDir, state: &RunState) {
    if let Err(error) = run_dir.write_state(state) {
        eprintln!(
            "bulkhead: cannot write {}: {error}",
            run_dir.path().join(run_state::FILE_NAME).display()
        );
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

/// The processes that are no part of the plan.
fn describe_helpers(
    reaper: &Reaper,
    connector: Option<&Connector>,
    holders: &[net::Holder],
) -> Vec<ProcessState> {
    let mut processes = vec![
        unjailed("spawner", ProcessRole::Spawner, getpid()),
        unjailed("reaper", ProcessRole::Reaper, reaper.pid),
    ];
    let connector = connector.map(|connector| connector.pid);
    processes.extend(connector.map(|pid| unjailed("connector", ProcessRole::Connector, pid)));
    for holder in holders {
        processes.push(unjailed("netns", ProcessRole::NetNamespace, holder.pid));
    }
    processes
}

fn describe(
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
        spawned_ns: monotonic_ns(),
        machine_started_ns: None,
        first_instruction_ns: None,
        ended_ns: None,
        exit_code: None,
    }
}
