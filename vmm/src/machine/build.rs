//! From a `VmConfig` to a machine that is ready to run. vCPUs are made, and back ends answer,
//! while boot images are copied.

use super::events::Events;
use super::exits::Platform;
use super::ports::Ports;
use super::run::Machine;
use super::vcpus::Vcpus;
use crate::boot::{BootImages, Image};
use crate::control::adopt_config;
use crate::error::Error;
use crate::frontend::{Deadlines, MemoryTable, RequestSockets};
use crate::kvm::{EventRouter, InKernel, Irqchip, Vm, install_kick_handler};
use crate::memory::GuestRam;
use crate::pci::PciBus;
use crate::platform::{Gsi, Interrupts};
use crate::serial::{Com1, ConsoleOutput};
use crate::virtio::{Connecting, Device, DeviceParts};
use jailer::sandbox::{Role, SeccompMode, lockdown_thread};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vm_spec::control::{FdNumber, VmConfig};
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

    /// Builds everything up to, but not including, the main thread's lockdown.
    ///
    /// # Errors
    /// What failed first.
    pub fn build(mut self) -> Result<Machine, Error> {
        install_kick_handler()?;
        let config = &self.config;
        let ram = Arc::new(GuestRam::new(config.memory, config.huge_page_size)?);
        let kvm = self.descriptors.take(config.kvm)?;
        let irqchip = Box::new(InKernel) as Box<dyn Irqchip>;
        let vm = Arc::new(Vm::new(kvm, ram.clone(), config.cpus, irqchip.as_ref())?);
        let events = Arc::new(Events::new().map_err(Error::system("make an eventfd"))?);
        let vcpus = Vcpus::spawn(&vm, &events, self.options.seccomp)?;
        let router = Arc::new(EventRouter::new(&vm)?);
        let connecting = self.connect_devices(&ram, &router, &events)?;
        let images = self.images()?;
        let entry = images.load(&ram, self.config.cpus)?;
        let com1 = self.com1(&router)?;
        let ports = Ports::new().map_err(Error::system("make an eventfd"))?;
        router
            .attach(Gsi(machine::GED_GSI), ports.interrupt())
            .map_err(Error::system("connect the event device's interrupt"))?;
        let mut pci = PciBus::new();
        let devices = finish_devices(connecting, &mut pci)?;
        vcpus.ready()?;
        Ok(Machine {
            vcpus,
            devices,
            platform: Arc::new(Platform { com1, ports, pci }),
            router,
            irqchip,
            events,
            images,
            vm,
            entry,
            restart_on_reboot: self.config.restart_on_reboot,
            seccomp: self.options.seccomp,
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

    fn images(&mut self) -> Result<BootImages, Error> {
        let kernel = Image::new(self.descriptors.take(self.config.kernel)?, "kernel")?;
        let initrd = match self.config.initrd {
            Some(number) => Some(Image::new(self.descriptors.take(number)?, "initrd")?),
            None => None,
        };
        Ok(BootImages {
            kernel,
            initrd,
            cmdline: std::mem::take(&mut self.config.cmdline),
        })
    }

    fn connect_devices(
        &mut self,
        ram: &GuestRam,
        router: &Arc<EventRouter>,
        events: &Arc<Events>,
    ) -> Result<Vec<Connecting>, Error> {
        let devices = std::mem::take(&mut self.config.devices);
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        let memory = MemoryTable::of(ram).map_err(Error::system("duplicate the memory's descriptor"))?;
        let memory = Arc::new(memory);
        let mut connecting = Vec::new();
        for config in devices {
            let device = config.id.clone();
            let failed = |source| Error::Device {
                device: device.clone(),
                source: Box::new(source),
            };
            let ours = self.descriptors.take(config.requests)?;
            let theirs = self.descriptors.take(config.requests_peer)?;
            let events = events.clone();
            let mode = self.options.seccomp;
            let parts = DeviceParts {
                socket: self.descriptors.take(config.socket)?,
                requests: RequestSockets::new(ours, theirs).map_err(failed)?,
                config,
                memory: memory.clone(),
                interrupts: router.clone(),
                doorbells: router.clone(),
                events: Arc::new(move |event| events.tell_device(event)),
                deadlines: Deadlines::default(),
                confine: Box::new(move || lockdown_thread(Role::Vmm, mode).map_err(io::Error::other)),
            };
            connecting.push(Device::connect(parts).map_err(|e| failed(e.cause))?);
        }
        Ok(connecting)
    }
}

fn finish_devices(connecting: Vec<Connecting>, pci: &mut PciBus) -> Result<Vec<Device>, Error> {
    let mut devices = Vec::new();
    for device in connecting {
        let device = device.finish().map_err(|error| Error::Device {
            device: error.device,
            source: Box::new(error.cause),
        })?;
        pci.add(device.slot(), device.function())
            .map_err(|taken| Error::Config(taken.to_string()))?;
        devices.push(device);
    }
    Ok(devices)
}
