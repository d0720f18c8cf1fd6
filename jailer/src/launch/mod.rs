//! `bulkhead run`: from a spec to an exit code.
//!
//! ```text
//!   machine (check) -> reaper -> inputs (open) -> plan -> spawn -> supervise
//! ```

pub(crate) mod attach;
mod chain;
mod children;
mod connect;
mod connector;
mod disk;
mod forker;
pub(crate) mod identity;
pub(crate) mod image;
mod inputs;
mod kernel;
pub(crate) mod kvm;
mod look;
mod machine;
pub(crate) mod net;
mod notify;
mod obituary;
pub(crate) mod plan;
pub(crate) mod probe;
mod qcow2;
mod reaper;
mod record;
mod respawn;
mod run_dir;
pub(crate) mod signals;
pub(crate) mod spawn;
pub(crate) mod supervise;
pub(crate) mod terminal;
mod watch;

#[cfg(feature = "fuzzing")]
#[path = "../../fuzz/launch.rs"]
pub(crate) mod fuzz;

use crate::failure::Failure;
use crate::sandbox::MAX_OPEN_FILES;
use crate::sandbox::cgroup::{CgroupError, Groups, Place};
use crate::sandbox::{Anchor, Root, SeccompMode, share_cores_within};
use crate::tell::{name_vm, tell};
use connector::Connector;
use identity::{Identities, Settled};
use inputs::Inputs;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signalfd::SignalFd;
use nix::unistd::{Pid, getpid};
use notify::Notify;
use obituary::Obituary;
use plan::{Choices, Plan};
use reaper::Reaper;
use record::Record;
use run_dir::RunDir;
use spawn::Ends;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use supervise::Event;
use terminal::Saved;
use vm_spec::spec::{ImageFormat, VmSpec};

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

/// The run-time folders of this user's VMs; also of some that are over.
///
/// # Errors
/// A [`Failure`] when someone else could have made them.
pub fn run_folders() -> Result<Vec<PathBuf>, Failure> {
    run_dir::all()
}

/// Where those folders are looked for; new ones go to the first.
pub fn run_places() -> [PathBuf; 2] {
    run_dir::places()
}

/// What keeps `folder`, as XDG_RUNTIME_DIR, from being where this user's VMs are, if something does.
pub(crate) fn no_runtime_dir(folder: &std::path::Path) -> Option<&'static str> {
    run_dir::no_runtime_dir(folder, nix::unistd::geteuid())
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

/// What `bulkhead run --dry-run` prints. Looks at what the spec names, changes and runs nothing.
///
/// # Errors
/// Any [`Failure`] of [`run`]'s that can be seen without doing what it does.
pub fn dry_run(spec: &VmSpec, options: &Options) -> Result<String, Failure> {
    let (name, mut devices) = machine::check(spec, &default_name())?;
    net::choose_servers(&mut devices);
    let chains = look::look(spec, &devices)?;
    let plan = make_plan(spec, &name, &devices, options, chains, false)?;
    let folder = spawn::binary_folder()?;
    for process in plan.processes() {
        spawn::open_binary(&folder, process.binary)?;
    }
    let identity = identity::describe(&spawn::installed());
    Ok(plan.describe(&identity))
}

/// Runs a VM to its end and returns the exit code. The calling process must have one thread.
///
/// # Errors
/// A [`Failure`] when it could not be started.
pub fn run(spec: &VmSpec, options: &Options, launched_ns: u64) -> Result<u8, Failure> {
    let (name, mut devices) = machine::check(spec, &default_name())?;
    name_vm(&name);
    net::choose_servers(&mut devices);
    if options.jail == Jail::Off {
        tell(format_args!(
            "bulkhead: warning: --jail=off: nothing is around a process that is broken into"
        ));
    } else {
        warn_of(options.seccomp);
    }
    let Ground {
        run_dir,
        place,
        identities,
    } = Ground::claim(spec, &name)?;
    terminal::never_wait();
    let saved = terminal::save();
    let signals = signals::block_signals().map_err(|e| Failure::host("cannot take signals").because(&e))?;
    // The confined spawner removes the run-time folder at most.
    let removes_all = identities.keep_paths() && place.is_none();
    let reaper = Reaper::start(&run_dir, saved.as_ref(), place.as_ref(), removes_all)
        .map_err(|e| Failure::host("cannot start the reaper").because(&e))?;
    let notify = Notify::connect();
    let launch = Launch {
        spec,
        options,
        name: &name,
        devices: &devices,
        run_dir: &run_dir,
        reaper: reaper.pid,
        saved: saved.as_ref(),
        launched_ns,
    };
    let result = launch
        .start(place, identities)
        .map(|started| started.serve(reaper.pid, signals, &notify));
    if let Some(saved) = &saved {
        terminal::restore(saved);
    }
    if !reaper.dismiss() {
        run_dir.remove();
    }
    result
}

