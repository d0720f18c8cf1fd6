//! The main thread's loop: control messages, guest and device events, console.

use super::events::{DeviceWord, Events, GuestEvent};
use super::exits::Platform;
use super::reminder::Reminder;
use super::slots::Slots;
use super::vcpus::Vcpus;
use crate::boot::BootImages;
use crate::control::{ControlSocket, Incoming};
use crate::error::{Error, chain};
use crate::frontend::BackendSockets;
use crate::kvm::{Entry, EventRouter, Irqchip, Vm};
use crate::serial::Input;
use crate::virtio::{Device, DeviceEvent, Successor};
use jailer::clock::monotonic_ns;
use jailer::sandbox::{Locked, Role, SeccompMode, lockdown_main};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_spec::control::{BACKEND_FDS, EndReason, Envelope, FromVmm, ToVmm, VmStats};

/// Longest that the console's reader may hold up the end.
const CONSOLE_DRAIN: Duration = Duration::from_millis(500);

/// A machine that is built.
pub struct Machine {
    // The order is that of drop: no vCPU runs when devices go, no device when the VM goes.
    pub(super) vcpus: Vcpus,
    pub(super) devices: Vec<Device>,
    pub(super) slots: Slots,
    pub(super) platform: Arc<Platform>,
    pub(super) router: Arc<EventRouter>,
    pub(super) irqchip: Box<dyn Irqchip>,
    pub(super) events: Arc<Events>,
    pub(super) images: BootImages,
    pub(super) vm: Arc<Vm>,
    pub(super) entry: Entry,
    pub(super) restart_on_reboot: bool,
    pub(super) takes_status: bool,
    pub(super) seccomp: SeccompMode,
    /// Control messages that came while the machine was built.
    pub(super) early: Vec<(Box<Envelope<ToVmm>>, Vec<OwnedFd>)>,
}

/// Proof that this process is confined, and its guest runs.
pub struct Started {
    _locked: Locked,
    first_instruction_ns: u64,
}

/// What the loop waits for, in the order in which it is polled.
#[derive(Clone, Copy, Default)]
struct Ready {
    control: bool,
    events: bool,
    console_in: bool,
    console_out: bool,
}

impl Machine {
    /// Confines the main thread and lets the guest go, which it does once all vCPUs are made and
    /// confined as well: nobody waits for word of that first.
    ///
    /// # Errors
    /// [`Error::Lockdown`]; what a vCPU's thread met; [`Error::VcpuTimeout`].
    pub fn lock_down_and_start(&self) -> Result<Started, Error> {
        let locked = lockdown_main(Role::Vmm, self.seccomp).map_err(|e| Error::Lockdown(Box::new(e)))?;
        let ordered_ns = monotonic_ns();
        self.start();
        let first_instruction_ns = ordered_ns.max(self.vcpus.ready()?);
        Ok(Started {
            _locked: locked,
            first_instruction_ns,
        })
    }

    /// Serves the running guest to its end and reports everything but the end, which it returns.
    /// `started_ns` is when the process began to build.
    ///
    /// # Errors
    /// What made it impossible to go on.
    pub fn run(
        &mut self,
        control: &mut ControlSocket,
        started_ns: u64,
        started: &Started,
    ) -> Result<EndReason, Error> {
        // Nothing was, when the guest started.
        let mut written = 0;
        let first_instruction_ns = started.first_instruction_ns;
        control.send(
            0,
            FromVmm::Running {
                started_ns,
                first_instruction_ns,
            },
        )?;
        for (message, fds) in std::mem::take(&mut self.early) {
            if let Some(reason) = self.obey(control, *message, fds)? {
                return Ok(self.end(reason));
            }
        }
        let mut input = Input::Open;
        let mut reminder = Reminder::default();
        loop {
            let timeout = reminder.look(&self.platform.ports, Instant::now());
            let ready = self.wait(control, input, timeout)?;
            if ready.console_in {
                input = self.platform.com1.receive();
            }
            if ready.console_out {
                self.platform.com1.output().flush();
            }
            if ready.control
                && let Some(reason) = self.serve(control)?
            {
                return Ok(self.end(reason));
            }
            if ready.events {
                self.events.acknowledge();
                self.report_devices(control)?;
                if let Some(event) = self.events.take_guest() {
                    let instant = self.platform.com1.output().written() == written;
                    match self.judge(event, instant) {
                        Some(reason) => return Ok(self.end(reason)),
                        None => {
                            if let Some(reason) = self.reset(control)? {
                                return Ok(self.end(reason));
                            }
                            // Read before the start: the guest writes from the next moment on.
                            written = self.platform.com1.output().written();
                            self.start();
                            input = Input::Open;
                            reminder = Reminder::default();
                            control.send(0, FromVmm::Rebooted)?;
                        }
                    }
                }
            }
        }
    }

