//! A function's configuration space: bytes with a write mask, and its list of capabilities.

use vm_memory::ByteValued;

/// Size of a function's extended configuration space, in bytes (PCI Express 4.0, 7.2).
pub const CONFIG_SPACE_SIZE: u16 = 4096;

/// The part that our functions use; the rest reads as zero (no extended capability).
const USED: usize = 256;
/// Where the first capability may lie (PCI 3.0, 6.1).
const FIRST_CAPABILITY: usize = 0x40;
const CAPABILITIES_POINTER: usize = 0x34;
const STATUS: usize = 0x06;
const STATUS_CAPABILITY_LIST: u8 = 1 << 4;

/// Bits of the command register (PCI 3.0, 6.2.2).
pub mod command {
    /// Offset of the command register.
    pub const OFFSET: usize = 0x04;
    /// Decode memory BARs.
    pub const MEMORY: u16 = 1 << 1;
    /// May act as bus master.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Parity error response.
    pub const PARITY: u16 = 1 << 6;
    /// SERR# enable.
    pub const SERR: u16 = 1 << 8;
    /// Must not assert INTx.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// What names a function (PCI 3.0, 6.2.1 and 6.2.4).
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Class code: base class, sub-class, programming interface, from the top.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Registers with the bits that a guest may write.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; USED],
    writable: [u8; USED],
    last_capability: Option<usize>,
    end: usize,
}

impl ConfigSpace {
    /// A type 0 header with no BAR, no interrupt pin and no capability.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; USED],
            writable: [0; USED],
            last_capability: None,
            end: FIRST_CAPABILITY,
        };
        space.put(0x00, identity.vendor, 0);
        space.put(0x02, identity.device, 0);
        let command =
            command::MEMORY | command::BUS_MASTER | command::PARITY | command::SERR | command::INTX_DISABLE;
        space.put(command::OFFSET, 0u16, command);
        space.put(0x08, identity.class << 8 | u32::from(identity.revision), 0);
        space.put(0x0C, 0u8, 0xFF); // Cache line size: any value, no effect.
        space.put(0x2C, identity.subsystem_vendor, 0);
        space.put(0x2E, identity.subsystem, 0);
        space.put(0x3C, 0u8, 0xFF); // Interrupt line: firmware's note, no effect.
        space
    }

    /// Sets a register (little-endian) and the bits that a guest may change.
    pub fn put<T: ByteValued>(&mut self, offset: usize, value: T, writable: T) {
        let size = size_of::<T>();
        self.bytes[offset..offset + size].copy_from_slice(value.as_slice());
        self.writable[offset..offset + size].copy_from_slice(writable.as_slice());
    }

    /// Reads a register as the vmm sees it.
    #[must_use]
    pub fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        std::array::from_fn(|i| self.bytes.get(offset + i).copied().unwrap_or(0))
    }

    /// Appends a capability: `body` without its two leading bytes (id and next pointer), and the
    /// bits of it that a guest may write. Returns where it lies.
    ///
    /// # Panics
    /// When the capabilities of one function exceed 256 bytes, or the mask is of another length:
    /// mistakes of this program, found by the first test.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        assert_eq!(body.len(), writable.len());
        let offset = self.end;
        self.bytes[offset] = id;
        self.bytes[offset + 2..offset + 2 + body.len()].copy_from_slice(body);
        self.writable[offset + 2..offset + 2 + body.len()].copy_from_slice(writable);
        let link = self.last_capability.map_or(CAPABILITIES_POINTER, |last| last + 1);
        self.bytes[link] = u8::try_from(offset).expect("capabilities lie in the first 256 bytes");
        self.bytes[STATUS] |= STATUS_CAPABILITY_LIST;
        self.last_capability = Some(offset);
        self.end = (offset + 2 + body.len()).next_multiple_of(4);
        offset
    }

    /// A guest's read. Past the first 256 bytes all bits are ones: a conventional function has no
    /// extended configuration space. Zeroes would be an empty list of extended capabilities, which
    /// Linux then walks once for each capability that it knows, an exit each time.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0xFF);
        }
    }

    /// A guest's write: only writable bits change.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (value & mask);
            }
        }
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> u16 {
        u16::from_le_bytes(self.get(command::OFFSET))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 0x1AF4,
            device: 0x1042,
            revision: 1,
            class: 0x01_8000,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1042,
        })
    }

    #[test]
    fn every_width_and_alignment_reads_the_same_bytes() {
        let space = space();
        for width in [1, 2, 4, 8] {
            for offset in 0..0x50u16 {
                let mut data = vec![0; width];
                space.read(offset, &mut data);
                for (i, byte) in data.iter().enumerate() {
                    assert_eq!([*byte], space.get(usize::from(offset) + i));
                }
            }
        }
    }

    #[test]
    fn read_only_bits_stay_and_there_is_no_extended_part() {
        let mut space = space();
        space.write(0, &[0xFF; 64]);
        assert_eq!(space.get(0), [0xF4, 0x1A, 0x42, 0x10]);
        assert_eq!(space.command(), 0x0546);
        space.write(0xFE, &[0xFF; 4]);
        let mut data = [1; 4];
        space.read(0x100, &mut data);
        assert_eq!(data, [0xFF; 4]);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(9, &[1; 14], &[0; 14]);
        let second = space.add_capability(0x11, &[2; 10], &[0; 10]);
        assert_eq!(space.get(0x34), [first as u8]);
        assert_eq!(space.get(first), [9, second as u8, 1]);
        assert_eq!(space.get(second), [0x11, 0, 2]);
        assert_eq!(space.get::<1>(6)[0] & 0x10, 0x10);
    }
}
