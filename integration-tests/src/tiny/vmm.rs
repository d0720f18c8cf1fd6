//! `bulkhead-vmm` started directly: the test is its supervisor.

use super::console::Console;
use crate::{
    artifacts::Artifact,
    process::{Process, inherit_at},
    suite::{artifact, jail_is_off},
};
use anyhow::{Context, Result, bail, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair},
};
use std::{
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::Command,
    time::{Duration, Instant},
};
use vm_spec::{
    control::{DeviceConfig, EndReason, Envelope, FdNumber, FromVmm, MAX_MESSAGE, ToVmm, VmConfig, VmStats},
    machine::MACHINE_VERSION,
};

/// A back end that is ready to be connected.
#[derive(Debug)]
pub struct Device {
    /// Virtio device id.
    pub device_type: u16,
    /// Its vhost-user socket.
    pub socket: UnixStream,
    /// Configuration space where the back end has none, with its feature bits.
    pub config: (Vec<u8>, u64),
}

impl Device {
    /// A disk.
    #[must_use]
    pub fn disk(socket: UnixStream) -> Self {
        Self {
            device_type: 2,
            socket,
            config: (Vec::new(), 0),
        }
    }

    /// A NIC whose back end knows its MAC.
    #[must_use]
    pub fn nic(socket: UnixStream) -> Self {
        Self {
            device_type: 1,
            socket,
            config: (Vec::new(), 0),
        }
    }
}

/// What to start.
#[derive(Clone, Debug)]
pub struct VmOptions {
    /// The guest.
    pub kernel: Artifact,
    /// Its command line.
    pub cmdline: String,
    /// RAM in bytes.
    pub memory: u64,
    /// vCPUs.
    pub cpus: u8,
    /// What a reset does.
    pub restart_on_reboot: bool,
    /// `--seccomp`.
    pub seccomp: &'static str,
}

impl VmOptions {
    /// The tiny guest with a command line.
    #[must_use]
    pub fn tiny(cmdline: impl Into<String>) -> Self {
        Self {
            kernel: Artifact::TinyGuest,
            cmdline: cmdline.into(),
            memory: 64 << 20,
            cpus: 1,
            restart_on_reboot: false,
            seccomp: if jail_is_off() { "off" } else { "enforce" },
        }
    }
}

/// A VM's end.
#[derive(Debug)]
pub struct Ended {
    /// As the vmm reports it.
    pub reason: EndReason,
    /// What the guest printed.
    pub console: Console,
    /// Reboots that were reported.
    pub reboots: usize,
    /// Why devices were lost, in order.
    pub lost: Vec<String>,
    /// What the process logged.
    pub log: String,
}

/// A running vmm.
#[derive(Debug)]
pub struct Vm {
    /// The process.
    pub process: Process,
    /// What the guest prints.
    pub console: Console,
    input: UnixStream,
    control: OwnedFd,
    next_id: u64,
    reboots: usize,
    lost: Vec<String>,
}

const CONTROL: i32 = 3;
const KVM: i32 = 4;
const KERNEL: i32 = 5;
const CONSOLE: i32 = 6;
const FIRST_DEVICE: i32 = 7;
/// Its vhost-user socket, and both ends of its back end's request channel.
const FDS_PER_DEVICE: i32 = 3;

impl Vm {
    /// Starts the process, and sends its configuration.
    ///
    /// # Errors
    /// When something that it needs is missing.
    pub fn start(options: &VmOptions, devices: Vec<Device>) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (control, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let (console, guest_console) = UnixStream::pair()?;
        guest_console.set_nonblocking(true)?;
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .context("/dev/kvm")?;
        let kernel = File::open(artifact(options.kernel)?)?;

        let mut command = Command::new(artifact(Artifact::Vmm)?);
        command
            .arg(format!("--control-fd={CONTROL}"))
            .arg(format!("--seccomp={}", options.seccomp));
        inherit_at(&mut command, theirs, CONTROL)?;
        inherit_at(&mut command, kvm.into(), KVM)?;
        inherit_at(&mut command, kernel.into(), KERNEL)?;
        inherit_at(&mut command, guest_console.into(), CONSOLE)?;
        let mut configs = Vec::new();
        for (index, device) in (0..).zip(devices) {
            let socket = FIRST_DEVICE + index * FDS_PER_DEVICE;
            let (requests, peer) = UnixStream::pair()?;
            for (fd, number) in [device.socket, requests, peer].into_iter().zip(socket..) {
                inherit_at(&mut command, fd.into(), number)?;
            }
            configs.push(DeviceConfig {
                id: format!("device{index}"),
                slot: u8::try_from(index)? + 1,
                device_type: device.device_type,
                socket: FdNumber(socket),
                requests: FdNumber(socket + 1),
                requests_peer: FdNumber(socket + 2),
                num_queues: None,
                queue_size: None,
                config: device.config.0,
                config_features: device.config.1,
                ours: false,
                in_order: false,
            });
        }
        let mut vm = Self {
            process: Process::start(command)?,
            console: Console::new(console.try_clone()?),
            input: console,
            control,
            next_id: 1,
            reboots: 0,
            lost: Vec::new(),
        };
        vm.send(ToVmm::Start(Box::new(VmConfig {
            machine_version: MACHINE_VERSION,
            cpus: options.cpus,
            memory: options.memory,
            huge_page_size: None,
            kvm: FdNumber(KVM),
            kernel: FdNumber(KERNEL),
            initrd: None,
            cmdline: options.cmdline.clone(),
            console: FdNumber(CONSOLE),
            devices: configs,
            spares: Vec::new(),
            restart_on_reboot: options.restart_on_reboot,
            takes_status: false,
        })))?;
        Ok(vm)
    }

