//! What it takes to attach a device to a running VM. The command of the VM's owner does what the launcher does at
//! start: it checks, opens everything and plans the device's process; the VM's forker makes it.

use super::inputs::{self, BackendInput, Given};
use super::machine::{self, Backend, Device, check_name, id_is_taken};
use super::net::{self, link::Unnamed};
use super::plan::{Choices, Source, device as device_plan};
use super::spawn::{binary_folder, of_back_end, open_binary, pair};
use super::{Jail, Options, disk};
use crate::failure::Failure;
use crate::inherit::set_nonblocking;
use crate::sandbox::SeccompMode;
use nix::fcntl::OFlag;
use nix::sys::socket::SockType;
use nix::unistd::pipe2;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use vm_spec::client::Attachment;
use vm_spec::control::{DeviceConfig, FdNumber};
use vm_spec::run_state::FdState;
use vm_spec::spec::VmSpec;
use vm_spec::supervise::AddedProcess;

/// A device that is ready to be sent to its VM.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) attachment: Attachment,
    /// What [`vm_spec::client::Request::Attach`] says that comes with it.
    pub(crate) descriptors: Vec<OwnedFd>,
    /// Where the pipe for orders to a NIC's link is until the VM has the NIC.
    pub(crate) link: Option<Unnamed>,
}

/// Opens what the one device in `spec` needs; `folder` is the VM's run-time folder, `vm` its name, and `taken` are
/// the ids that are others'.
///
/// # Errors
/// A [`Failure`] as of a launch.
pub(crate) fn prepare(spec: &VmSpec, vm: &str, taken: &[String], folder: &Path) -> Result<Ready, Failure> {
    let device = check(spec, vm, taken)?;
    check_name(&format!("{}.id", device.field), &device.id)?;
    if taken.contains(&device.id) {
        return Err(Failure::usage(format!(
            "{}.id: {}",
            device.field,
            id_is_taken(&device.id)
        )));
    }
    let Opening { input, link } = Opening::of(spec, &device, folder)?;
    let (link, place) = link.map_or((None, None), |(place, pipe)| (Some(pipe), Some(place)));
    let config = device.config([FdNumber::NONE; 3]);
    let input = match input {
        BackendInput::Socket(socket) => {
            let sockets = of_back_end(socket).map_err(|e| {
                Failure::host(format!("{}: cannot make sockets for it", device.field)).because(&e)
            })?;
            return Ok(Ready {
                attachment: Attachment {
                    device: config,
                    process: None,
                },
                descriptors: sockets.into(),
                link: None,
            });
        }
        input => input,
    };
    Ok(Ready {
        link: place,
        ..Parts::of(&device, input, link)?.ready(&device, config)?
    })
}

/// The device, with an id of its own or one that is not taken.
fn check(spec: &VmSpec, vm: &str, taken: &[String]) -> Result<Device, Failure> {
    let free = |kind: &str| {
        (0..)
            .find(|n| !taken.contains(&format!("{kind}{n}")))
            .unwrap_or(0)
    };
    let device = match (&*spec.disks, &*spec.nets, &*spec.vhost_user) {
        ([one], [], []) => disk::check(spec.cpus, free("disk"), one),
        ([], [one], []) => net::check(vm, free("net"), one),
        ([], [], [one]) => machine::check_vhost_user(free(&one.device_type), spec.cpus, one),
        _ => Err(Failure::usage("give one device: --disk, --net or --vhost-user")),
    }?;
    match &device.backend {
        // The others need a process that stays as long as the VM.
        Backend::Net(nic) if !nic.is_of_the_host() => Err(Failure::usage(format!(
            "{}: user, isolated and private are made at a VM's start only",
            device.field
        ))
        .hint("attach tap=NAME, tap-fd=N, bridge=NAME, or vhost-user=SOCKET")),
        _ => Ok(device),
    }
}

/// What was opened for a device.
struct Opening {
    input: BackendInput,
    /// The pipe for orders to a NIC's link, and its place in the VM's folder.
    link: Option<(Unnamed, OwnedFd)>,
}

impl Opening {
    fn of(spec: &VmSpec, device: &Device, folder: &Path) -> Result<Self, Failure> {
        let Backend::Net(nic) = &device.backend else {
            let input = inputs::open_backend(spec, device)?;
            let input = input.ok_or_else(|| Failure::host(format!("{}: nothing serves it", device.field)))?;
            return Ok(Self { input, link: None });
        };
        let input = inputs::open_net(device, nic, &options(), None)?;
        input.begin_capture(device)?;
        let link = Unnamed::make(folder).map_err(|e| {
            Failure::host(format!("{}: cannot make a pipe for its link", device.field)).because(&e)
        })?;
        Ok(Self {
            input,
            link: Some(link),
        })
    }
}

