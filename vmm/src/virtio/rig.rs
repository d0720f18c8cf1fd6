//! A device on a bus, with a scripted back end and a driver's first steps.

use super::layout::{COMMON, DEVICE, TABLE};
use super::{Confine, Device, DeviceError, DeviceEvent, DeviceParts, Seat, Successor};
use crate::frontend::fake_backend::{FakeBackend, Script, deadlines, memory};
use crate::frontend::{BackendSockets, Deadlines, Error, MemoryTable};
use crate::pci::PciBus;
use crate::pci::fakes::{FakeDoorbells, FakeInterrupts};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use vm_spec::control::{DeviceConfig, FdNumber};
use vm_spec::machine::{MMIO32_START, VIRTIO_BAR_SIZE};

pub(crate) const SLOT: u8 = 3;
pub(crate) const BAR: u64 = MMIO32_START + SLOT as u64 * VIRTIO_BAR_SIZE;
pub(crate) const CONFIG: u64 = (SLOT as u64) << 15;

pub(crate) struct Rig {
    pub(crate) bus: PciBus,
    pub(crate) device: Device,
    pub(crate) fake: FakeBackend,
    pub(crate) interrupts: Arc<FakeInterrupts>,
    pub(crate) doorbells: Arc<FakeDoorbells>,
    pub(crate) memory: Arc<MemoryTable>,
    pub(crate) events: Receiver<DeviceEvent>,
}

/// A block device of two queues.
pub(crate) fn spec() -> DeviceConfig {
    DeviceConfig {
        id: "disk0".into(),
        slot: SLOT,
        device_type: 2,
        socket: FdNumber(-1),
        requests: FdNumber(-1),
        requests_peer: FdNumber(-1),
        num_queues: Some(2),
        queue_size: None,
        config: Vec::new(),
        config_features: 0,
        ours: true,
        in_order: false,
    }
}

/// A back end with VIRTIO_BLK_F_MQ, four queues and a configuration space of 60 bytes.
pub(crate) fn script() -> Script {
    let script = Script::default();
    let mut config = vec![0; 60];
    config[0] = 8;
    config[34] = 4;
    *script.config.lock().unwrap() = config;
    Script {
        features: script.features | 1 << 12 | 1 << 34 | 1 << 40,
        ..script
    }
}

/// A device on a thread of its own.
pub(crate) fn device(parts: DeviceParts, confine: Confine) -> Result<Device, DeviceError> {
    let seat = Seat::new(parts.config.slot, confine).unwrap();
    let connecting = seat.connect(parts).map_err(|(error, _)| error)?;
    connecting.finish().map_err(|(error, _)| error)
}

impl Rig {
    pub(crate) fn new(script: Script) -> Self {
        Self::with(spec(), script)
    }

    /// A block device whose back end is given other times.
    pub(crate) fn with_deadlines(script: Script, deadlines: Deadlines) -> Self {
        Self::build(spec(), script, deadlines)
    }

    pub(crate) fn with(config: DeviceConfig, script: Script) -> Self {
        Self::build(config, script, deadlines())
    }

    pub(crate) fn build(config: DeviceConfig, script: Script, deadlines: Deadlines) -> Self {
        let (fake, sockets) = FakeBackend::start(script);
        let interrupts = Arc::new(FakeInterrupts::default());
        let doorbells = Arc::new(FakeDoorbells::default());
        let (sender, events) = channel();
        let memory = memory();
        let parts = DeviceParts {
            config,
            sockets,
            memory: memory.clone(),
            interrupts: interrupts.clone(),
            doorbells: doorbells.clone(),
            events: Arc::new(move |event| drop(sender.send(event))),
            deadlines,
            generation: 0,
            answered: None,
        };
        let device = device(parts, Box::new(|| Ok(()))).unwrap();
        let bus = PciBus::new(false);
        bus.add(SLOT, device.function()).unwrap();
        Self {
            bus,
            device,
            fake,
            interrupts,
            doorbells,
            memory,
            events,
        }
    }

    pub(crate) fn set_command(&self, command: u16) {
        self.bus.ecam_write(CONFIG + 4, &command.to_le_bytes());
    }

