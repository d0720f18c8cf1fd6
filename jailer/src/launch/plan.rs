//! What will run: each process, its arguments, and each of its descriptors. Pure data, which
//! `--dry-run` prints and `spawn` carries out.

use super::machine::{Backend, Device};
use crate::sandbox::SeccompMode;
use std::fmt::Write as _;
use vm_spec::control::{DeviceConfig, FdNumber, VmConfig};
use vm_spec::machine::MACHINE_VERSION;
use vm_spec::run_state::{FdState, ProcessRole};
use vm_spec::spec::{ImageFormat, OnReboot, VmSpec};
use vm_spec::supervise::{SupervisedProcess, SupervisorConfig};

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
    Kvm,
    Kernel,
    Initrd,
    /// The vmm's and the device process's ends of a device's vhost-user socket.
    FrontEnd(usize),
    BackEnd(usize),
    /// A layer of a device's image chain, the top first.
    Image(usize, usize),
    Tap(usize),
}

/// One process.
#[derive(Clone, Debug)]
pub(crate) struct ProcessPlan {
    pub(crate) name: String,
    pub(crate) role: ProcessRole,
    pub(crate) binary: &'static str,
    pub(crate) arguments: Vec<String>,
    /// The one at index N becomes descriptor N.
    pub(crate) descriptors: Vec<(Source, String)>,
}

impl ProcessPlan {
    pub(crate) fn fd_states(&self) -> Vec<FdState> {
        (0..)
            .zip(&self.descriptors)
            .map(|(number, (_, what))| FdState {
                number,
                what: what.clone(),
            })
            .collect()
    }
}

/// A VM's processes: the vmm first, then one for each device of ours; the supervisor last.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) name: String,
    pub(crate) seccomp: SeccompMode,
    pub(crate) workers: Vec<ProcessPlan>,
    pub(crate) supervisor: ProcessPlan,
    pub(crate) vm: VmConfig,
    /// With the workers' process ids still 0.
    pub(crate) supervision: SupervisorConfig,
}

/// What a plan depends on beside the spec.
pub(crate) struct Choices<'a> {
    pub(crate) seccomp: SeccompMode,
    pub(crate) log_level: &'a str,
    pub(crate) log_json: bool,
    pub(crate) has_input: bool,
    /// Input is a terminal, put into raw mode.
    pub(crate) raw_terminal: bool,
    /// For each device the formats of its image chain, the top first; empty where it has none.
    pub(crate) chains: Vec<Vec<ImageFormat>>,
}

impl Choices<'_> {
    fn common_arguments(&self) -> [String; 2] {
        [
            format!("--seccomp={}", self.seccomp),
            format!("--log-level={}", self.log_level),
        ]
    }

    fn log_format(&self) -> String {
        format!("--log-format={}", if self.log_json { "json" } else { "human" })
    }
}

/// A process's descriptors, numbered as they are added.
struct Table(Vec<(Source, String)>);

impl Table {
    fn new(log: Source) -> Self {
        let what = if log == Source::Stderr {
            "standard error of bulkhead"
        } else {
            "log pipe (write end)"
        };
        Self(vec![
            (Source::Null, "/dev/null".into()),
            (log, what.into()),
            (log, what.into()),
        ])
    }

    fn add(&mut self, source: Source, what: impl Into<String>) -> FdNumber {
        self.0.push((source, what.into()));
        FdNumber(self.0.len() as i32 - 1)
    }
}

/// Plans the processes of a VM.
pub(crate) fn plan(spec: &VmSpec, name: &str, devices: &[Device], choices: &Choices<'_>) -> Plan {
    let (vmm, vm) = plan_vmm(spec, devices, choices);
    let mut workers = vec![vmm];
    for (n, device) in devices.iter().enumerate() {
        let log = workers.len();
        workers.extend(plan_device(n, device, choices, log));
    }
    let (supervisor, supervision) = plan_supervisor(spec, devices, &workers, choices);
    Plan {
        name: name.to_owned(),
        seccomp: choices.seccomp,
        workers,
        supervisor,
        vm,
        supervision,
    }
}

fn plan_vmm(spec: &VmSpec, devices: &[Device], choices: &Choices<'_>) -> (ProcessPlan, VmConfig) {
    let mut fds = Table::new(Source::LogWrite(0));
    fds.add(Source::SupervisorControl, "control socket to the supervisor");
    let kvm = fds.add(Source::Kvm, "/dev/kvm");
    let kernel = fds.add(Source::Kernel, spec.boot.kernel.display().to_string());
    let initrd = spec
        .boot
        .initrd
        .as_ref()
        .map(|path| fds.add(Source::Initrd, path.display().to_string()));
    let console = fds.add(Source::ConsoleGuest, "console socket to the supervisor");
    let devices = devices
        .iter()
        .enumerate()
        .map(|(n, device)| DeviceConfig {
            id: device.id.clone(),
            slot: device.slot,
            device_type: device.device_type,
            socket: fds.add(Source::FrontEnd(n), format!("vhost-user socket of {}", device.id)),
            num_queues: device.num_queues,
            config: device.config.clone(),
            config_features: device.config_features,
            ours: !matches!(device.backend, Backend::External(_)),
        })
        .collect();
    let vm = VmConfig {
        machine_version: MACHINE_VERSION,
        cpus: spec.cpus,
        memory: spec.memory.0,
        huge_page_size: spec.huge_pages.map(|size| size.0),
        kvm,
        kernel,
        initrd,
        cmdline: spec.boot.cmdline.clone(),
        console,
        devices,
        restart_on_reboot: spec.on_reboot == OnReboot::Restart,
    };
    let mut arguments = vec!["--control-fd=3".to_owned()];
    arguments.extend(choices.common_arguments());
    let process = ProcessPlan {
        name: "vmm".into(),
        role: ProcessRole::Vmm,
        binary: "bulkhead-vmm",
        arguments,
        descriptors: fds.0,
    };
    (process, vm)
}

