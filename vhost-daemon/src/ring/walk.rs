//! From a head to a [`Chain`]: the descriptor table, read once and believed in nothing.

use super::{Chain, RingFault};
use crate::memory::{GuestAddress, GuestMemory, Segment, Segments};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, VolatileSlice};

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
        let outside = RingFault::Next { head, next: index };
        let memory = self.memory.slice(&table.memory).ok_or(outside)?;
        for _ in 0..table.entries {
            let descriptor = read(&memory, table.entries, head, index)?;
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

/// Reads descriptor `index` of a table with so many entries.
fn read(table: &VolatileSlice<'_>, entries: usize, head: u16, index: u16) -> Result<Descriptor, RingFault> {
    let outside = || RingFault::Next { head, next: index };
    if usize::from(index) >= entries {
        return Err(outside());
    }
    let at = usize::from(index) * DESCRIPTOR_SIZE;
    let words = [at, at + 8].map(|at| table.load::<u64>(at, Ordering::Relaxed));
    let [address, rest] = match words {
        [Ok(address), Ok(rest)] => [u64::from_le(address), u64::from_le(rest)],
        // An indirect table may lie anywhere (virtio 1.3, 2.7.5.3).
        _ => {
            let mut bytes = [0; DESCRIPTOR_SIZE];
            table.read_slice(&mut bytes, at).map_err(|_| outside())?;
            let both = u128::from_le_bytes(bytes);
            [both as u64, (both >> 64) as u64]
        }
    };
    Ok(Descriptor {
        address,
        length: rest as u32,
        flags: u32::from((rest >> 32) as u16),
        next: (rest >> 48) as u16,
    })
}
