//! The virtio-pci transport (virtio 1.3, 4.1), with one MSI-X vector a queue.

use crate::{
    boot::{FIRST_VECTOR, VECTORS},
    memory,
    mmio::Address,
    pci::Function,
    queue::Queue,
    scenario::Failure,
};
use guest_contract::machine;

/// VIRTIO_F_EVENT_IDX.
pub(crate) const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const DEVICE_NEEDS_RESET: u8 = 64;

// struct virtio_pci_common_cfg.
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const NUM_QUEUES: u64 = 18;
const DEVICE_STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_MSIX_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY_OFF: u64 = 30;
const QUEUE_DESC: u64 = 32;
const QUEUE_DRIVER: u64 = 40;
const QUEUE_DEVICE: u64 = 48;

const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const DEVICE: u8 = 4;

/// How often a register is looked at before the device counts as dead.
const PATIENCE: u32 = 10_000_000;

/// A virtio function that is being driven.
pub(crate) struct Device {
    common: Address,
    notify: Address,
    notify_multiplier: u64,
    /// Device-specific configuration.
    pub(crate) config: Address,
    /// Features that both sides took.
    pub(crate) features: u64,
    table: Address,
    pending: Address,
}

impl Device {
    /// Resets the function, and takes what it offers of `wanted`.
    pub(crate) fn new(function: Function, wanted: u64) -> Result<Self, Failure> {
        function.enable();
        let (notify, capability) = function.virtio_structure(NOTIFY)?;
        let msix = function.msix()?;
        let (table, pending) = (msix.read32(4), msix.read32(8));
        let in_bar = |word: u32| function.bar((word & 7) as u8).at(u64::from(word & !7));
        let mut device = Self {
            common: function.virtio_structure(COMMON)?.0,
            notify,
            notify_multiplier: u64::from(capability.read32(16)),
            config: function.virtio_structure(DEVICE)?.0,
            features: 0,
            table: in_bar(table),
            pending: in_bar(pending),
        };
        device.reset()?;
        device.negotiate(wanted | VERSION_1)?;
        // MSI-X on, whole function unmasked.
        let control = msix.read16(2);
        msix.write16(2, control & !0x4000 | 0x8000);
        Ok(device)
    }

    fn reset(&mut self) -> Result<(), Failure> {
        self.common.write8(DEVICE_STATUS, 0);
        for _ in 0..PATIENCE {
            if self.common.read8(DEVICE_STATUS) == 0 {
                return Ok(());
            }
        }
        Err("the device does not reset")
    }

    /// Looks at the status until the device asks to be reset.
    pub(crate) fn await_needs_reset(&self) -> Result<(), Failure> {
        for _ in 0..PATIENCE {
            if self.common.read8(DEVICE_STATUS) & DEVICE_NEEDS_RESET != 0 {
                return Ok(());
            }
        }
        Err("the device does not ask for a reset")
    }

    fn add_status(&self, bits: u8) {
        let status = self.common.read8(DEVICE_STATUS);
        self.common.write8(DEVICE_STATUS, status | bits);
    }

    fn negotiate(&mut self, wanted: u64) -> Result<(), Failure> {
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            self.common.write32(DEVICE_FEATURE_SELECT, half);
            offered |= u64::from(self.common.read32(DEVICE_FEATURE)) << (32 * half);
        }
        self.features = offered & wanted;
        if self.features & VERSION_1 == 0 {
            return Err("the device does not offer VERSION_1");
        }
        for half in 0..2 {
            self.common.write32(DRIVER_FEATURE_SELECT, half);
            self.common
                .write32(DRIVER_FEATURE, (self.features >> (32 * half)) as u32);
        }
        self.add_status(FEATURES_OK);
        if self.common.read8(DEVICE_STATUS) & FEATURES_OK == 0 {
            return Err("the device refuses its own features");
        }
        Ok(())
    }

    /// Queues that the device has.
    pub(crate) fn num_queues(&self) -> u16 {
        self.common.read16(NUM_QUEUES)
    }

    /// Sets queue `index` up, with at most `most` entries and an MSI-X vector of its own: entry
    /// `index + 1` of the table, device vector `index` of the guest.
    pub(crate) fn queue(&self, index: u16, most: u16) -> Result<Queue, Failure> {
        self.common.write16(QUEUE_SELECT, index);
        let offered = self.common.read16(QUEUE_SIZE);
        if offered == 0 || u64::from(index) + 1 >= u64::from(VECTORS) {
            return Err("the queue does not exist");
        }
        let size = offered.min(most);
        let entry = index + 1;
        self.set_vector(entry, FIRST_VECTOR + index as u8);
        self.common.write16(QUEUE_SIZE, size);
        self.common.write16(QUEUE_MSIX_VECTOR, entry);
        if self.common.read16(QUEUE_MSIX_VECTOR) != entry {
            return Err("the device has no vector for the queue");
        }
        let doorbell = u64::from(self.common.read16(QUEUE_NOTIFY_OFF)) * self.notify_multiplier;
        let ring = memory::pages(Queue::footprint(size))?;
        let queue = Queue::new(
            ring,
            index,
            size,
            self.notify.at(doorbell),
            self.features & EVENT_IDX != 0,
        );
        let [descriptors, driver, device] = queue.addresses();
        self.common.write64(QUEUE_DESC, descriptors);
        self.common.write64(QUEUE_DRIVER, driver);
        self.common.write64(QUEUE_DEVICE, device);
        self.common.write16(QUEUE_ENABLE, 1);
        Ok(queue)
    }

    /// The driver is ready.
    pub(crate) fn start(&self) {
        self.add_status(DRIVER_OK);
    }

    fn set_vector(&self, entry: u16, vector: u8) {
        let entry = self.table.at(u64::from(entry) * 16);
        entry.write32(0, machine::LOCAL_APIC as u32);
        entry.write32(4, 0);
        entry.write32(8, u32::from(vector));
        entry.write32(12, 0);
    }

    /// Masks or unmasks the vector of queue `index`.
    pub(crate) fn set_mask(&self, index: u16, mask: Mask) {
        let control = self.table.at((u64::from(index) + 1) * 16);
        control.write32(12, mask as u32);
    }

    /// Whether the vector of queue `index` is pending.
    pub(crate) fn is_pending(&self, index: u16) -> bool {
        let bit = u32::from(index) + 1;
        self.pending.read32(u64::from(bit / 32 * 4)) >> (bit % 32) & 1 == 1
    }
}

/// The mask bit of an MSI-X table entry.
#[derive(Clone, Copy)]
pub(crate) enum Mask {
    Unmasked = 0,
    Masked = 1,
}