/// The process of a device of ours.
fn plan_device(n: usize, device: &Device, choices: &Choices<'_>, log: usize) -> Option<ProcessPlan> {
    let mut fds = Table::new(Source::LogWrite(log));
    let socket = fds.add(Source::BackEnd(n), "vhost-user socket to the vmm");
    let mut arguments = vec![format!("--fd={}", socket.0)];
    let (role, binary) = match &device.backend {
        Backend::External(_) => return None,
        Backend::Disk {
            path,
            format,
            read_only,
        } => {
            let image = fds.add(Source::Image(n, 0), path.display().to_string());
            arguments.push(format!("--blk-fd={}", image.0));
            arguments.push(format!("--format={}", format_name(*format)));
            for (layer, format) in choices.chains[n].iter().enumerate().skip(1) {
                let fd = fds.add(Source::Image(n, layer), format!("backing file {layer}"));
                arguments.push(format!("--backing-fd={}:{}", format_name(*format), fd.0));
            }
            if *read_only {
                arguments.push("--read-only".into());
            }
            arguments.extend(device.num_queues.map(|q| format!("--num-queues={q}")));
            // VIRTIO_BLK_T_GET_ID answers at most 20 bytes.
            let serial: String = device.id.chars().take(20).collect();
            arguments.push(format!("--serial={serial}"));
            (ProcessRole::Disk, "vhost-user-blk")
        }
        Backend::Net { mac, mtu, .. } => {
            let tap = fds.add(Source::Tap(n), "TAP");
            arguments.push(format!("--tap-fd={}", tap.0));
            arguments.push(format!("--mac={mac}"));
            arguments.extend(mtu.map(|mtu| format!("--mtu={mtu}")));
            (ProcessRole::Net, "vhost-user-net")
        }
    };
    arguments.extend(choices.common_arguments());
    arguments.push(choices.log_format());
    Some(ProcessPlan {
        name: device.id.clone(),
        role,
        binary,
        arguments,
        descriptors: fds.0,
    })
}

fn format_name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => "qcow2",
    }
}

fn plan_supervisor(
    spec: &VmSpec,
    devices: &[Device],
    workers: &[ProcessPlan],
    choices: &Choices<'_>,
) -> (ProcessPlan, SupervisorConfig) {
    let mut fds = Table::new(Source::Stderr);
    fds.add(Source::SpawnerControl, "control socket to the spawner");
    let vmm = fds.add(Source::VmmControl, "control socket to the vmm");
    let console = fds.add(Source::ConsolePerson, "console socket to the vmm");
    let input = choices
        .has_input
        .then(|| fds.add(Source::Input, "standard input of bulkhead"));
    let output = Some(fds.add(Source::Output, "standard output of bulkhead"));
    // The vmm is no device; a device of someone else's has no process of ours.
    let ours = devices
        .iter()
        .filter(|d| !matches!(d.backend, Backend::External(_)));
    let slots = [None].into_iter().chain(ours.map(|device| Some(device.slot)));
    let processes = workers
        .iter()
        .zip(slots)
        .enumerate()
        .map(|(n, (worker, slot))| SupervisedProcess {
            name: worker.name.clone(),
            role: worker.role,
            pid: 0,
            log: fds.add(
                Source::LogRead(n),
                format!("log pipe of {} (read end)", worker.name),
            ),
            slot,
        })
        .collect();
    let config = SupervisorConfig {
        vmm,
        console,
        input,
        output,
        escape: choices.raw_terminal,
        processes,
        power_off_grace: spec.power_off_grace,
        log_json: choices.log_json,
        on_device_death: spec.on_device_death,
    };
    let process = ProcessPlan {
        name: "supervisor".into(),
        role: ProcessRole::Supervisor,
        binary: "bulkhead-supervisor",
        arguments: vec![format!("--seccomp={}", choices.seccomp)],
        descriptors: fds.0,
    };
    (process, config)
}

impl Plan {
    /// What `--dry-run` prints.
    pub(crate) fn describe(&self) -> String {
        let mut out = format!("vm {}\n", self.name);
        for process in self.workers.iter().chain([&self.supervisor]) {
            let _ = writeln!(
                out,
                "process {}\n  execute {} {}\n  jail user, mount, pid, net, ipc, uts and cgroup \
                 namespaces; empty read-only root; no capabilities\n  seccomp {} policy {}",
                process.name,
                process.binary,
                process.arguments.join(" "),
                self.seccomp,
                process.role.policy().unwrap_or("none"),
            );
            for (number, (_, what)) in process.descriptors.iter().enumerate() {
                let _ = writeln!(out, "  fd {number} {what}");
            }
        }
        out
    }
}
