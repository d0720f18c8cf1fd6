//! Where each structure lies in the function's one BAR, and the capabilities that say so
//! (virtio 1.3, 4.1.4).

use super::device_type::DeviceType;
use crate::frontend::MAX_QUEUES;
use crate::pci::{ConfigSpace, Identity, MSIX_CAPABILITY_ID, MSIX_ENTRY_SIZE, VENDOR_VIRTIO};
use std::ops::Range;
use vm_spec::machine::VIRTIO_BAR_SIZE;

/// Common configuration.
pub(super) const COMMON: Range<u64> = 0..0x40;
/// ISR status.
pub(super) const ISR: Range<u64> = 0x1000..0x1001;
/// Device-specific configuration: the most that fits; the device may have less.
pub(super) const DEVICE: Range<u64> = 0x2000..0x3000;
/// MSI-X table: MAX_QUEUES + 1 vectors at most.
pub(super) const TABLE: Range<u64> = 0x8000..0x1_0000;
/// MSI-X pending bits.
pub(super) const PBA: Range<u64> = 0x1_0000..0x1_1000;
/// Doorbells, [`NOTIFY_MULTIPLIER`] bytes a queue.
pub(super) const NOTIFY: Range<u64> = 0x4_0000..0x4_0400;
/// Bytes from one queue's doorbell to the next one's (notify_off_multiplier).
pub(super) const NOTIFY_MULTIPLIER: u64 = 4;

const _: () = {
    assert!(NOTIFY.end - NOTIFY.start == MAX_QUEUES as u64 * NOTIFY_MULTIPLIER);
    assert!((MAX_QUEUES as u64 + 1) * MSIX_ENTRY_SIZE <= TABLE.end - TABLE.start);
    assert!(NOTIFY.end <= VIRTIO_BAR_SIZE && VIRTIO_BAR_SIZE.is_power_of_two());
};

/// BAR 0, low half.
pub(super) const BAR_LOW: usize = 0x10;
/// BAR 0, high half.
pub(super) const BAR_HIGH: usize = 0x14;
/// A memory BAR of 64 bits, not prefetchable: reading the ISR clears it (PCI 3.0, 6.2.5.1).
const BAR_64_BIT: u32 = 0b100;

const CAP_VENDOR: u8 = 0x09;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI_CFG: u8 = 5;

/// Where in configuration space the registers lie that do more than store.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    /// The `VIRTIO_PCI_CAP_PCI_CFG` capability.
    pub(super) pci_cfg: usize,
    /// MSI-X message control.
    pub(super) msix_control: usize,
}

/// Configuration space at power-on.
pub(super) fn config_space(
    device_type: DeviceType,
    bar: u64,
    vectors: u16,
    config_length: usize,
) -> (ConfigSpace, Places) {
    let id = 0x1040 + device_type.0;
    let mut space = ConfigSpace::new(Identity {
        vendor: VENDOR_VIRTIO,
        device: id,
        revision: 1,
        class: device_type.class(),
        subsystem_vendor: VENDOR_VIRTIO,
        subsystem: id,
    });
    let mask = !(VIRTIO_BAR_SIZE - 1);
    space.put(BAR_LOW, bar as u32 | BAR_64_BIT, mask as u32);
    space.put(BAR_HIGH, (bar >> 32) as u32, (mask >> 32) as u32);
    structure(&mut space, CAP_COMMON, &COMMON, &[]);
    structure(&mut space, CAP_ISR, &ISR, &[]);
    if config_length > 0 {
        let device = DEVICE.start..DEVICE.end.min(DEVICE.start + config_length as u64);
        structure(&mut space, CAP_DEVICE, &device, &[]);
    }
    let multiplier = (NOTIFY_MULTIPLIER as u32).to_le_bytes();
    structure(&mut space, CAP_NOTIFY, &NOTIFY, &multiplier);
    let pci_cfg = pci_cfg_capability(&mut space);
    let msix = msix_capability(&mut space, vectors);
    let places = Places {
        pci_cfg,
        msix_control: msix + 2,
    };
    (space, places)
}

/// `struct virtio_pci_cap` without its first two bytes, and what follows it.
fn structure(space: &mut ConfigSpace, kind: u8, range: &Range<u64>, more: &[u8]) {
    let mut body = vec![(16 + more.len()) as u8, kind, 0, 0, 0, 0];
    body.extend_from_slice(&(range.start as u32).to_le_bytes());
    body.extend_from_slice(&((range.end - range.start) as u32).to_le_bytes());
    body.extend_from_slice(more);
    space.add_capability(CAP_VENDOR, &body, &vec![0; body.len()]);
}

/// `struct virtio_pci_cfg_cap`: the driver writes bar, offset, length and data.
fn pci_cfg_capability(space: &mut ConfigSpace) -> usize {
    let mut body = [0; 18];
    body[..2].copy_from_slice(&[20, CAP_PCI_CFG]);
    let mut writable = [0xFF; 18];
    writable[..2].fill(0); // cap_len, cfg_type
    writable[3..6].fill(0); // id, padding
    space.add_capability(CAP_VENDOR, &body, &writable)
}

fn msix_capability(space: &mut ConfigSpace, vectors: u16) -> usize {
    let mut body = [0; 10];
    body[..2].copy_from_slice(&vectors.saturating_sub(1).to_le_bytes());
    body[2..6].copy_from_slice(&(TABLE.start as u32).to_le_bytes());
    body[6..].copy_from_slice(&(PBA.start as u32).to_le_bytes());
    let mut writable = [0; 10];
    writable[..2].copy_from_slice(&crate::pci::CONTROL_WRITABLE.to_le_bytes());
    space.add_capability(MSIX_CAPABILITY_ID, &body, &writable)
}
