//! A descriptor chain that was checked, as far as it was read.

use crate::memory::{GuestMemory, Segments};
use std::sync::Arc;
use vm_memory::VolatileSlice;

/// One request of the driver: a readable buffer, then a writable one, each of any framing
/// (virtio 1.3, 2.7.4). Holds the memory that it points into, so a change of the memory table
/// cannot unmap it.
///
/// It must go back to its ring, by [`Ring::complete`](super::Ring::complete) or
/// [`Ring::put_back`](super::Ring::put_back), before the ring stops.
#[derive(Debug)]
#[must_use = "a chain that is not completed is lost to the driver"]
pub struct Chain {
    pub(super) head: u16,
    /// Boxed: chains are handed on several times on their way, and boxes are used again.
    pub(super) parts: Box<Parts>,
}

/// What a chain points to.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) readable: Segments,
    pub(super) writable: Segments,
    /// More of the chain was not read.
    pub(super) cut: bool,
}

impl Parts {
    /// No buffers in `memory`.
    pub(super) fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            memory,
            readable: Segments::default(),
            writable: Segments::default(),
            cut: false,
        }
    }

    pub(super) fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.cut = false;
    }
}

impl Chain {
    /// The chain's name on its ring: unique among those that the device holds.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read.
    pub fn readable_length(&self) -> usize {
        self.parts.readable.length()
    }

    /// Bytes that the device may write, as far as the chain was read.
    pub fn writable_length(&self) -> usize {
        self.parts.writable.length()
    }

    /// Copies readable bytes from `offset` into `target`; returns how many there were.
    pub fn read_at(&self, offset: usize, target: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self
            .parts
            .readable
            .slices(&self.parts.memory, offset, target.len())
        {
            done += slice.copy_to(&mut target[done..]);
        }
        done
    }

    /// Copies `source` to the writable bytes from `offset`; returns how many there was room for.
    pub fn write_at(&self, offset: usize, source: &[u8]) -> usize {
        let mut done = 0;
        for slice in self
            .parts
            .writable
            .slices(&self.parts.memory, offset, source.len())
        {
            let count = slice.len();
            slice.copy_from(&source[done..done + count]);
            done += count;
        }
        done
    }

    /// Appends the memory of `length` readable bytes from `offset` (fewer at the end): for I/O that
    /// only reads it. The slices are not to be written through.
    pub fn readable_slices<'c>(&'c self, offset: usize, length: usize, slices: &mut Vec<VolatileSlice<'c>>) {
        slices.extend(self.parts.readable.slices(&self.parts.memory, offset, length));
    }

    /// Appends the memory of `length` writable bytes from `offset` (fewer at the end).
    pub fn writable_slices<'c>(&'c self, offset: usize, length: usize, slices: &mut Vec<VolatileSlice<'c>>) {
        slices.extend(self.parts.writable.slices(&self.parts.memory, offset, length));
    }

    /// Calls `act` with the memory of `length` readable bytes from `offset` (fewer at the end), for I/O
    /// that only reads it. Allocates nothing for few pieces.
    pub fn with_readable<T>(
        &self,
        offset: usize,
        length: usize,
        act: impl FnOnce(&[VolatileSlice<'_>]) -> T,
    ) -> T {
        gather(
            self.parts.readable.slices(&self.parts.memory, offset, length),
            act,
        )
    }

    /// As [`Self::with_readable`], of the writable bytes.
    pub fn with_writable<T>(
        &self,
        offset: usize,
        length: usize,
        act: impl FnOnce(&[VolatileSlice<'_>]) -> T,
    ) -> T {
        gather(
            self.parts.writable.slices(&self.parts.memory, offset, length),
            act,
        )
    }
}

/// Pieces that need no allocation: what drivers send for a few pages.
const FEW: usize = 16;

fn gather<'m, T>(
    mut slices: impl Iterator<Item = VolatileSlice<'m>>,
    act: impl FnOnce(&[VolatileSlice<'m>]) -> T,
) -> T {
    let mut few: [VolatileSlice<'m>; FEW] = std::array::from_fn(|_| VolatileSlice::from(&mut [][..]));
    let mut count = 0;
    while count < FEW {
        let Some(slice) = slices.next() else {
            return act(&few[..count]);
        };
        few[count] = slice;
        count += 1;
    }
    let mut all = few.to_vec();
    all.extend(slices);
    act(&all)
}
