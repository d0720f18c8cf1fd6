//! What will run: each process, its arguments, and each of its descriptors. Pure data, which
//! `--dry-run` prints and `spawn` carries out.

pub(super) mod device;
pub(crate) mod print;
mod supervisor;
mod vmm;

use super::Jail;
use super::machine::Device;
use crate::sandbox::{Role, SeccompMode};
use vm_spec::control::{FdNumber, VmConfig};
use vm_spec::run_state::{FdLink, FdState, Kept, MadeFds, ProcessRole};
use vm_spec::spec::{ImageFormat, VmSpec};
use vm_spec::supervise::SupervisorConfig;

/// Where a descriptor comes from. Devices and processes are counted from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Source {
    Null,
    /// The launcher's standard error.
    Stderr,
    /// The person's terminal or pipe.
    Input,
    Output,
    /// Write and read end of a process's log pipe.
    LogWrite(usize),
    LogRead(usize),
    /// The supervisor's end of the socket to the spawner.
    SpawnerControl,
    /// The supervisor's and the vmm's ends of the socket between them.
    VmmControl,
    SupervisorControl,
    /// The supervisor's and the vmm's ends of the console.
    ConsolePerson,
    ConsoleGuest,
    /// Where other commands of the VM's owner connect.
    Clients,
    /// The supervisor's end of the socket to the connector.
    Connector,
    /// Descriptor `1` of a process that was added at this place.
    Added(usize, i32),
    Kvm,
    Kernel,
    Initrd,
    /// The vmm's and the device process's ends of a device's vhost-user socket.
    FrontEnd(usize),
    BackEnd(usize),
    /// The vmm's end of the channel for the own requests of a device's first back end, and the end that the
    /// vmm gives to that.
    Requests(usize),
    RequestsPeer(usize),
    /// A layer of a device's image chain, the top first.
    Image(usize, usize),
    /// A device's image once more, past the page cache.
    DirectImage(usize),
    /// The passphrase of a device's image.
    Key(usize),
    /// The external data file of a device's image.
    DataFile(usize),
    /// A device process's and the supervisor's ends of the socket for orders.
    Orders(usize),
    OrdersPeer(usize),
    /// A queue of a NIC's TAP.
    Tap(usize, usize),
    /// Orders for a NIC's link.
    Link(usize),
    /// What a NIC's process leaves for its successor.
    NicState(usize),
    /// A NIC's capture.
    Pcap(usize),
}

/// One process.
#[derive(Clone, Debug)]
pub(crate) struct ProcessPlan {
    pub(crate) name: String,
    pub(crate) role: ProcessRole,
    pub(crate) binary: &'static str,
    pub(crate) arguments: Vec<String>,
    /// The one at index N becomes descriptor N.
    pub(crate) descriptors: Vec<Descriptor>,
    /// What else it holds while the guest runs.
    pub(crate) made: Vec<MadeFds>,
}

/// A descriptor that a process is executed with.
#[derive(Clone, Debug)]
pub(crate) struct Descriptor {
    pub(crate) source: Source,
    pub(crate) what: String,
    pub(crate) kept: Kept,
}

impl ProcessPlan {
    /// Whose system call filter it starts under.
    pub(crate) fn startup(&self) -> Role {
        match self.role {
            ProcessRole::Disk => Role::StartupRing,
            _ => Role::Startup,
        }
    }

    /// Its role at lockdown.
    pub(crate) fn jailed_role(&self) -> Role {
        match self.role {
            ProcessRole::Disk => Role::Disk,
            ProcessRole::Net => Role::Net,
            ProcessRole::Vmm => Role::Vmm,
            _ => Role::Supervisor,
        }
    }

    /// The device whose image it is given.
    pub(crate) fn image_device(&self) -> Option<usize> {
        self.descriptors.iter().find_map(|given| match given.source {
            Source::Image(device, 0) => Some(device),
            _ => None,
        })
    }

    /// Its arguments, but for those that `choices` give every device process, which come last.
    pub(crate) fn own_arguments(&self, choices: &Choices<'_>) -> Vec<String> {
        let own = self
            .arguments
            .len()
            .saturating_sub(choices.device_arguments().len());
        self.arguments.iter().take(own).cloned().collect()
    }

    pub(crate) fn fd_states(&self) -> Vec<FdState> {
        (0..)
            .zip(&self.descriptors)
            .map(|(number, fd)| FdState {
                number,
                what: fd.what.clone(),
                kept: fd.kept,
            })
            .collect()
    }
}

