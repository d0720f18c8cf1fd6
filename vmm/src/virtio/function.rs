//! A virtio device as a PCI function: configuration space, one BAR, and what the driver does
//! through them.

use super::device::WorkerHandle;
use super::layout::{self, BAR_HIGH, BAR_LOW, Places};
use super::transport::{Transport, lock};
use crate::pci::{ConfigSpace, Function, Window, command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vm_spec::machine::VIRTIO_BAR_SIZE;

/// [`VirtioFunction::window`] while no memory is decoded: no BAR starts at an odd address.
const NOT_DECODED: u64 = u64::MAX;
/// `struct virtio_pci_cfg_cap`: offsets in the capability (virtio 1.3, 4.1.4.9).
const CFG_BAR: usize = 4;
const CFG_OFFSET: usize = 8;
const CFG_LENGTH: usize = 12;
const CFG_DATA: usize = 16;
const CFG_DATA_SIZE: usize = 4;

pub(super) struct VirtioFunction {
    transport: Arc<Transport>,
    worker: Arc<WorkerHandle>,
    space: Mutex<ConfigSpace>,
    power_on: ConfigSpace,
    places: Places,
    /// Where the BAR is decoded, so that the bus finds it without a lock.
    window: AtomicU64,
}

impl VirtioFunction {
    pub(super) fn new(
        transport: Arc<Transport>,
        worker: Arc<WorkerHandle>,
        (space, places): (ConfigSpace, Places),
    ) -> Self {
        Self {
            transport,
            worker,
            power_on: space.clone(),
            space: Mutex::new(space),
            places,
            window: AtomicU64::new(NOT_DECODED),
        }
    }

    /// Makes decoding, doorbells and MSI-X agree with configuration space.
    fn settle(&self, space: &ConfigSpace) {
        let low = u32::from_le_bytes(space.get(BAR_LOW)) & !0xF;
        let high = u32::from_le_bytes(space.get(BAR_HIGH));
        let base = u64::from(high) << 32 | u64::from(low);
        let decoded = (space.command() & command::MEMORY != 0).then_some(base);
        self.window
            .store(decoded.unwrap_or(NOT_DECODED), Ordering::Release);
        lock(&self.transport.msix).set_control(u16::from_le_bytes(space.get(self.places.msix_control)));
        lock(&self.transport.doorbells).move_bar(decoded);
    }

    /// The BAR access, its offset and width, that the driver has set up in the PCI configuration access
    /// capability, when one of `length` bytes at `offset` touches its data and the other fields are as they
    /// must be (4.1.4.9.1).
    fn window_access(&self, space: &ConfigSpace, offset: u16, length: usize) -> Option<(u64, usize)> {
        let capability = self.places.pci_cfg;
        let (start, data) = (usize::from(offset), capability + CFG_DATA);
        if start >= data + CFG_DATA_SIZE || start + length <= data {
            return None;
        }
        let [bar] = space.get(capability + CFG_BAR);
        let at = u32::from_le_bytes(space.get(capability + CFG_OFFSET));
        let width = u32::from_le_bytes(space.get(capability + CFG_LENGTH));
        let sound = matches!(width, 1 | 2 | 4) && at.is_multiple_of(width);
        let end = u64::from(at) + u64::from(width);
        (bar == 0 && sound && end <= VIRTIO_BAR_SIZE).then_some((at.into(), width as usize))
    }
}

impl Function for VirtioFunction {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut space = lock(&self.space);
        if let Some((at, width)) = self.window_access(&space, offset, data.len()) {
            let field = self.places.pci_cfg + CFG_DATA;
            let mut bytes: [u8; CFG_DATA_SIZE] = space.get(field);
            self.transport.bar_read(at, &mut bytes[..width]);
            space.put(field, u32::from_le_bytes(bytes), !0);
        }
        space.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut space = lock(&self.space);
        let before = space.command();
        space.write(offset, data);
        if let Some((at, width)) = self.window_access(&space, offset, data.len()) {
            let bytes: [u8; CFG_DATA_SIZE] = space.get(self.places.pci_cfg + CFG_DATA);
            self.transport.bar_write(at, &bytes[..width]);
        }
        // Under the lock: two vCPUs that move the BAR do so one after the other.
        self.settle(&space);
        let after = space.command();
        if (before ^ after) & command::BUS_MASTER != 0 {
            self.transport.set_bus_master(after & command::BUS_MASTER != 0);
        }
    }

    fn window(&self) -> Option<Window> {
        match self.window.load(Ordering::Acquire) {
            NOT_DECODED => None,
            base => Some(Window {
                base,
                size: VIRTIO_BAR_SIZE,
            }),
        }
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        self.transport.bar_read(offset, data);
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        self.transport.bar_write(offset, data);
    }

    fn begin_reset(&self) {
        lock(&self.transport.registers).begin_reset();
        self.worker.begin_reset();
    }

    fn finish_reset(&self) {
        self.worker.finish_reset();
        self.transport.driven.store(false, Ordering::Relaxed);
        lock(&self.transport.msix).reset();
        // As one that was never switched off.
        self.transport.mailbox.set_bus_master(true);
        let mut space = lock(&self.space);
        *space = self.power_on.clone();
        self.settle(&space);
    }
}

const _: () = assert!(layout::NOTIFY.end <= VIRTIO_BAR_SIZE);
