//! Carrying a plan out: sockets and pipes, the vmm's first message, and the processes.

use super::Jail;
use super::identity::Settled;
use super::inputs::{BackendInput, Inputs};
use super::net::{self, Holder};
use super::plan::{Plan, ProcessPlan, Source};
use super::respawn::Respawner;
use super::watch::Watch;
use crate::audit::wall::Removed;
use crate::failure::Failure;
use crate::inherit::set_nonblocking;
use crate::sandbox::cgroup::Groups;
use crate::sandbox::child::{self, Child, Parent, Program, Starting};
use crate::sandbox::{SeccompMode, SpawnError, Step, most_open_files};
use crate::wire::send_message;
use nix::fcntl::OFlag;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::pipe2;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use vm_spec::control::{BACKEND_FDS, ToVmm};
use vm_spec::run_state::ProcessRole;
use vm_spec::supervise::ToSupervisor;

/// A VM's processes, running.
pub(crate) struct Running {
    /// In the order of [`Plan::workers`].
    pub(crate) workers: Vec<Child>,
    pub(crate) supervisor: Child,
    /// The spawner's end of the socket to the supervisor.
    pub(crate) control: OwnedFd,
    /// For successors of device processes.
    pub(crate) respawner: Respawner,
}

/// Our binaries, opened.
pub(crate) struct Binaries {
    files: BTreeMap<&'static str, (PathBuf, File)>,
    /// Where their processes are born, if they are limited.
    groups: Option<Rc<Groups>>,
    guest_memory: u64,
    seccomp: SeccompMode,
    /// Walls that are left out.
    removed: Removed,
    /// Who their processes become.
    identity: Settled,
    /// `/proc`, for their id maps.
    proc: OwnedFd,
}

impl Binaries {
    /// Opens those that `plan` executes, beside our own (or in BULKHEAD_BIN_DIR).
    pub(crate) fn open(plan: &Plan, groups: Option<Rc<Groups>>) -> Result<Self, Failure> {
        let identity = Settled::Own;
        let folder = binary_folder()?;
        let mut all = BTreeMap::new();
        for process in plan.processes() {
            all.insert(process.binary, open_binary(&folder, process.binary)?);
        }
        let proc = child::open_proc().map_err(|e| Failure::host("cannot open /proc").because(&e))?;
        Ok(Self {
            files: all,
            proc,
            groups,
            guest_memory: plan.vm.memory,
            seccomp: plan.seccomp,
            removed: match plan.jail {
                Jail::On => Removed::NONE,
                Jail::Off => Removed::ALL,
            },
            identity,
        })
    }

    /// From here on each of their processes becomes who `identity` says.
    pub(crate) fn run_as(&mut self, identity: Settled) {
        self.identity = identity;
    }

    /// What becomes of forbidden system calls.
    pub(crate) fn seccomp(&self) -> SeccompMode {
        self.seccomp
    }

    /// The numbers of all that making a process takes.
    pub(crate) fn descriptors(&self) -> Vec<RawFd> {
        let files = self.files.values().map(|(_, file)| file.as_raw_fd());
        let groups = self.groups.iter().flat_map(|groups| groups.descriptors());
        files.chain(groups).chain([self.proc.as_raw_fd()]).collect()
    }

    /// The one that `process` executes.
    pub(crate) fn of(&self, process: &ProcessPlan) -> BorrowedFd<'_> {
        self.files[process.binary].1.as_fd()
    }
}

/// One of our binaries.
pub(super) fn open_binary(folder: &Path, name: &str) -> Result<(PathBuf, File), Failure> {
    let path = folder.join(name);
    match File::open(&path) {
        Ok(file) => Ok((path, file)),
        Err(e) => Err(Failure::host(format!("cannot open {}", path.display()))
            .because(&e)
            .hint("install all of Bulkhead's binaries in one folder")),
    }
}

/// The folder of our own binary, or BULKHEAD_BIN_DIR.
pub(crate) fn binary_folder() -> Result<PathBuf, Failure> {
    match std::env::var_os("BULKHEAD_BIN_DIR") {
        Some(folder) => Ok(PathBuf::from(folder)),
        None => std::env::current_exe()
            .ok()
            .and_then(|path| path.parent().map(PathBuf::from))
            .ok_or_else(|| Failure::host("cannot find the folder of this program")),
    }
}

/// Our binaries that a VM may need.
const NAMES: [&str; 4] = [
    "bulkhead-vmm",
    "bulkhead-supervisor",
    "vhost-user-blk",
    "vhost-user-net",
];

/// Those that are installed.
pub(crate) fn installed() -> Vec<PathBuf> {
    let folder = binary_folder().unwrap_or_default();
    let paths = NAMES.into_iter().map(|name| folder.join(name));
    paths.filter(|path| path.exists()).collect()
}

/// All of our binaries that cannot be opened, and why.
pub(crate) fn unopened() -> Vec<String> {
    let folder = binary_folder().unwrap_or_default();
    let paths = NAMES
        .into_iter()
        .chain([super::image::BINARY])
        .map(|name| folder.join(name));
    let failed = |path: PathBuf| Some(format!("{}: {}", path.display(), File::open(&path).err()?));
    paths.filter_map(failed).collect()
}

