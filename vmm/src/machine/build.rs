//! From a `VmConfig` to a machine that is ready to run. vCPUs are made, and back ends answer,
//! while boot images are copied.

use super::early::{self, Early};
use super::events::Events;
use super::exits::Platform;
use super::hotplug::{self, Hotplug};
use super::ports::Ports;
use super::run::Machine;
use super::slots::Slots;
use super::vcpus::Vcpus;
use crate::boot::{BootImages, Image};
use crate::control::{ControlSocket, adopt_config};
use crate::error::Error;
use crate::frontend::{BackendSockets, Deadlines, MemoryTable};
use crate::kvm::{EventRouter, Host, InKernel, Irqchip, Vm, install_kick_handler};
use crate::memory::GuestRam;
use crate::pci::PciBus;
use crate::platform::{Gsi, Interrupts};
use crate::serial::{Com1, ConsoleOutput};
use crate::virtio::{Confine, Connecting, Device, DeviceError, DeviceParts, Seat, Successor, Word};
use jailer::sandbox::{Role, SeccompMode, lockdown_thread};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;
use vm_spec::control::{DeviceConfig, FdNumber, Loss, VmConfig};
use vm_spec::machine;

/// How this process is to behave, from its command line.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What the system call filters do.
    pub seccomp: SeccompMode,
}

/// Owned descriptors by the number that the configuration gives them.
struct Descriptors(BTreeMap<i32, OwnedFd>);

impl Descriptors {
    fn take(&mut self, number: FdNumber) -> Result<OwnedFd, Error> {
        self.0
            .remove(&number.0)
            .ok_or_else(|| Error::Config(format!("descriptor {} is named twice", number.0)))
    }
}

/// Builds one machine.
pub struct Build {
    config: VmConfig,
    options: Options,
    descriptors: Descriptors,
}

impl Build {
    /// Checks `config` and takes the descriptors that it names. `control` is the number of the
    /// control socket, which is not among them.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn new(config: VmConfig, control: i32, options: Options) -> Result<Self, Error> {
        if config.machine_version != machine::MACHINE_VERSION {
            return Err(Error::Config(format!(
                "machine version {} is not one of this build's ({})",
                config.machine_version,
                machine::MACHINE_VERSION
            )));
        }
        if !(1..=machine::MAX_CPUS).contains(&config.cpus) {
            return Err(Error::Config(format!(
                "{} vCPUs: 1 to {} are possible",
                config.cpus,
                machine::MAX_CPUS
            )));
        }
        let descriptors = Descriptors(adopt_config(&config, control)?);
        Ok(Self {
            config,
            options,
            descriptors,
        })
    }

    /// Builds everything up to, but not including, the main thread's lockdown. On `control` a back
    /// end that is lost meanwhile is replaced.
    ///
    /// # Errors
    /// What failed first.
    pub fn build(mut self, control: &mut ControlSocket) -> Result<Machine, Error> {
        install_kick_handler()?;
        let config = &self.config;
        // First, as its answer takes longest.
        let host = Host::new(self.descriptors.take(config.kvm)?, config.cpus)?;
        let ram = Arc::new(GuestRam::new(config.memory, config.huge_page_size)?);
        let irqchip = Box::new(InKernel) as Box<dyn Irqchip>;
        let vm = Arc::new(Vm::new(host, ram.clone(), irqchip.as_ref())?);
        let events = Arc::new(Events::new().map_err(Error::system("make an eventfd"))?);
        let vcpus = Vcpus::spawn(&vm, &events, self.options.seccomp)?;
        let router = Arc::new(EventRouter::new(&vm));
        let hotplug_slots = self.hotplug_slots();
        let (connector, connecting) = self.connect_devices(&ram, &router, &events)?;
        let spares = self.seats(&connector)?;
        let images = self.images(hotplug_slots)?;
        let entry = images.load(&ram, self.config.cpus)?;
        let com1 = self.com1(&router)?;
        let ports = Ports::new().map_err(Error::system("make an eventfd"))?;
        router
            .attach(Gsi(machine::GED_GSI), ports.interrupt())
            .map_err(Error::system("connect the event device's interrupt"))?;
        let pci = PciBus::new(self.config.takes_status);
        let mut early = Early::new(control);
        let devices = connector.finish(connecting, &pci, &mut early)?;
        let early = early.unheard();
        Ok(Machine {
            vcpus,
            devices,
            slots: Slots::new(connector, spares),
            platform: Arc::new(Platform {
                com1,
                ports,
                pci,
                hotplug: Hotplug::new(hotplug_slots),
                events: events.clone(),
            }),
            router,
            irqchip,
            events,
            images,
            vm,
            entry,
            restart_on_reboot: self.config.restart_on_reboot,
            takes_status: self.config.takes_status,
            seccomp: self.options.seccomp,
            early,
        })
    }

    fn com1(&mut self, router: &EventRouter) -> Result<Com1, Error> {
        let console = self.descriptors.take(self.config.console)?;
        let output = ConsoleOutput::new(console).map_err(Error::system("set up the console"))?;
        let com1 = Com1::new(Arc::new(output)).map_err(Error::system("set up COM1"))?;
        router
            .attach(Gsi(machine::COM1_GSI), com1.interrupt())
            .map_err(Error::system("connect COM1's interrupt"))?;
        Ok(com1)
    }

    /// Slots whose devices may come and go, a bit each: all, where any is kept for later.
    fn hotplug_slots(&self) -> u32 {
        let (devices, spares) = (&self.config.devices, &self.config.spares);
        let slots = devices.iter().map(|device| device.slot);
        let all = slots.chain(spares.iter().copied());
        match spares.is_empty() {
            true => 0,
            false => all.fold(0, |bits, slot| bits | hotplug::bit(slot)),
        }
    }

    /// The threads of devices that come later.
    fn seats(&self, connector: &Connector) -> Result<BTreeMap<u8, Seat>, Error> {
        let seat = |slot: u8| {
            let seat = Seat::confined(slot, connector.confine());
            seat.map(|seat| (slot, seat)).map_err(|source| Error::Device {
                device: format!("the device in slot {slot}"),
                source: Box::new(source),
            })
        };
        self.config.spares.iter().copied().map(seat).collect()
    }

    fn images(&mut self, hotplug_slots: u32) -> Result<BootImages, Error> {
        let kernel = Image::new(self.descriptors.take(self.config.kernel)?, "kernel")?;
        let initrd = match self.config.initrd {
            Some(number) => Some(Image::new(self.descriptors.take(number)?, "initrd")?),
            None => None,
        };
        Ok(BootImages {
            kernel,
            initrd,
            cmdline: std::mem::take(&mut self.config.cmdline),
            hotplug_slots,
        })
    }

    fn connect_devices(
        &mut self,
        ram: &GuestRam,
        router: &Arc<EventRouter>,
        events: &Arc<Events>,
    ) -> Result<(Connector, Vec<Connecting>), Error> {
        let memory = MemoryTable::of(ram).map_err(Error::system("duplicate the memory's descriptor"))?;
        let devices = std::mem::take(&mut self.config.devices);
        let connector = Connector {
            memory: Arc::new(memory),
            router: router.clone(),
            events: events.clone(),
            seccomp: self.options.seccomp,
        };
        let connecting = devices
            .into_iter()
            .map(|config| {
                let sockets = BackendSockets {
                    socket: self.descriptors.take(config.socket)?,
                    requests: self.descriptors.take(config.requests)?,
                    requests_peer: self.descriptors.take(config.requests_peer)?,
                };
                let first = Successor {
                    sockets,
                    generation: 0,
                };
                connector.connect(config, first)
            })
            .collect::<Result<_, Error>>()?;
        Ok((connector, connecting))
    }
}