    pub(crate) fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        assert!(self.bus.mmio_read(BAR + offset, &mut data));
        data
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        assert!(self.bus.mmio_write(BAR + offset, data));
    }

    pub(crate) fn status(&self) -> u8 {
        self.read::<1>(COMMON.start + 20)[0]
    }

    pub(crate) fn set_status(&self, status: u8) {
        self.write(COMMON.start + 20, &[status]);
    }

    pub(crate) fn generation(&self) -> u8 {
        self.read::<1>(COMMON.start + 21)[0]
    }

    pub(crate) fn config(&self, offset: u64) -> u8 {
        self.read::<1>(DEVICE.start + offset)[0]
    }

    pub(crate) fn accept_features(&self, features: u64) {
        for (select, word) in [features as u32, (features >> 32) as u32].into_iter().enumerate() {
            self.write(8, &(select as u32).to_le_bytes());
            self.write(12, &word.to_le_bytes());
        }
    }

    pub(crate) fn offered(&self) -> u64 {
        let word = |select: u32| {
            self.write(0, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.read(4)))
        };
        word(0) | word(1) << 32
    }

    pub(crate) fn set_up_queue(&self, queue: u16, vector: u16) {
        let base = 0x1_0000 * (u64::from(queue) + 1);
        self.write(22, &queue.to_le_bytes());
        self.write(24, &64u16.to_le_bytes());
        self.write(26, &vector.to_le_bytes());
        for (i, area) in [base, base + 0x4000, base + 0x8000].into_iter().enumerate() {
            self.write(32 + 8 * i as u64, &area.to_le_bytes());
        }
        self.write(28, &1u16.to_le_bytes());
    }

    /// Where the used index of `queue` lies.
    pub(crate) fn used_index(queue: u64) -> u64 {
        0x1_0000 * (queue + 1) + 0x8002
    }

    pub(crate) fn queue_enabled(&self, queue: u16) -> bool {
        self.write(22, &queue.to_le_bytes());
        self.read::<2>(28) == [1, 0]
    }

    pub(crate) fn program_vector(&self, vector: u64) {
        let entry = TABLE.start + 16 * vector;
        self.write(entry, &0xFEE0_0000u64.to_le_bytes());
        self.write(entry + 8, &(0x40 + vector as u32).to_le_bytes());
        self.write(entry + 12, &0u32.to_le_bytes());
    }

    /// Enables MSI-X in the capability list.
    pub(crate) fn enable_msix(&self) {
        let control = self.capability(0x11, None) + 2;
        self.bus
            .ecam_write(CONFIG + u64::from(control), &0x8000u16.to_le_bytes());
    }

    /// Where the capability `id` (of virtio type `kind`) lies.
    pub(crate) fn capability(&self, id: u8, kind: Option<u8>) -> u8 {
        let byte = |offset: u8| {
            let mut data = [0];
            self.bus.ecam_read(CONFIG + u64::from(offset), &mut data);
            data[0]
        };
        let mut at = byte(0x34);
        for _ in 0..16 {
            if byte(at) == id && kind.is_none_or(|kind| byte(at + 3) == kind) {
                return at;
            }
            at = byte(at + 1);
        }
        panic!("no capability {id:#x} {kind:?}");
    }

    /// From power-on to DRIVER_OK with both queues on vectors 1 and 2, configuration on 0.
    pub(crate) fn drive(&self) {
        self.drive_with(!0);
    }

    /// The same with a driver that knows only these features.
    pub(crate) fn drive_with(&self, known: u64) {
        self.set_command(6);
        self.set_up_with(known);
    }

    /// The same with the command register as it is.
    pub(crate) fn set_up_with(&self, known: u64) {
        self.enable_msix();
        (0..3).for_each(|vector| self.program_vector(vector));
        self.set_status(1);
        self.set_status(3);
        self.accept_features(self.offered() & known);
        self.set_status(11);
        assert_eq!(self.status(), 11, "FEATURES_OK is accepted");
        self.write(16, &0u16.to_le_bytes());
        self.set_up_queue(0, 1);
        self.set_up_queue(1, 2);
        self.set_status(15);
    }

    pub(crate) fn wait_for(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !done(self) {
            assert!(Instant::now() < deadline, "waited in vain for {what}");
            std::thread::yield_now();
        }
    }

    /// Hands the device another back end, and waits for what becomes of it.
    pub(crate) fn replace(&self, sockets: BackendSockets) -> Result<(), Error> {
        let (give, take) = channel();
        let successor = Successor {
            sockets,
            generation: 1,
        };
        self.device
            .replace(successor, Box::new(move |result| drop(give.send(result))));
        take.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    pub(crate) fn event(&self) -> DeviceEvent {
        self.events.recv_timeout(Duration::from_secs(10)).unwrap()
    }
}
