//! From a head to a [`Chain`]: the descriptor table, read once and believed in nothing.

use super::{Chain, RingFault};
use crate::memory::{GuestAddress, GuestMemory, Segment, Segments};
use std::sync::Arc;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::Bytes;

/// Bytes of one descriptor (virtio 1.3, 2.7.5).
pub(super) const DESCRIPTOR_SIZE: usize = 16;
/// Most descriptors in an indirect table. Bounds the work that one head can ask for; more than any
/// driver uses (Linux and Windows stay at the ring's size).
const MAX_INDIRECT: usize = 1024;

/// A descriptor as the driver wrote it.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u32,
    next: u16,
}

/// A descriptor table in guest memory: the ring's own, or an indirect one.
#[derive(Clone, Copy)]
struct Table {
    memory: Segment,
    entries: usize,
}

/// Walks chains of one ring.
pub(super) struct Walker<'m> {
    pub(super) memory: &'m Arc<GuestMemory>,
    /// The ring's descriptor table.
    pub(super) table: Segment,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub(super) indirect: bool,
}

impl Walker<'_> {
    /// Reads the chain at `head`, reusing the buffers of an earlier one.
    pub(super) fn walk(&self, head: u16, readable: Segments, writable: Segments) -> Result<Chain, RingFault> {
        let mut chain = Chain {
            head,
            memory: Arc::clone(self.memory),
            readable,
            writable,
        };
        let entries = self.table.length() / DESCRIPTOR_SIZE;
        let table = Table {
            memory: self.table,
            entries,
        };
        self.follow(table, head, false, &mut chain)?;
        Ok(chain)
    }

    /// Follows the chain from descriptor `index` of `table`. Depth at most two: an indirect table
    /// has no indirect tables.
    fn follow(&self, table: Table, index: u16, inner: bool, chain: &mut Chain) -> Result<(), RingFault> {
        let head = chain.head;
        let mut index = index;
        for _ in 0..table.entries {
            let descriptor = self.read(table, head, index)?;
            if descriptor.flags & VRING_DESC_F_INDIRECT != 0 {
                let nested = self.indirect_table(&descriptor, inner, head)?;
                return self.follow(nested, 0, true, chain);
            }
            self.append(&descriptor, chain)?;
            if descriptor.flags & VRING_DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(RingFault::Endless(head))
    }

    fn read(&self, table: Table, head: u16, index: u16) -> Result<Descriptor, RingFault> {
        let outside = RingFault::Next { head, next: index };
        if usize::from(index) >= table.entries {
            return Err(outside);
        }
        let mut bytes = [0; DESCRIPTOR_SIZE];
        let memory = self.memory.slice(&table.memory).ok_or_else(|| outside.clone())?;
        memory
            .read_slice(&mut bytes, usize::from(index) * DESCRIPTOR_SIZE)
            .map_err(|_| outside)?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Ok(Descriptor {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u32::from(u16::from_le_bytes([f0, f1])),
            next: u16::from_le_bytes([n0, n1]),
        })
    }

    fn indirect_table(&self, descriptor: &Descriptor, inner: bool, head: u16) -> Result<Table, RingFault> {
        let length = descriptor.length as usize;
        let entries = length / DESCRIPTOR_SIZE;
        let allowed = self.indirect
            && !inner
            && descriptor.flags & VRING_DESC_F_NEXT == 0
            && length.is_multiple_of(DESCRIPTOR_SIZE)
            && (1..=MAX_INDIRECT).contains(&entries);
        if !allowed {
            return Err(RingFault::Indirect(head));
        }
        let address = GuestAddress(descriptor.address);
        let memory = self.memory.segment(address, length);
        let memory = memory.ok_or(RingFault::Memory { address, length })?;
        Ok(Table { memory, entries })
    }

    fn append(&self, descriptor: &Descriptor, chain: &mut Chain) -> Result<(), RingFault> {
        let length = descriptor.length as usize;
        let total = chain.readable.length() + chain.writable.length() + length;
        if total > u32::MAX as usize {
            return Err(RingFault::TooManyBytes(chain.head));
        }
        let segments = if descriptor.flags & VRING_DESC_F_WRITE != 0 {
            &mut chain.writable
        } else if chain.writable.length() == 0 {
            &mut chain.readable
        } else {
            return Err(RingFault::Order(chain.head));
        };
        let address = GuestAddress(descriptor.address);
        if self.memory.append_segments(address, length, segments) {
            Ok(())
        } else {
            Err(RingFault::Memory { address, length })
        }
    }
}