    fn start(&self) {
        self.vm.ram().mark_used();
        self.vcpus.enter(self.entry, self.platform.clone());
    }

    fn wait(&self, control: &ControlSocket, input: Input, timeout: PollTimeout) -> Result<Ready, Error> {
        let com1 = &self.platform.com1;
        let output = com1.output();
        let mut console = PollFlags::empty();
        console.set(PollFlags::POLLIN, input == Input::Open);
        console.set(PollFlags::POLLOUT, output.is_blocked());
        // Nobody takes the signal while input has no use for it.
        let mut drained = PollFlags::empty();
        drained.set(PollFlags::POLLIN, input == Input::Full);
        let mut fds = vec![
            PollFd::new(control.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.events.as_fd(), PollFlags::POLLIN),
            PollFd::new(com1.drained(), drained),
            PollFd::new(output.timer(), PollFlags::POLLIN),
        ];
        // A console that is closed and has nothing to take reports POLLHUP for ever.
        if !console.is_empty() {
            fds.push(PollFd::new(output.socket(), console));
        }
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Ready::default()),
            Err(errno) => return Err(Error::system("wait for events")(errno)),
        }
        let fired = |index: usize| {
            fds.get(index)
                .and_then(PollFd::revents)
                .unwrap_or(PollFlags::empty())
        };
        let console = fired(4);
        let hung_up = PollFlags::POLLHUP | PollFlags::POLLERR;
        Ok(Ready {
            control: !fired(0).is_empty(),
            events: !fired(1).is_empty(),
            console_in: !fired(2).is_empty()
                || (input == Input::Open && console.intersects(PollFlags::POLLIN | hung_up)),
            console_out: !fired(3).is_empty() || console.intersects(PollFlags::POLLOUT | hung_up),
        })
    }

    /// Carries out one control message; `Some` when it ends the VM.
    fn serve(&mut self, control: &mut ControlSocket) -> Result<Option<EndReason>, Error> {
        match control.receive()? {
            Incoming::Message(message, fds) => self.obey(control, *message, fds),
            Incoming::Nothing => Ok(None),
            Incoming::Closed => Ok(Some(EndReason::Stopped)),
        }
    }

    fn obey(
        &mut self,
        control: &ControlSocket,
        message: Envelope<ToVmm>,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<EndReason>, Error> {
        let reply = match message.body {
            ToVmm::Stop => return Ok(Some(EndReason::Stopped)),
            ToVmm::PowerButton => done(self.platform.ports.press_power_button()),
            ToVmm::Stats => FromVmm::Stats(VmStats {
                exits: self.vcpus.exits(),
                console_dropped: self.platform.com1.output().dropped(),
                rekicks: self.devices.iter().map(Device::rekicks).sum(),
            }),
            ToVmm::ReplaceBackend { slot, generation } => {
                match self.replace_backend(message.id, slot, generation, fds) {
                    // The device's thread answers.
                    Ok(()) => return Ok(None),
                    Err(why) => FromVmm::Failed(why),
                }
            }
            ToVmm::ReleaseBackend { slot } => match self.device(slot) {
                Ok(device) => {
                    device.release(self.events.answer_to(message.id));
                    return Ok(None);
                }
                Err(why) => FromVmm::Failed(why),
            },
            ToVmm::GiveUpBackend { slot, reason } => match self.device(slot) {
                Ok(device) => {
                    device.give_up(&reason);
                    FromVmm::Done
                }
                Err(why) => FromVmm::Failed(why),
            },
            ToVmm::Attach(config) => match self.attach(message.id, *config, fds) {
                // Once its back end has answered.
                Ok(()) => return Ok(None),
                Err(why) => FromVmm::Failed(why),
            },
            ToVmm::Detach { slot } => self.detach(slot).unwrap_or_else(FromVmm::Failed),
            ToVmm::Start(_) => FromVmm::Failed("the machine is running".into()),
        };
        control.send(message.id, reply)?;
        Ok(None)
    }

    fn replace_backend(&self, id: u64, slot: u8, generation: u32, fds: Vec<OwnedFd>) -> Result<(), String> {
        let device = self.device(slot)?;
        let sockets = of_back_end(fds)?;
        let successor = Successor { sockets, generation };
        device.replace(successor, self.events.answer_to(id));
        Ok(())
    }

    fn report_devices(&mut self, control: &ControlSocket) -> Result<(), Error> {
        while let Some(word) = self.events.take_device() {
            match word {
                DeviceWord::Event(event) => {
                    if let Some(message) = told(event) {
                        control.send(0, message)?;
                    }
                }
                DeviceWord::Ejected(slot) => self.ejected(slot),
                DeviceWord::Answered(slot) => self.attached(slot, control)?,
                DeviceWord::Vacated(slot) => {
                    self.vacated(slot, control)?;
                    self.platform.hotplug.emptied(slot);
                }
                DeviceWord::Answer(id, Ok(())) => control.send(id, FromVmm::Done)?,
                DeviceWord::Answer(id, Err(why)) => control.send(id, FromVmm::Failed(why))?,
            }
        }
        Ok(())
    }

    /// The end that an event means; `None` for a reboot. `silent`: nothing was written to the
    /// console in this boot.
    fn judge(&self, event: GuestEvent, silent: bool) -> Option<EndReason> {
        let instant = silent && !self.devices.iter().any(Device::driven);
        match event {
            GuestEvent::PowerOff if self.takes_status => Some(EndReason::NoStatus),
            GuestEvent::PowerOff => Some(EndReason::PowerOff),
            GuestEvent::Exit(status) => Some(EndReason::Exited(status)),
            GuestEvent::Panic => Some(EndReason::Panic),
            GuestEvent::Reset | GuestEvent::TripleFault if instant => Some(EndReason::InstantReset),
            GuestEvent::TripleFault => Some(EndReason::TripleFault),
            GuestEvent::Reset => (!self.restart_on_reboot).then_some(EndReason::Reset),
            GuestEvent::KvmFailure(why) => {
                tracing::error!(why, "the guest cannot go on");
                Some(EndReason::KvmError)
            }
        }
    }

    /// Brings everything to power-on state and loads the boot images again. `Some` when the VM is to
    /// end instead.
    fn reset(&mut self, control: &mut ControlSocket) -> Result<Option<EndReason>, Error> {
        self.vcpus.hold()?;
        // What the guest let go of is on the bus no more.
        self.report_devices(control)?;
        self.platform.pci.begin_reset();
        if let Some(reason) = self.await_devices(control)? {
            return Ok(Some(reason));
        }
        self.platform.pci.finish_reset();
        self.platform.com1.reset();
        self.platform.ports.reset();
        self.router.reset(self.irqchip.as_ref())?;
        self.vcpus.reset()?;
        self.entry = self.images.load(self.vm.ram(), self.vm.cpus())?;
        self.events.forget_guest();
        if self.platform.hotplug.reset() {
            let told = self.platform.ports.tell_of_hotplug();
            told.map_err(Error::system("tell the guest of a device that is to go"))?;
        }
        Ok(None)
    }

    /// Serves the supervisor until all devices are reset: it must hear of a back end that is lost as its
    /// device is reset, and end its process, which could write where the boot images come to lie.
    fn await_devices(&mut self, control: &mut ControlSocket) -> Result<Option<EndReason>, Error> {
        let patience = self.devices.iter().map(Device::reset_deadline).max();
        let deadline = Instant::now() + patience.unwrap_or_default();
        while self.devices.iter().any(Device::is_resetting) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // Whoever finishes the resets says which it was.
                break;
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let ready = self.wait(control, Input::Closed, timeout)?;
            if ready.console_out {
                self.platform.com1.output().flush();
            }
            if ready.events {
                self.events.acknowledge();
                self.report_devices(control)?;
            }
            if ready.control
                && let Some(reason) = self.serve(control)?
            {
                return Ok(Some(reason));
            }
        }
        Ok(None)
    }

    /// Stops vCPUs, drains devices and lets the console take what it will.
    fn end(&self, reason: EndReason) -> EndReason {
        if let Err(error) = self.vcpus.hold() {
            // What the guest wrote is to be kept all the same.
            tracing::error!("{}", chain(&error));
        }
        self.devices.iter().for_each(Device::refuse_successors);
        self.platform.pci.reset();
        self.platform.com1.output().drain(Instant::now() + CONSOLE_DRAIN);
        reason
    }
}