/// What every device is made with.
pub(super) struct Connector {
    memory: Arc<MemoryTable>,
    router: Arc<EventRouter>,
    events: Arc<Events>,
    seccomp: SeccompMode,
}

impl Connector {
    fn connect(&self, config: DeviceConfig, back_end: Successor) -> Result<Connecting, Error> {
        let seat = Seat::new(config.slot, self.confine()).map_err(|source| Error::Device {
            device: config.id.clone(),
            source: Box::new(source),
        })?;
        let connecting = self.seat(seat, config, back_end, None);
        connecting.map_err(|(error, _)| failed(error))
    }

    /// Has `seat` serve a device; `answered` is called once its back end has answered, or will not.
    ///
    /// # Errors
    /// Why it cannot. The seat comes back.
    pub(super) fn seat(
        &self,
        seat: Seat,
        config: DeviceConfig,
        back_end: Successor,
        answered: Option<Word>,
    ) -> Result<Connecting, (DeviceError, Seat)> {
        let events = self.events.clone();
        let parts = DeviceParts {
            sockets: back_end.sockets,
            generation: back_end.generation,
            config,
            memory: self.memory.clone(),
            interrupts: self.router.clone(),
            doorbells: self.router.clone(),
            events: Arc::new(move |event| events.tell_device(event)),
            deadlines: Deadlines::default(),
            answered,
        };
        seat.connect(parts)
    }

    fn confine(&self) -> Confine {
        let mode = self.seccomp;
        Box::new(move || lockdown_thread(Role::Vmm, mode).map_err(io::Error::other))
    }

    fn finish(
        &self,
        connecting: Vec<Connecting>,
        pci: &PciBus,
        early: &mut Early<'_>,
    ) -> Result<Vec<Device>, Error> {
        let mut devices = Vec::new();
        for device in connecting {
            let device = self.finish_one(device, early)?;
            pci.add(device.slot(), device.function())
                .map_err(|taken| Error::Config(taken.to_string()))?;
            devices.push(device);
        }
        Ok(devices)
    }

    /// Waits for a device's back end, and for others in its place where it is lost. Someone else's that
    /// hangs or answers nonsense before the guest runs is a mistake of whoever named it; one that is gone
    /// may be about to be started again, but not for ever.
    fn finish_one(&self, connecting: Connecting, early: &mut Early<'_>) -> Result<Device, Error> {
        let config = connecting.config().clone();
        let begun = Instant::now();
        let replaceable = |loss| config.ours || loss == Loss::Closed && begun.elapsed() < early::DEADLINE;
        let mut generation = 0;
        let mut finished = connecting.finish();
        loop {
            let error = match finished {
                Ok(device) => return Ok(device),
                Err((error, _)) => error,
            };
            let (id, next) = match error.cause.loss() {
                Some(loss) if replaceable(loss) => {
                    early.replacement(&config, generation, loss, &error.cause)?
                }
                _ => None,
            }
            .ok_or_else(|| failed(error))?;
            generation = next.generation;
            finished = self.connect(config.clone(), next)?.finish();
            early.answer(id, finished.as_ref().map(drop).map_err(|(error, _)| error))?;
        }
    }
}

fn failed(error: DeviceError) -> Error {
    Error::Device {
        device: error.device,
        source: Box::new(error.cause),
    }
}
