//! PCI functions of bus 0, by ECAM; and by CF8/CFC for comparison.

use crate::{cpu, mmio::Address, scenario::Failure, serial::line};
use guest_contract::machine;

/// Device numbers on the bus.
const DEVICES: u8 = 32;
/// Capability id of MSI-X.
const MSIX: u8 = 0x11;
/// Capability id of vendor data, virtio's.
const VENDOR: u8 = 0x09;
const VIRTIO_VENDOR: u16 = 0x1AF4;
const VIRTIO_MODERN: u16 = 0x1040;
/// No capability list is longer.
const MAX_CAPABILITIES: usize = 48;

/// Function 0 of a device on bus 0.
#[derive(Clone, Copy)]
pub(crate) struct Function(u8);

impl Function {
    /// Its configuration space.
    pub(crate) fn config(self) -> Address {
        Address(machine::ECAM + (u64::from(self.0) << 15))
    }

    fn present(self) -> bool {
        self.config().read16(0) != 0xFFFF
    }

    /// One register by the old mechanism.
    fn read_by_port(self, offset: u8) -> u32 {
        let address = 0x8000_0000 | u32::from(self.0) << 11 | u32::from(offset & 0xFC);
        cpu::out32(machine::PCI_CONFIG_ADDRESS, address);
        cpu::in32(machine::PCI_CONFIG_DATA)
    }

    /// The `nth` virtio function of a device type (virtio 1.3, 5).
    pub(crate) fn find(device_type: u16, nth: u64) -> Result<Self, Failure> {
        let wanted = |function: &Self| {
            let config = function.config();
            config.read16(0) == VIRTIO_VENDOR && config.read16(2) == VIRTIO_MODERN + device_type
        };
        (0..DEVICES)
            .map(Self)
            .filter(wanted)
            .nth(usize::try_from(nth).unwrap_or(usize::MAX))
            .ok_or("the device is not on the bus")
    }

    /// Lets it decode memory, and master the bus.
    pub(crate) fn enable(self) {
        let command = self.config().read16(4);
        self.config().write16(4, command | 6);
    }

    /// Where BAR `index` (64-bit, memory) lies.
    pub(crate) fn bar(self, index: u8) -> Address {
        let at = 0x10 + u64::from(index) * 4;
        let low = u64::from(self.config().read32(at) & !0xF);
        Address(low | u64::from(self.config().read32(at + 4)) << 32)
    }

    fn capabilities(self) -> impl Iterator<Item = Address> {
        let config = self.config();
        let mut next = config.read8(0x34) & 0xFC;
        core::iter::from_fn(move || {
            let capability = config.at(u64::from(next));
            (next != 0).then(|| {
                next = capability.read8(1) & 0xFC;
                capability
            })
        })
        .take(MAX_CAPABILITIES)
    }

    /// The MSI-X capability.
    pub(crate) fn msix(self) -> Result<Address, Failure> {
        self.capabilities()
            .find(|capability| capability.read8(0) == MSIX)
            .ok_or("no MSI-X capability")
    }

    /// The virtio structure of configuration type `kind` (virtio 1.3, 4.1.4): its registers, and
    /// its capability.
    pub(crate) fn virtio_structure(self, kind: u8) -> Result<(Address, Address), Failure> {
        let capability = self
            .capabilities()
            .find(|capability| capability.read8(0) == VENDOR && capability.read8(3) == kind)
            .ok_or("a virtio structure is missing")?;
        let offset = u64::from(capability.read32(8));
        Ok((self.bar(capability.read8(4)).at(offset), capability))
    }
}

/// Prints every function, and compares both ways to read its header.
pub(crate) fn scenario() -> Result<(), Failure> {
    for function in (0..DEVICES).map(Function).filter(|function| function.present()) {
        let config = function.config();
        for offset in (0..64).step_by(4) {
            if config.read32(u64::from(offset)) != function.read_by_port(offset) {
                return Err("ECAM and CF8 differ");
            }
        }
        let (id, class) = (config.read32(0), config.read32(8) >> 8);
        line!(
            "pci.{}={:04x}:{:04x} class {class:06x}",
            function.0,
            id & 0xFFFF,
            id >> 16
        );
    }
    Ok(())
}