fn told(event: DeviceEvent) -> Option<FromVmm> {
    match event {
        DeviceEvent::WasReset => None,
        DeviceEvent::BackendLost {
            device,
            generation,
            loss,
            outstanding,
            reason,
        } => {
            tracing::info!(device, reason, "back end lost");
            Some(FromVmm::BackendLost {
                device,
                generation,
                loss,
                outstanding,
                reason,
            })
        }
        DeviceEvent::NeedsReset { device, reason } => {
            tracing::info!(device, reason, "device needs a reset");
            Some(FromVmm::DeviceFault { device, reason })
        }
    }
}

/// What must come with a request that brings a back end.
pub(super) fn of_back_end(fds: Vec<OwnedFd>) -> Result<BackendSockets, String> {
    let fds = <[OwnedFd; BACKEND_FDS]>::try_from(fds).map_err(|fds| match fds.len() {
        0 => "no descriptors came with this request, or there was no room for them".to_owned(),
        count => format!("{count} descriptors came with this request, not {BACKEND_FDS}"),
    })?;
    Ok(fds.into())
}

pub(super) fn done(result: std::io::Result<()>) -> FromVmm {
    match result {
        Ok(()) => FromVmm::Done,
        Err(error) => FromVmm::Failed(error.to_string()),
    }
}