    /// Sends one message; returns its number.
    ///
    /// # Errors
    /// When the vmm has gone.
    pub fn send(&mut self, message: ToVmm) -> Result<u64> {
        let id = self.next_id;
        self.next_id += 1;
        let bytes = Envelope::new(id, message).encode()?;
        send(self.control.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL).context("sending to the vmm")?;
        Ok(id)
    }

    /// The next message.
    ///
    /// # Errors
    /// When none comes before `deadline` has passed; with the vmm's stderr, when it has gone.
    pub fn receive(&mut self, deadline: Duration) -> Result<Envelope<FromVmm>> {
        let mut polled = [PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(deadline).unwrap_or(PollTimeout::MAX);
        ensure!(
            poll(&mut polled, timeout)? > 0,
            "the vmm says nothing; console:\n{}\nstderr:\n{}",
            self.console.text(),
            self.process.stderr()?
        );
        let mut bytes = vec![0; MAX_MESSAGE];
        let length = recv(self.control.as_raw_fd(), &mut bytes, MsgFlags::empty())?;
        if length == 0 {
            let status = self.process.wait(Duration::from_secs(2))?;
            bail!("the vmm has gone: {status}; stderr: {}", self.process.stderr()?);
        }
        Ok(Envelope::decode(&bytes[..length])?)
    }

    /// Waits until the first vCPU runs; the two times that the vmm reports.
    ///
    /// # Errors
    /// When it does not start.
    pub fn wait_running(&mut self, deadline: Duration) -> Result<(u64, u64)> {
        match self.receive(deadline)?.body {
            FromVmm::Running {
                started_ns,
                first_instruction_ns,
            } => Ok((started_ns, first_instruction_ns)),
            other => bail!("not running: {other:?}"),
        }
    }

    /// The counters.
    ///
    /// # Errors
    /// When the vmm does not answer.
    pub fn stats(&mut self, deadline: Duration) -> Result<VmStats> {
        let id = self.send(ToVmm::Stats)?;
        let end = Instant::now() + deadline;
        loop {
            let message = self.receive(end.saturating_duration_since(Instant::now()))?;
            match message.body {
                FromVmm::Stats(stats) if message.id == id => return Ok(stats),
                FromVmm::Rebooted => self.reboots += 1,
                FromVmm::Running { .. } => {}
                FromVmm::BackendLost { device, reason, .. } | FromVmm::DeviceFault { device, reason } => {
                    self.lost.push(format!("{device}: {reason}"));
                }
                other => bail!("no counters but {other:?}"),
            }
        }
    }

    /// Waits until a device is lost.
    ///
    /// # Errors
    /// When none is before `deadline` has passed.
    pub fn wait_lost(&mut self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        while self.lost.is_empty() {
            match self.receive(end.saturating_duration_since(Instant::now()))?.body {
                FromVmm::BackendLost { device, reason, .. } | FromVmm::DeviceFault { device, reason } => {
                    self.lost.push(format!("{device}: {reason}"));
                }
                FromVmm::Running { .. } => {}
                other => bail!("{other:?}"),
            }
        }
        Ok(())
    }

    /// Types `text` on the console.
    ///
    /// # Errors
    /// When the vmm has gone.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        Ok(self.input.write_all(text.as_bytes())?)
    }

    /// Closes the control socket and the console, as a supervisor that died leaves them.
    #[must_use]
    pub fn abandon(self) -> Process {
        self.process
    }

    /// Waits for the VM's end, and the process's.
    ///
    /// # Errors
    /// When they do not come before `deadline` has passed.
    pub fn wait_end(mut self, deadline: Duration) -> Result<Ended> {
        let end = Instant::now() + deadline;
        let left = || end.saturating_duration_since(Instant::now());
        let reason = loop {
            match self.receive(left())?.body {
                FromVmm::Ended(reason) => break reason,
                FromVmm::Rebooted => self.reboots += 1,
                FromVmm::BackendLost { device, reason, .. } | FromVmm::DeviceFault { device, reason } => {
                    self.lost.push(format!("{device}: {reason}"));
                }
                FromVmm::Running { .. } => {}
                other => bail!("{other:?}"),
            }
        };
        self.process.wait(left())?;
        self.console.finish(left())?;
        Ok(Ended {
            reason,
            console: self.console,
            reboots: self.reboots,
            lost: self.lost,
            log: self.process.stderr()?,
        })
    }
}
