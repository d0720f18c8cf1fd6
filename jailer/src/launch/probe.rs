//! Single processes of a VM for `bulkhead audit`: planned as `bulkhead run` plans them, given
//! descriptors of the same kinds, and spawned into the same jail; only the binary is a probe.

use super::inputs::{self, BackendInput, Inputs};
use super::net::line::Lines;
use super::plan::{Descriptor, Plan, ProcessPlan, Source};
use super::spawn::{address_space, pair};
use super::{Jail, Options, machine, make_plan};
use crate::audit::order::Order;
use crate::audit::wall::Wall;
use crate::audit::{AUDITED, nic};
use crate::failure::Failure;
use crate::sandbox::child::{Child, Parent, Program, open_proc, start_without};
use crate::sandbox::{Role, SeccompMode, most_open_files};
use crate::wire::send_message;
use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::SockType;
use nix::unistd::pipe2;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use vm_spec::control::ToVmm;
use vm_spec::spec::VmSpec;
use vm_spec::supervise::ToSupervisor;

/// Plans and opened files: of a VM without devices, whose vmm waits for no back end, and of one
/// with a disk and a NIC.
pub(crate) struct Stage {
    bare: (Plan, Inputs),
    full: (Plan, Inputs),
    tap: Option<OwnedFd>,
    binaries: BTreeMap<&'static str, (PathBuf, File)>,
}

/// A probe at work, with the far ends of its sockets.
pub(crate) struct Probe {
    pub(crate) child: Child,
    /// What it says.
    pub(crate) log: File,
    _held: Vec<OwnedFd>,
}

impl Stage {
    /// Opens what VMs are made of: `kernel` and `disk` are files, `binaries` the folder with the
    /// probes. Without TUN there is no NIC.
    pub(crate) fn open(kernel: &Path, disk: &Path, binaries: &Path) -> Result<Self, Failure> {
        let base = format!(
            "memory = \"32M\"\n[boot]\nkernel = {:?}\n",
            kernel.display().to_string()
        );
        let mut full = format!(
            "{base}[[disk]]\npath = {:?}\nformat = \"raw\"\n",
            disk.display().to_string()
        );
        let tap = if Path::new("/dev/net/tun").exists() {
            let tap = nic::tap()
                .map_err(|e| Failure::host("cannot make a TAP for the network process").because(&e))?;
            // The plan takes over the descriptor that it is told of.
            let copy = tap
                .try_clone()
                .map_err(|e| Failure::host("no descriptor").because(&e))?;
            let _ = writeln!(full, "[[net]]\ntap-fd = {}", copy.into_raw_fd());
            Some(tap)
        } else {
            None
        };
        let (bare, full) = (plan(&base)?, plan(&full)?);
        let mut opened = BTreeMap::new();
        for process in full.0.processes() {
            let path = binaries.join(process.binary);
            let file = File::open(&path).map_err(|e| {
                Failure::host(format!("cannot open the probe {}", path.display()))
                    .because(&e)
                    .hint("docs/isolation-tests.md says how probes are built; --probes=FOLDER names theirs")
            })?;
            opened.insert(process.binary, (path, file));
        }
        Ok(Self {
            bare,
            full,
            tap,
            binaries: opened,
        })
    }

    /// The probes.
    pub(crate) fn binaries(&self) -> Vec<PathBuf> {
        self.binaries.values().map(|(path, _)| path.clone()).collect()
    }

    /// The roles that there is a process for.
    pub(crate) fn roles(&self) -> Vec<Role> {
        let mut roles = AUDITED.to_vec();
        roles.retain(|role| self.process(*role).is_some());
        roles
    }

    fn process(&self, role: Role) -> Option<(&(Plan, Inputs), &ProcessPlan)> {
        let (of, name) = match role {
            Role::Vmm | Role::Vcpu => (&self.bare, "vmm"),
            Role::Supervisor => (&self.bare, "supervisor"),
            // All start under the same filter.
            Role::Disk | Role::Startup => (&self.full, "disk"),
            Role::Net => (&self.full, "net"),
            Role::Image | Role::Spawner | Role::Forker | Role::Relay | Role::StartupRing => return None,
        };
        let process =
            of.0.processes()
                .find(|process| process.role.policy() == Some(name));
        process.map(|process| (of, process))
    }