/// Says what `--seccomp` lets pass.
pub(crate) fn warn_of(mode: SeccompMode) {
    if let Some(warning) = mode.warning() {
        tell(format_args!("bulkhead: warning: --seccomp={mode}: {warning}"));
    }
}

/// What mends [`too_few_open_files`].
pub(crate) const MORE_OPEN_FILES: &str = "ulimit -Hn 1024, or LimitNOFILE=1024 of a service";

/// That this process may not open as many files as a jailed process has numbers for, if so.
pub(crate) fn too_few_open_files() -> Option<String> {
    let needed = MAX_OPEN_FILES + 1;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    (hard < needed).then(|| format!("the limit on open files is {hard}, and {needed} are needed"))
}

/// Whoever keeps the images of long chains has more open files than a usual soft limit lets it.
fn raise_open_files() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // Where it fails, what does not fit is refused.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// What a VM is given before any other process is made.
struct Ground {
    run_dir: RunDir,
    /// Where its groups will be, if it is limited: all processes are in them.
    place: Option<Place>,
    identities: Identities,
}

impl Ground {
    fn claim(spec: &VmSpec, name: &str) -> Result<Self, Failure> {
        if let Some(too_few) = too_few_open_files() {
            return Err(Failure::host(too_few).hint(MORE_OPEN_FILES));
        }
        raise_open_files();
        let identities = || Identities::begin(&spawn::installed());
        if spec.limits.controllers().is_empty() {
            // As early as can be: a user's range takes longer to get than all that comes before its use.
            let identities = identities()?;
            return Ok(Self {
                run_dir: run_dir::create(name)?,
                place: None,
                identities,
            });
        }
        let run_dir = run_dir::create(name)?;
        // There is no reaper yet.
        let place = Place::find(name).and_then(Place::claim);
        let place = place.map_err(no_limits).inspect_err(|_| run_dir.remove())?;
        match identities() {
            Ok(identities) => Ok(Self {
                run_dir,
                place: Some(place),
                identities,
            }),
            Err(failure) => {
                place.remove();
                run_dir.remove();
                Err(failure)
            }
        }
    }
}

/// A launch that has a reaper.
struct Launch<'a> {
    spec: &'a VmSpec,
    options: &'a Options,
    name: &'a str,
    devices: &'a [machine::Device],
    run_dir: &'a RunDir,
    reaper: Pid,
    saved: Option<&'a Saved>,
    launched_ns: u64,
}

/// A VM whose processes are made.
struct Started<'a> {
    running: spawn::Running,
    record: Record<'a>,
    /// Their namespaces end with these, of which each is for one NIC.
    holders: Vec<(String, net::Holder)>,
    grace: Duration,
}