/// The supervisor's ends of what others hold already.
pub(crate) struct Ends {
    /// Where clients connect.
    pub(crate) clients: OwnedFd,
    /// The socket to the connector.
    pub(crate) connector: Option<OwnedFd>,
}

/// Makes every process. The supervisor's first message comes last, when it can tell the others' ids.
pub(crate) fn spawn(plan: &Plan, inputs: Inputs, binaries: Binaries, ends: Ends) -> Result<Running, Failure> {
    let mut fds = Wires::make(plan, inputs)
        .map_err(|e| Failure::host("cannot make the sockets between the processes").because(&e))?;
    fds.table.insert(Source::Clients, ends.clients);
    fds.table.extend(ends.connector.map(|fd| (Source::Connector, fd)));
    let first = ToVmm::Start(Box::new(plan.vm.clone()));
    send_message(fds.get(Source::VmmControl).as_fd(), 1, first)
        .map_err(|e| Failure::host("cannot write the vmm's first message").because(&e))?;
    // The vmm has most to do, then the supervisor, which shows the guest's first byte. Nobody is
    // waited for until all are on their way.
    let start = |place, process, fds: &Wires| {
        begin(
            (place, process),
            &|source| fds.get(source).as_fd(),
            &binaries,
            binaries.of(process),
            Parent::Caller,
        )
    };
    let numbered = || (0..).zip(&plan.workers);
    let mut starting = BTreeMap::new();
    if let Some(vmm) = plan.workers.first() {
        starting.insert(0, start(0, vmm, &fds)?);
    }
    let supervisor = start(plan.workers.len(), &plan.supervisor, &fds)?;
    // Then the disks, while TAPs are being made.
    for (place, worker) in numbered().skip(1).filter(|(_, worker)| fds.has_all(worker)) {
        starting.insert(place, start(place, worker, &fds)?);
    }
    fds.receive_taps()?;
    for (place, worker) in numbered() {
        if let Entry::Vacant(entry) = starting.entry(place) {
            entry.insert(start(place, worker, &fds)?);
        }
    }
    let mut supervision = plan.supervision.clone();
    for (process, child) in supervision.processes.iter_mut().zip(starting.values()) {
        process.pid = child.pid().as_raw();
    }
    let config = ToSupervisor::Start(Box::new(supervision));
    let control = fds.spawner;
    let respawner = Respawner::keep(plan, fds.table, fds.watches, binaries);
    send_message(control.as_fd(), 1, config)
        .map_err(|e| Failure::host("cannot write the supervisor's first message").because(&e))?;
    // The last first: to be woken by each as it begins would take the processor from it.
    let supervisor = supervisor
        .finish()
        .map_err(|e| not_started(&plan.supervisor, e))?;
    let mut workers = plan
        .workers
        .iter()
        .zip(starting.into_values())
        .rev()
        .map(|(worker, child)| child.finish().map_err(|e| not_started(worker, e)))
        .collect::<Result<Vec<_>, _>>()?;
    workers.reverse();
    Ok(Running {
        workers,
        supervisor,
        control,
        respawner,
    })
}

/// Starts `process`, which is at `place` among the workers or behind them, with the descriptors that
/// `lookup` finds.
pub(crate) fn begin<'a>(
    (place, process): (usize, &ProcessPlan),
    lookup: &dyn Fn(Source) -> BorrowedFd<'a>,
    binaries: &'a Binaries,
    binary: BorrowedFd<'a>,
    parent: Parent,
) -> Result<Starting, Failure> {
    let arguments = [process.binary]
        .into_iter()
        .chain(process.arguments.iter().map(String::as_str))
        .map(CString::new)
        .collect::<Result<_, _>>()
        .map_err(|e| Failure::usage(format!("{}: zero byte", process.name)).because(&e))?;
    let cgroup = match &binaries.groups {
        Some(groups) => Some(groups.of(place).ok_or_else(|| {
            Failure::host(format!("cannot start {}", process.name)).cause("there is no cgroup for it")
        })?),
        None => None,
    };
    let program = Program {
        binary,
        arguments,
        descriptors: process.descriptors.iter().map(|fd| lookup(fd.source)).collect(),
        proc: binaries.proc.as_fd(),
        // Where there are ids for a VM, the spawner is in its empty root.
        rooted: binaries.identity != Settled::Own && binaries.removed == Removed::NONE,
        cgroup,
        address_space: address_space(process.role, binaries.guest_memory),
        open_files: most_open_files(process.jailed_role()),
        startup: process.startup(),
        seccomp: binaries.seccomp,
        identity: binaries.identity.of(place),
        parent,
    };
    child::start_without(&program, binaries.removed).map_err(|e| not_started(process, e))
}

/// What a process may map: the guest's memory, a device process twice, since a front end's new table
/// comes before the old one goes, and room for itself.
pub(crate) fn address_space(role: ProcessRole, guest_memory: u64) -> u64 {
    const ROOM: u64 = 4 << 30;
    let tables = match role {
        ProcessRole::Vmm => 1,
        role if role.is_device() => 2,
        _ => 0,
    };
    guest_memory.saturating_mul(tables).saturating_add(ROOM)
}