    /// Spawns the process of `order.role`, with `report` and `terminal` as its last descriptors;
    /// `order.report` is set to their place. It becomes `identity`.
    pub(crate) fn start(
        &self,
        order: &mut Order,
        report: &OwnedFd,
        terminal: &OwnedFd,
        identity: Option<u32>,
    ) -> Result<Probe, Failure> {
        let failed = |e: &dyn std::error::Error| Failure::host("cannot start a probe").because(e);
        let (of, process) = self
            .process(order.role)
            .ok_or_else(|| Failure::host(format!("no process plays the role {}", order.role)))?;
        let wires = Wires::make(of, self.tap.as_ref(), process).map_err(|e| failed(&e))?;
        order.report = process.descriptors.len() as i32;
        let mut descriptors: Vec<_> = wires.given.iter().map(AsFd::as_fd).collect();
        descriptors.extend([report.as_fd(), terminal.as_fd()]);
        let proc = open_proc().map_err(|e| failed(&e))?;
        let program = Program {
            binary: self.binaries[process.binary].1.as_fd(),
            arguments: arguments(process, order).map_err(|e| failed(&e))?,
            descriptors,
            proc: proc.as_fd(),
            rooted: false,
            cgroup: None,
            address_space: address_space(process.role, of.0.vm.memory),
            open_files: most_open_files(process.jailed_role()),
            startup: process.startup(),
            seccomp: SeccompMode::Enforce,
            identity,
            parent: Parent::Caller,
        };
        let child = start_without(&program, order.removed)
            .and_then(crate::sandbox::child::Starting::finish)
            .map_err(|e| failed(&e))?;
        Ok(Probe {
            child,
            log: wires.log,
            _held: wires.held,
        })
    }
}

fn plan(spec: &str) -> Result<(Plan, Inputs), Failure> {
    let spec: VmSpec = toml::from_str(spec).map_err(|e| Failure::host("the audit's VM").because(&e))?;
    let options = Options {
        jail: Jail::On,
        seccomp: SeccompMode::Enforce,
        log_level: "warn".into(),
        log_json: false,
    };
    let (name, devices) = machine::check(&spec, "audit")?;
    let mut inputs = inputs::open(&spec, &devices, &options, Lines::new())?;
    inputs.settle()?;
    let plan = make_plan(&spec, &name, &devices, &options, inputs.chains(), false)?;
    Ok((plan, inputs))
}

/// The order takes the place of the program's name; nothing else differs but the filter's mode.
fn arguments(process: &ProcessPlan, order: &Order) -> Result<Vec<CString>, std::ffi::NulError> {
    let mode = if order.removed.has(Wall::Seccomp) {
        SeccompMode::Off
    } else {
        SeccompMode::Enforce
    };
    let argument = |text: &String| {
        if text.starts_with("--seccomp=") {
            CString::new(format!("--seccomp={mode}"))
        } else {
            CString::new(text.as_str())
        }
    };
    let rest = process.arguments.iter().map(argument);
    [CString::new(order.to_argument())]
        .into_iter()
        .chain(rest)
        .collect()
}

/// A process's descriptors and the far ends of those that are sockets or pipes.
struct Wires {
    given: Vec<OwnedFd>,
    held: Vec<OwnedFd>,
    log: File,
}

impl Wires {
    fn make(
        (plan, inputs): &(Plan, Inputs),
        tap: Option<&OwnedFd>,
        process: &ProcessPlan,
    ) -> io::Result<Self> {
        let log = File::from(memfd_create("log", MFdFlags::MFD_CLOEXEC)?);
        let mut wires = Self {
            given: Vec::new(),
            held: Vec::new(),
            log,
        };
        for Descriptor { source, .. } in &process.descriptors {
            let fd = match (source, tap) {
                (Source::Tap(..), Some(tap)) => tap.try_clone()?,
                _ => wires.open(plan, inputs, *source)?,
            };
            wires.given.push(fd);
        }
        Ok(wires)
    }

    fn open(&mut self, plan: &Plan, inputs: &Inputs, source: Source) -> io::Result<OwnedFd> {
        match source {
            Source::Null | Source::Input | Source::Output => null(),
            Source::Stderr | Source::LogWrite(_) => Ok(self.log.try_clone()?.into()),
            Source::Kvm => inputs.kvm.try_clone(),
            Source::Kernel => inputs.kernel.try_clone(),
            Source::Initrd => inputs.initrd.as_ref().map_or_else(null, OwnedFd::try_clone),
            Source::Image(device, layer) => match &inputs.backends[device] {
                BackendInput::Images(images) => images.layers[layer].file.try_clone(),
                _ => null(),
            },
            Source::NicState(_) => super::net::link::make_state(),
            // No probe needs what is in them.
            Source::DirectImage(_) | Source::Key(_) | Source::DataFile(_) => null(),
            Source::LogRead(_) => {
                let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
                self.held.push(write);
                Ok(read)
            }
            Source::SpawnerControl => {
                let far = self.socket(SockType::SeqPacket)?;
                let start = ToSupervisor::Start(Box::new(plan.supervision.clone()));
                send_message(self.held[self.held.len() - 1].as_fd(), 1, start).map_err(io::Error::other)?;
                Ok(far)
            }
            Source::SupervisorControl => {
                let far = self.socket(SockType::SeqPacket)?;
                let start = ToVmm::Start(Box::new(plan.vm.clone()));
                send_message(self.held[self.held.len() - 1].as_fd(), 1, start).map_err(io::Error::other)?;
                Ok(far)
            }
            Source::VmmControl => self.socket(SockType::SeqPacket),
            _ => self.socket(SockType::Stream),
        }
    }

    /// One end; the other is held.
    fn socket(&mut self, kind: SockType) -> io::Result<OwnedFd> {
        let (near, far) = pair(kind)?;
        self.held.push(near);
        Ok(far)
    }
}

fn null() -> io::Result<OwnedFd> {
    Ok(OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?
        .into())
}
