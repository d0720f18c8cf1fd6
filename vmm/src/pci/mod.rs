//! The PCI side of the machine: one bus, its host bridge, configuration space and MSI-X.
//!
//! Everything here is driven by guest accesses of any width, alignment and value. Nothing in
//! this module waits for a back end, so that a vCPU thread is back in the guest after a bounded
//! number of system calls.

mod bus;
mod config_space;
mod host_bridge;
mod msix;
mod vector;

#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(not(test), allow(dead_code, reason = "the tests use more of it"))]
pub(crate) mod fakes;
#[cfg(test)]
mod msix_tests;

pub use bus::{PciBus, SlotTaken};
pub use config_space::{CONFIG_SPACE_SIZE, ConfigSpace, Identity, command};
pub use host_bridge::HostBridge;
pub(crate) use msix::CONTROL_WRITABLE;
pub use msix::{MAX_VECTORS, MSIX_CAPABILITY_ID, MSIX_ENTRY_SIZE, Msix, NO_VECTOR};

/// Vendor id of virtio functions, and of their subsystem (virtio 1.3, 4.1.2).
pub const VENDOR_VIRTIO: u16 = 0x1AF4;

/// One PCI function, reached from any vCPU thread at any time.
///
/// Offsets and lengths have been checked by the bus: `offset + data.len()` lies inside
/// configuration space or inside the BAR.
pub trait Function: Send + Sync {
    /// Reads configuration space (4096 bytes).
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// Where this function's BAR is decoded at this moment.
    fn window(&self) -> Option<Window> {
        None
    }
    /// Reads from the BAR.
    fn bar_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    /// Writes to the BAR.
    fn bar_write(&self, _offset: u64, _data: &[u8]) {}
    /// Starts a reset that may take time (draining a device); several functions do so at once.
    fn begin_reset(&self) {}
    /// Waits for what [`Function::begin_reset`] started and brings the function back to its state
    /// at power-on. No vCPU runs meanwhile. Bounded by the device's drain deadline.
    fn finish_reset(&self) {}
}

/// A decoded BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// First guest physical address. A multiple of `size`.
    pub base: u64,
    /// Bytes, a power of two.
    pub size: u64,
}

impl Window {
    /// The offset of `address` in the window, when it lies inside.
    #[must_use]
    pub fn offset_of(self, address: u64) -> Option<u64> {
        address
            .checked_sub(self.base)
            .filter(|offset| *offset < self.size)
    }
}