impl<'a> Launch<'a> {
    /// Opens everything, becomes who the VM's spawner is, and makes the processes.
    fn start(&self, place: Option<Place>, identities: Identities) -> Result<Started<'a>, Failure> {
        // Before anything that it need not hold is opened.
        let (relays, connectors) = net::line::make(self.devices)
            .map_err(|e| Failure::host("cannot make the sockets between the processes").because(&e))?;
        let connector = Connector::start(self.devices, connectors)
            .map_err(|e| Failure::host("cannot start the connector").because(&e))?;
        let mut inputs = inputs::open(self.spec, self.devices, self.options, relays)?;
        inputs.begin_captures(self.devices)?;
        inputs.make_links(self.run_dir, self.devices)?;
        let named = |(device, holder): (usize, _)| (self.devices[device].id.clone(), holder);
        let holders: Vec<_> = inputs.holders().into_iter().map(named).collect();
        let raw = self.saved.is_some();
        let chains = inputs.chains();
        let plan = make_plan(self.spec, self.name, self.devices, self.options, chains, raw)?;
        let clients = self
            .run_dir
            .listen()
            .map_err(|e| Failure::host("cannot make the VM's control socket").because(&e))?;
        let groups = make_groups(self.spec, place, &plan, &inputs)?;
        let mut binaries = spawn::Binaries::open(&plan, groups.clone())?;
        let obituary = Obituary::begin(&plan, groups.clone());
        let (identity, anchor) = self.become_spawner(identities, groups.as_deref())?;
        binaries.run_as(identity);
        nix::sys::prctl::set_no_new_privs()
            .map_err(|e| Failure::host("cannot give up new privileges").because(&e))?;
        if let Some(saved) = self.saved {
            terminal::make_raw(saved);
        }
        let helpers = record::helpers(self.reaper, connector.as_ref(), &holders);
        let connector = connector.map(|connector| connector.socket);
        let running = spawn::spawn(&plan, inputs, binaries, Ends { clients, connector })?;
        drop(anchor);
        let who = record::Who {
            identity,
            jailed: plan.jail == Jail::On,
        };
        let state = record::describe(&plan, &running, helpers, identity, self.launched_ns);
        Ok(Started {
            running,
            record: Record::begin(self.run_dir, state, obituary, who),
            holders,
            grace: Duration::from_secs(self.spec.power_off_grace.into()),
        })
    }

    fn become_spawner(
        &self,
        identities: Identities,
        groups: Option<&Groups>,
    ) -> Result<(Settled, Option<Anchor>), Failure> {
        let root = match self.options.jail {
            Jail::On => Root::Empty,
            Jail::Off => Root::Kept,
        };
        identities.enter(root, |uid, gid| {
            if let Some(groups) = groups {
                groups.give_to(uid, gid).map_err(std::io::Error::other)?;
            }
            self.run_dir.give_to(uid, gid)
        })
    }
}

impl Started<'_> {
    /// Serves until the VM is over; its exit code.
    fn serve(mut self, reaper: Pid, signals: SignalFd, notify: &Notify) -> u8 {
        let guards = self
            .holders
            .iter()
            .map(|(_, holder)| (holder.pid, "holder of a network namespace"))
            .chain([(reaper, "reaper")])
            .collect();
        let spawner = supervise::Spawner::new(self.running, guards, signals, self.grace);
        let code = spawner.serve(&mut |mut event| {
            match &mut event {
                Event::Running { .. } => notify.ready(),
                Event::Ending => notify.stopping(),
                Event::Removed { name, holder } => {
                    let its = self.holders.iter().position(|(nic, _)| nic == name);
                    **holder = its.map(|at| self.holders.swap_remove(at).1.pid);
                }
                _ => {}
            }
            self.record.note(event);
        });
        self.record.end(code);
        code
    }
}

fn default_name() -> String {
    format!("vm-{}", getpid())
}

fn make_plan(
    spec: &VmSpec,
    name: &str,
    devices: &[machine::Device],
    options: &Options,
    chains: Vec<Vec<ImageFormat>>,
    raw_terminal: bool,
) -> Result<Plan, Failure> {
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
        chains,
        cmdline: machine::cmdline(&spec.boot)?,
    };
    Ok(plan::plan(spec, name, devices, &choices))
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
    let children = plan.processes().map(|process| {
        let disk = process.image_device().and_then(|n| inputs.disk_of(n));
        (process.name.clone(), disk)
    });
    // No process has such a name.
    let later = (0..plan.most_attached()).map(|n| (format!("attached+{n}"), None));
    let children: Vec<_> = children.chain(later).collect();
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
