//! From a head to a [`Chain`]: the descriptor table, read once and believed in nothing.

use super::chain::Parts;
use super::{Chain, RingFault};
use crate::memory::{GuestAddress, GuestMemory, RegionHint, Segment};
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, VolatileSlice};

/// Bytes of one descriptor (virtio 1.3, 2.7.5).
pub(super) const DESCRIPTOR_SIZE: usize = 16;
/// Most descriptors of a chain in the ring's table, and in an indirect one. Bounds the work that one head can ask for;
/// more than any driver uses (Linux and Windows stay below the ring's size, and what a device says it takes).
const MOST_IN_TABLE: usize = 1024;
/// Entries of an indirect table that are copied at first where not all are wanted: a cache line.
const FIRST_INDIRECT: usize = 4;

/// A descriptor as the driver wrote it.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u32,
    next: u16,
}

impl Descriptor {
    fn new(bits: u128) -> Self {
        Self {
            address: bits as u64,
            length: (bits >> 64) as u32,
            flags: u32::from((bits >> 96) as u16),
            next: (bits >> 112) as u16,
        }
    }
}

/// Walks chains of one ring.
pub(super) struct Walker<'m> {
    pub(super) memory: &'m GuestMemory,
    /// The ring's descriptor table.
    pub(super) table: Segment,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub(super) indirect: bool,
    /// Where the latest buffer was found.
    pub(super) hint: &'m mut RegionHint,
    /// An indirect table, copied out.
    pub(super) copy: &'m mut Vec<u8>,
    /// Writable bytes with which the walk ends, before the chain does.
    pub(super) enough: usize,
}

impl<'m> Walker<'m> {
    /// Reads the chain at `head` into `parts`, which are empty and of this memory.
    pub(super) fn walk(&mut self, head: u16, parts: Box<Parts>) -> Result<Chain, RingFault> {
        let mut chain = Chain { head, parts };
        let entries = self.table.length() / DESCRIPTOR_SIZE;
        let lost = RingFault::Next { head, next: head };
        let table = self.memory.slice(&self.table).ok_or(lost)?;
        let mut index = head;
        for _ in 0..entries.min(MOST_IN_TABLE) {
            let descriptor = read(&table, entries, head, index)?;
            if descriptor.flags & VRING_DESC_F_INDIRECT != 0 {
                self.follow_indirect(&descriptor, &mut chain)?;
                return Ok(chain);
            }
            self.append(&descriptor, &mut chain)?;
            if self.is_done(&descriptor, &mut chain) {
                return Ok(chain);
            }
            index = descriptor.next;
        }
        Err(RingFault::Endless(head))
    }

    /// Whether `descriptor` is the last that is wanted.
    fn is_done(&self, descriptor: &Descriptor, chain: &mut Chain) -> bool {
        let ends = descriptor.flags & VRING_DESC_F_NEXT == 0;
        let enough = chain.writable_length() >= self.enough;
        chain.parts.cut = enough && !ends;
        ends || enough
    }

    /// Follows the chain through the table that `descriptor` names. It has no further tables.
    fn follow_indirect(&mut self, descriptor: &Descriptor, chain: &mut Chain) -> Result<(), RingFault> {
        let head = chain.head;
        let table = self.indirect_table(descriptor, head)?;
        let entries = table.len() / DESCRIPTOR_SIZE;
        let first = if self.enough == usize::MAX {
            entries
        } else {
            FIRST_INDIRECT
        };
        self.copy_table(&table, first);
        let mut index = 0;
        for _ in 0..entries {
            let at = usize::from(index) * DESCRIPTOR_SIZE;
            if at >= self.copy.len() {
                self.copy_table(&table, entries);
            }
            let bytes = self.copy.get(at..at + DESCRIPTOR_SIZE);
            let bytes = bytes.and_then(|bytes| <[u8; DESCRIPTOR_SIZE]>::try_from(bytes).ok());
            let outside = RingFault::Next { head, next: index };
            let inner = Descriptor::new(u128::from_le_bytes(bytes.ok_or(outside)?));
            if inner.flags & VRING_DESC_F_INDIRECT != 0 {
                return Err(RingFault::Indirect(head));
            }
            self.append(&inner, chain)?;
            if self.is_done(&inner, chain) {
                return Ok(());
            }
            index = inner.next;
        }
        Err(RingFault::Endless(head))
    }

    /// The table that `descriptor` names.
    fn indirect_table(&self, descriptor: &Descriptor, head: u16) -> Result<VolatileSlice<'m>, RingFault> {
        let length = descriptor.length as usize;
        let allowed = self.indirect
            && descriptor.flags & VRING_DESC_F_NEXT == 0
            && length.is_multiple_of(DESCRIPTOR_SIZE)
            && (1..=MOST_IN_TABLE).contains(&(length / DESCRIPTOR_SIZE));
        if !allowed {
            return Err(RingFault::Indirect(head));
        }
        let address = GuestAddress(descriptor.address);
        let table = self.memory.segment(address, length);
        let table = table.and_then(|table| self.memory.slice(&table));
        table.ok_or(RingFault::Memory { address, length })
    }

    /// Copies out its first `entries`: one copy costs less than a checked access for each, and the driver
    /// cannot change them meanwhile.
    fn copy_table(&mut self, table: &VolatileSlice<'_>, entries: usize) {
        self.copy.resize(table.len().min(entries * DESCRIPTOR_SIZE), 0);
        table.copy_to(self.copy);
    }

    fn append(&mut self, descriptor: &Descriptor, chain: &mut Chain) -> Result<(), RingFault> {
        let length = descriptor.length as usize;
        let Parts {
            readable, writable, ..
        } = &mut *chain.parts;
        let total = readable.length() + writable.length() + length;
        if total > u32::MAX as usize {
            return Err(RingFault::TooManyBytes(chain.head));
        }
        let segments = if descriptor.flags & VRING_DESC_F_WRITE != 0 {
            writable
        } else if writable.length() == 0 {
            readable
        } else {
            return Err(RingFault::Order(chain.head));
        };
        let address = GuestAddress(descriptor.address);
        if self.memory.append_segments(address, length, self.hint, segments) {
            Ok(())
        } else {
            Err(RingFault::Memory { address, length })
        }
    }
}

/// Reads descriptor `index` of the ring's own table, which has so many entries and is aligned.
fn read(table: &VolatileSlice<'_>, entries: usize, head: u16, index: u16) -> Result<Descriptor, RingFault> {
    let outside = || RingFault::Next { head, next: index };
    if usize::from(index) >= entries {
        return Err(outside());
    }
    let at = usize::from(index) * DESCRIPTOR_SIZE;
    let words = [at, at + 8].map(|at| table.load::<u64>(at, Ordering::Relaxed));
    let [Ok(address), Ok(rest)] = words else {
        return Err(outside());
    };
    let [address, rest] = [address, rest].map(u64::from_le);
    Ok(Descriptor::new(u128::from(rest) << 64 | u128::from(address)))
}
