//! The driver's side of a split ring (virtio 1.3, 2.7).

use crate::{cpu, mmio::Address};
use core::sync::atomic::{Ordering, fence};

/// VIRTQ_DESC_F_NEXT.
pub(crate) const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub(crate) const WRITE: u16 = 2;

/// A ring. The driver chooses descriptors itself.
pub(crate) struct Queue {
    index: u16,
    size: u16,
    descriptors: Address,
    available: Address,
    used: Address,
    doorbell: Address,
    event_idx: bool,
    next_available: u16,
    next_used: u16,
    kicked: u16,
    /// Doorbells rung.
    pub(crate) kicks: u64,
}

impl Queue {
    /// Memory for a ring of `size`.
    pub(crate) fn footprint(size: u16) -> usize {
        usize::from(size) * 26 + 16
    }

    pub(crate) fn new(
        ring: &'static mut [u8],
        index: u16,
        size: u16,
        doorbell: Address,
        event_idx: bool,
    ) -> Self {
        let descriptors = Address(ring.as_ptr() as u64);
        let available = descriptors.at(u64::from(size) * 16);
        Self {
            index,
            size,
            descriptors,
            available,
            used: Address((available.0 + 6 + u64::from(size) * 2).next_multiple_of(4)),
            doorbell,
            event_idx,
            next_available: 0,
            next_used: 0,
            kicked: 0,
            kicks: 0,
        }
    }

    /// Entries.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// Descriptor table, driver area, device area.
    pub(crate) fn addresses(&self) -> [u64; 3] {
        [self.descriptors.0, self.available.0, self.used.0]
    }

    /// Interrupts taken for this queue.
    pub(crate) fn interrupts(&self) -> u64 {
        cpu::vector_interrupts(self.index as u8)
    }

    /// Writes descriptor `index`.
    pub(crate) fn describe(&self, index: u16, buffer: (u64, u32), flags: u16, next: u16) {
        let descriptor = self.descriptors.at(u64::from(index) * 16);
        descriptor.write64(0, buffer.0);
        descriptor.write32(8, buffer.1);
        descriptor.write16(12, flags);
        descriptor.write16(14, next);
    }

    /// Gives the chain at `head` to the device.
    pub(crate) fn submit(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        self.available.write16(4 + slot * 2, head);
        fence(Ordering::Release);
        self.next_available = self.next_available.wrapping_add(1);
        self.available.write16(2, self.next_available);
    }

    /// Rings the doorbell where the device wants to hear of what was submitted.
    pub(crate) fn notify(&mut self) {
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.used.read16(4 + u64::from(self.size) * 8);
            let new = self.next_available;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(self.kicked)
        } else {
            self.used.read16(0) & 1 == 0
        };
        self.kicked = self.next_available;
        if wanted {
            self.kicks += 1;
            self.doorbell.write16(0, self.index);
        }
    }

    /// Whether the device has used a chain.
    pub(crate) fn has_used(&self) -> bool {
        self.used.read16(2) != self.next_used
    }

    /// The next used chain: head and length.
    pub(crate) fn pop(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::Acquire);
        let element = self.used.at(4 + u64::from(self.next_used % self.size) * 8);
        self.next_used = self.next_used.wrapping_add(1);
        Some((element.read32(0) as u16, element.read32(4)))
    }

    /// Asks for an interrupt at the next used chain. Check [`Queue::has_used`] afterwards.
    pub(crate) fn arm(&mut self) {
        self.available.write16(0, 0);
        self.set_used_event(self.next_used);
        fence(Ordering::SeqCst);
    }

    /// Asks for no interrupt.
    pub(crate) fn disarm(&mut self) {
        self.available.write16(0, 1);
        // An event index that the ring reaches last.
        self.set_used_event(self.next_used.wrapping_sub(1));
    }

    fn set_used_event(&self, index: u16) {
        if self.event_idx {
            self.available.write16(4 + u64::from(self.size) * 2, index);
        }
    }
}

/// Halts until one of `queues` has a used chain.
pub(crate) fn wait_any(queues: &mut [Queue]) {
    loop {
        let seen = cpu::interrupts();
        queues.iter_mut().for_each(Queue::arm);
        if queues.iter().any(Queue::has_used) {
            return;
        }
        cpu::wait_for_interrupt(seen);
    }
}
