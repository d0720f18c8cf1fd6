//! MSI-X (PCI 3.0, 6.8.2): the table, the pending bits, and the two levels of mask.

use super::vector::Vector;
use crate::frontend::SharedEvent;
use crate::platform::Interrupts;
use std::io;
use std::sync::Arc;

/// Capability id of MSI-X.
pub const MSIX_CAPABILITY_ID: u8 = 0x11;
/// Bytes of one table entry.
pub const MSIX_ENTRY_SIZE: u64 = 16;
/// Most vectors of a function.
pub const MAX_VECTORS: u16 = 2048;
/// The vector number that means none (virtio 1.3, 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xFFFF;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// The bits of message control that a guest may write.
pub(crate) const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;

/// The MSI-X state of one function. Every method runs under the function's lock.
pub struct Msix {
    interrupts: Arc<dyn Interrupts>,
    vectors: Vec<Vector>,
    control: u16,
    /// The guest has switched bus mastering off.
    stopped: bool,
}

impl Msix {
    /// `count` vectors, each with a GSI of its own, all masked.
    ///
    /// # Errors
    /// When there are not enough GSIs.
    pub fn new(interrupts: Arc<dyn Interrupts>, count: u16) -> io::Result<Self> {
        let mut msix = Self {
            interrupts,
            vectors: Vec::new(),
            control: 0,
            stopped: false,
        };
        for _ in 0..count.min(MAX_VECTORS) {
            msix.vectors.push(Vector::new(msix.interrupts.allocate()?));
        }
        Ok(msix)
    }

    /// Number of vectors.
    #[must_use]
    pub fn len(&self) -> u16 {
        // At most MAX_VECTORS, by `new`.
        self.vectors.len() as u16
    }

    /// Whether there is no vector at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// The guest wrote message control.
    pub fn set_control(&mut self, control: u16) {
        if self.control != control {
            self.control = control;
            self.settle_all();
        }
    }

    /// The guest has switched bus mastering on or off. Off is as if the function were masked: what
    /// is signalled meanwhile is pending.
    pub fn set_bus_master(&mut self, on: bool) {
        if self.stopped == on {
            self.stopped = !on;
            self.settle_all();
        }
    }

    /// Lets `event` raise vector `number` in place of vector `old`; either may be [`NO_VECTOR`].
    /// Returns the vector it now raises: `number`, or [`NO_VECTOR`] where there is no such
    /// vector or KVM refused it (virtio 1.3, 4.1.5.1.2: the driver reads it back).
    pub fn assign(&mut self, event: &Arc<SharedEvent>, old: u16, number: u16) -> u16 {
        if let Some(vector) = self.vectors.get_mut(usize::from(old))
            && let Err(error) = vector.remove_source(self.interrupts.as_ref(), event)
        {
            tracing::error!(%error, vector = old, "cannot take an eventfd off its interrupt");
            return old;
        }
        if let Some(vector) = self.vectors.get_mut(usize::from(number)) {
            vector.add_source(Arc::clone(event));
            if self.settle(usize::from(number)) {
                return number;
            }
            self.assign(event, number, NO_VECTOR);
        }
        NO_VECTOR
    }

    /// A guest's read of the table; out of range reads as ones.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = self.entry(at / MSIX_ENTRY_SIZE).map_or(0xFF, |entry| {
                // The remainder is below 16, the length of an entry.
                entry[(at % MSIX_ENTRY_SIZE) as usize]
            });
        }
    }

    /// A guest's write to the table: aligned, 4 or 8 bytes (PCI 3.0, 6.8.2); all else is ignored.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        let length = data.len() as u64;
        if !(length == 4 || length == 8) || !offset.is_multiple_of(length) {
            return;
        }
        let index = usize::try_from(offset / MSIX_ENTRY_SIZE).unwrap_or(usize::MAX);
        let Some(vector) = self.vectors.get_mut(index) else {
            return;
        };
        for (i, word) in data.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            let address = vector.message.address;
            match offset % MSIX_ENTRY_SIZE / 4 + i as u64 {
                0 => vector.message.address = address & !0xFFFF_FFFF | u64::from(value & !3),
                1 => vector.message.address = address & 0xFFFF_FFFF | u64::from(value) << 32,
                2 => vector.message.data = value,
                _ => vector.masked = value & 1 != 0,
            }
        }
        self.settle(index);
    }

    /// A guest's read of the pending bit array, any width; bits past the last vector are zero.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = (0..8).fold(0, |bits, bit| {
                let index = at.saturating_mul(8).saturating_add(bit);
                let vector = usize::try_from(index).ok().and_then(|i| self.vectors.get(i));
                bits | u8::from(vector.is_some_and(Vector::pending)) << bit
            });
        }
    }

    /// Takes every eventfd off every vector.
    pub fn release(&mut self) {
        for (index, vector) in self.vectors.iter_mut().enumerate() {
            if let Err(error) = vector.remove_all(self.interrupts.as_ref()) {
                tracing::error!(%error, vector = index, "cannot take an eventfd off its interrupt");
            }
        }
    }

    /// Back to power-on: disabled, all vectors masked and with no eventfd.
    pub fn reset(&mut self) {
        self.release();
        self.control = 0;
        self.stopped = false;
        for index in 0..self.vectors.len() {
            self.vectors[index].masked = true;
            self.vectors[index].message = Default::default();
            self.settle(index);
        }
    }

    /// The function is gone: gives its interrupts back.
    pub fn retire(&mut self) {
        self.release();
        for vector in self.vectors.drain(..) {
            vector.retire(self.interrupts.as_ref());
        }
    }

    fn settle_all(&mut self) {
        for index in 0..self.vectors.len() {
            self.settle(index);
        }
    }

    fn settle(&mut self, index: usize) -> bool {
        let open = !self.stopped && self.control & CONTROL_WRITABLE == CONTROL_ENABLE;
        let result = self.vectors[index].settle(self.interrupts.as_ref(), open);
        if let Err(error) = &result {
            // What could not be attached keeps counting: it is delivered by the next unmask.
            tracing::debug!(%error, vector = index, "KVM refused an interrupt as the guest set it up");
        }
        result.is_ok()
    }

    fn entry(&self, index: u64) -> Option<[u8; 16]> {
        let vector = self.vectors.get(usize::try_from(index).ok()?)?;
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&vector.message.address.to_le_bytes());
        entry[8..12].copy_from_slice(&vector.message.data.to_le_bytes());
        entry[12] = vector.masked.into();
        Some(entry)
    }
}

impl Drop for Msix {
    /// Also of one that was not made to the end, or whose function was not.
    fn drop(&mut self) {
        self.retire();
    }
}
