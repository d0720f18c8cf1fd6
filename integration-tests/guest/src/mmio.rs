//! Device registers and memory that a device shares, by address.
#![expect(unsafe_code, reason = "reads and writes by address")]

use core::ptr;

/// An address below 4 GiB of device registers or shared memory; all of it is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Address(pub(crate) u64);

macro_rules! access {
    ($read:ident, $write:ident, $type:ty) => {
        #[doc = concat!("Reads a ", stringify!($type), " at `offset`.")]
        pub(crate) fn $read(self, offset: u64) -> $type {
            // SAFETY: mapped, aligned by the caller's constants, never part of a Rust object
            // that is borrowed elsewhere.
            unsafe { ptr::read_volatile((self.0 + offset) as *const $type) }
        }
        #[doc = concat!("Writes a ", stringify!($type), " at `offset`.")]
        pub(crate) fn $write(self, offset: u64, value: $type) {
            // SAFETY: as for reads.
            unsafe { ptr::write_volatile((self.0 + offset) as *mut $type, value) }
        }
    };
}

impl Address {
    access!(read8, write8, u8);
    access!(read16, write16, u16);
    access!(read32, write32, u32);

    /// Writes 64 bits as two halves, the lower first (virtio 1.3, 4.1.3.1).
    pub(crate) fn write64(self, offset: u64, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }

    /// The address `offset` behind this one.
    pub(crate) fn at(self, offset: u64) -> Self {
        Self(self.0 + offset)
    }
}