/// Flags that the VM's own forker knows better are left out; the rest of these is of no account here.
fn options() -> Options {
    Options {
        jail: Jail::On,
        seccomp: SeccompMode::Enforce,
        log_level: "warn".into(),
        log_json: false,
    }
}

/// All descriptors of the process, and what the supervisor keeps of it.
struct Parts {
    table: BTreeMap<Source, OwnedFd>,
    formats: Vec<vm_spec::spec::ImageFormat>,
    watches: Vec<OwnedFd>,
    log: OwnedFd,
    orders: OwnedFd,
}

impl Parts {
    fn of(device: &Device, input: BackendInput, link: Option<OwnedFd>) -> Result<Self, Failure> {
        let failed = |e: std::io::Error| {
            Failure::host(format!("{}: cannot make pipes and sockets for it", device.field)).because(&e)
        };
        let mut table = BTreeMap::new();
        let null = OpenOptions::new().read(true).write(true).open("/dev/null");
        table.insert(Source::Null, null.map_err(failed)?.into());
        let (log, write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(e.into()))?;
        set_nonblocking(log.as_fd()).map_err(|e| failed(e.into()))?;
        table.insert(Source::LogWrite(0), write);
        let (theirs, orders) = pair(SockType::Stream).map_err(|e| failed(e.into()))?;
        table.insert(Source::Orders(0), theirs);
        let mut parts = Self {
            table,
            formats: Vec::new(),
            watches: Vec::new(),
            log,
            orders,
        };
        parts.take(input, link)?;
        Ok(parts)
    }

    fn take(&mut self, mut input: BackendInput, link: Option<OwnedFd>) -> Result<(), Failure> {
        if let BackendInput::Images(images) = &input {
            self.formats = inputs::formats(&images.layers);
        }
        if let BackendInput::Net { link: place, .. } = &mut input {
            *place = link;
        }
        let Given { making, watches } = input.give(0, &mut self.table);
        if making.is_some() {
            return Err(Failure::host("a TAP that is still being made cannot be attached"));
        }
        self.watches = watches.into_iter().map(|watch| watch.into_descriptor()).collect();
        Ok(())
    }

    fn ready(self, device: &Device, config: DeviceConfig) -> Result<Ready, Failure> {
        let choices = Choices {
            jail: Jail::On,
            seccomp: SeccompMode::Enforce,
            log_level: "",
            log_json: false,
            has_input: false,
            raw_terminal: false,
            chains: vec![self.formats.clone()],
            cmdline: String::new(),
        };
        let plan = device_plan::plan(0, device, &choices, 0)
            .ok_or_else(|| Failure::host(format!("{}: no process of ours serves it", device.field)))?;
        let binary = open_binary(&binary_folder()?, plan.binary)?.1;
        let numbered = || (0..).zip(&plan.descriptors);
        let socket = numbered().find(|(_, fd)| matches!(fd.source, Source::BackEnd(_)));
        let process = AddedProcess {
            name: device.id.clone(),
            role: plan.role,
            // The VM's forker adds those of all its processes.
            arguments: plan.own_arguments(&choices),
            fds: numbered()
                .map(|(number, fd)| FdState {
                    number,
                    what: fd.what.clone(),
                    kept: fd.kept,
                })
                .collect(),
            socket: FdNumber(socket.map_or(-1, |(number, _)| number)),
            made: plan.made.clone(),
            watches: self.watches.len() as u8,
        };
        let mut descriptors = vec![self.log, self.orders, binary.into()];
        descriptors.extend(self.watches);
        for (_, fd) in numbered().filter(|(_, fd)| !matches!(fd.source, Source::BackEnd(_))) {
            let given: BorrowedFd<'_> = self.table[&fd.source].as_fd();
            let copy = given.try_clone_to_owned();
            descriptors.push(
                copy.map_err(|e| {
                    Failure::host(format!("{}: too many open files", device.field)).because(&e)
                })?,
            );
        }
        Ok(Ready {
            attachment: Attachment {
                device: config,
                process: Some(process),
            },
            descriptors,
            link: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_id_is_nobody_elses() {
        let taken = ["vmm", "disk0", "fs0", "disk2"].map(str::to_owned);
        let id = |spec: &str| check(&toml::from_str(spec).unwrap(), "web", &taken).map(|device| device.id);
        assert_eq!(
            id("[[disk]]\nformat = \"raw\"\npath = \"b.raw\"").unwrap(),
            "disk1"
        );
        assert_eq!(
            id("[[vhost-user]]\ntype = \"fs\"\nsocket = \"s\"").unwrap(),
            "fs1"
        );
        assert_eq!(
            id("[[disk]]\nid = \"disk2\"\nformat = \"raw\"\npath = \"b.raw\"").unwrap(),
            "disk2"
        );
    }
}