/// A VM's processes: the vmm first, then one for each device of ours; the supervisor last.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) name: String,
    pub(crate) jail: Jail,
    pub(crate) seccomp: SeccompMode,
    pub(crate) workers: Vec<ProcessPlan>,
    /// Flags of every device process.
    pub(crate) common: Vec<String>,
    pub(crate) supervisor: ProcessPlan,
    pub(crate) vm: VmConfig,
    /// With the workers' process ids still 0.
    pub(crate) supervision: SupervisorConfig,
}

impl Plan {
    /// Each at its place: whose id it has among the VM's, and whose cgroup.
    pub(crate) fn processes(&self) -> impl Iterator<Item = &ProcessPlan> {
        self.workers.iter().chain([&self.supervisor])
    }

    /// How many processes devices that are attached may need behind those: each slot's device has one at most, and
    /// the places of the plan's own are free again where those were detached.
    pub(crate) fn most_attached(&self) -> usize {
        let devices = self.workers.iter().filter(|worker| worker.role.is_device());
        match self.vm.spares.len() {
            0 => 0,
            spares => (self.vm.devices.len() + spares).saturating_sub(devices.count()),
        }
    }
}

/// What a plan depends on beside the spec.
pub(crate) struct Choices<'a> {
    pub(crate) jail: Jail,
    pub(crate) seccomp: SeccompMode,
    pub(crate) log_level: &'a str,
    pub(crate) log_json: bool,
    pub(crate) has_input: bool,
    /// Input is a terminal, put into raw mode.
    pub(crate) raw_terminal: bool,
    /// For each device the formats of its image chain, the top first; empty where it has none.
    pub(crate) chains: Vec<Vec<ImageFormat>>,
    /// The kernel command line, with the command that the guest is to run.
    pub(crate) cmdline: String,
}

impl Choices<'_> {
    fn common_arguments(&self) -> [String; 2] {
        [
            format!("--seccomp={}", self.seccomp),
            format!("--log-level={}", self.log_level),
        ]
    }

    /// Those of a device's process.
    fn device_arguments(&self) -> Vec<String> {
        let mut arguments = self.common_arguments().to_vec();
        arguments.push(self.log_format());
        arguments
    }

    fn log_format(&self) -> String {
        format!("--log-format={}", if self.log_json { "json" } else { "human" })
    }
}

/// A process's descriptors, numbered as they are added.
struct Table(Vec<Descriptor>);

impl Table {
    fn new(log: Source) -> Self {
        let what = if log == Source::Stderr {
            "standard error of bulkhead"
        } else {
            "log pipe (write end)"
        };
        let mut table = Self(Vec::new());
        table.add(Source::Null, "/dev/null");
        table.add(log, what);
        table.add(log, what);
        table
    }

    fn add(&mut self, source: Source, what: impl Into<String>) -> FdNumber {
        self.add_until(Kept::Always, source, what)
    }

    fn add_until(&mut self, kept: Kept, source: Source, what: impl Into<String>) -> FdNumber {
        let number = self.0.len() as i32;
        self.0.push(Descriptor {
            source,
            what: what.into(),
            kept,
        });
        FdNumber(number)
    }
}

/// As many as there are queues: of kinds that lead nowhere outside the process.
fn any(link: &str, what: &str) -> MadeFds {
    MadeFds {
        most: None,
        ..exactly(0, link, what)
    }
}

fn exactly(count: u32, link: &str, what: &str) -> MadeFds {
    MadeFds {
        link: FdLink::Named(link.into()),
        what: what.into(),
        least: count,
        most: Some(count),
    }
}

/// One more descriptor of what `process` was executed with as `number`.
fn another(process: &str, number: FdNumber, what: &str) -> MadeFds {
    let link = FdLink::SameAs {
        process: process.into(),
        number: number.0,
    };
    MadeFds {
        link,
        ..exactly(1, "", what)
    }
}

/// Plans the processes of a VM.
pub(crate) fn plan(spec: &VmSpec, name: &str, devices: &[Device], choices: &Choices<'_>) -> Plan {
    let (vmm, vm) = vmm::plan(spec, devices, choices);
    let mut workers = vec![vmm];
    for (n, device) in devices.iter().enumerate() {
        let log = workers.len();
        workers.extend(device::plan(n, device, choices, log));
    }
    let (supervisor, supervision) = supervisor::plan(spec, name, devices, &workers, choices);
    Plan {
        name: name.to_owned(),
        jail: choices.jail,
        seccomp: choices.seccomp,
        workers,
        common: choices.device_arguments(),
        supervisor,
        vm,
        supervision,
    }
}