fn not_started(process: &ProcessPlan, error: SpawnError) -> Failure {
    let hint = match &error {
        SpawnError::Clone(_) | SpawnError::Child(Step::Namespaces | Step::IdMaps | Step::Root, _) => {
            "this needs user namespaces: bulkhead doctor tells what is missing"
        }
        SpawnError::Child(Step::Execute, _) => {
            "in an empty root only a static binary runs: build for x86_64-unknown-linux-musl"
        }
        _ => "run with --dry-run to see what would run",
    };
    Failure::host(format!("cannot start {} ({})", process.name, process.binary))
        .because(&error)
        .hint(hint)
}

/// Every descriptor of the plan, and the spawner's own end.
struct Wires {
    table: BTreeMap<Source, OwnedFd>,
    spawner: OwnedFd,
    /// The TAPs that are being made, by device.
    coming_taps: Vec<(usize, Holder)>,
    /// What watches the files of disks, by device.
    watches: BTreeMap<usize, Vec<Watch>>,
}

impl Wires {
    fn get(&self, source: Source) -> &OwnedFd {
        &self.table[&source]
    }

    /// Whether `process` lacks no descriptor.
    fn has_all(&self, process: &ProcessPlan) -> bool {
        let has = |source| self.table.contains_key(&source);
        process.descriptors.iter().all(|fd| has(fd.source))
    }

    fn make(plan: &Plan, inputs: Inputs) -> std::io::Result<Self> {
        let mut table = BTreeMap::new();
        let mut coming_taps = Vec::new();
        let mut watches = BTreeMap::new();
        table.insert(Source::Null, inputs.null);
        table.insert(Source::Stderr, std::io::stderr().as_fd().try_clone_to_owned()?);
        table.insert(Source::Input, std::io::stdin().as_fd().try_clone_to_owned()?);
        table.insert(Source::Output, std::io::stdout().as_fd().try_clone_to_owned()?);
        let (spawner, supervisor) = pair(SockType::SeqPacket)?;
        table.insert(Source::SpawnerControl, supervisor);
        let (supervisor, vmm) = pair(SockType::SeqPacket)?;
        table.insert(Source::VmmControl, supervisor);
        table.insert(Source::SupervisorControl, vmm);
        let (person, guest) = pair(SockType::Stream)?;
        set_nonblocking(person.as_fd())?;
        set_nonblocking(guest.as_fd())?;
        table.insert(Source::ConsolePerson, person);
        table.insert(Source::ConsoleGuest, guest);
        for n in 0..plan.workers.len() {
            let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
            set_nonblocking(read.as_fd())?;
            table.insert(Source::LogRead(n), read);
            table.insert(Source::LogWrite(n), write);
        }
        table.insert(Source::Kvm, inputs.kvm);
        table.insert(Source::Kernel, inputs.kernel);
        table.extend(inputs.initrd.map(|fd| (Source::Initrd, fd)));
        for (n, backend) in inputs.backends.into_iter().enumerate() {
            let (requests, peer) = pair(SockType::Stream)?;
            table.insert(Source::Requests(n), requests);
            table.insert(Source::RequestsPeer(n), peer);
            let is_ours = !matches!(backend, BackendInput::Socket(_));
            let given = backend.give(n, &mut table);
            if !is_ours {
                continue;
            }
            coming_taps.extend(given.making.map(|holder| (n, holder)));
            watches.insert(n, given.watches);
            let (front, back) = pair(SockType::Stream)?;
            table.insert(Source::FrontEnd(n), front);
            table.insert(Source::BackEnd(n), back);
            let (device, supervisor) = pair(SockType::Stream)?;
            table.insert(Source::Orders(n), device);
            table.insert(Source::OrdersPeer(n), supervisor);
        }
        Ok(Self {
            table,
            spawner,
            coming_taps,
            watches,
        })
    }

    /// Waits for the TAPs that are being made.
    fn receive_taps(&mut self) -> Result<(), Failure> {
        for (n, holder) in std::mem::take(&mut self.coming_taps) {
            let taps = holder.receive().map_err(|e| net::not_made(&holder.field, &e))?;
            self.table.extend(tap_sources(n, taps));
        }
        Ok(())
    }
}

/// The descriptors of device `n`'s TAP.
pub(super) fn tap_sources(n: usize, taps: Vec<OwnedFd>) -> impl Iterator<Item = (Source, OwnedFd)> {
    let number = move |(queue, tap)| (Source::Tap(n, queue), tap);
    taps.into_iter().enumerate().map(number)
}

pub(crate) fn pair(kind: SockType) -> nix::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
}

/// What the vmm is given of a back end: its end of the vhost-user `socket`, and both ends of a new channel for the
/// back end's own requests. What one does to its channel is no other's.
pub(crate) fn of_back_end(socket: OwnedFd) -> nix::Result<[OwnedFd; BACKEND_FDS]> {
    let (requests, peer) = pair(SockType::Stream)?;
    Ok([socket, requests, peer])
}
