//! Proven ranges of guest memory.

use super::{GuestAddress, GuestMemory};
use vm_memory::VolatileSlice;

/// A range that lies in one region of the [`GuestMemory`] that made it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    pub(super) region: usize,
    pub(super) offset: usize,
    pub(super) length: usize,
}

impl Segment {
    /// Bytes in the range.
    pub fn length(&self) -> usize {
        self.length
    }
}

/// The region that the latest buffer lay in: the next one mostly lies there too. Of one [`GuestMemory`];
/// what another one makes of its segments is checked as ever.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct RegionHint {
    pub(super) region: usize,
    pub(super) start: u64,
    /// 0 before the first buffer.
    pub(super) length: u64,
}

impl RegionHint {
    /// The range, if all of it lies in that region.
    #[inline]
    pub(super) fn find(&self, address: GuestAddress, length: usize) -> Option<Segment> {
        let offset = address.0.wrapping_sub(self.start);
        let inside = length > 0 && offset < self.length && length as u64 <= self.length - offset;
        inside.then_some(Segment {
            region: self.region,
            offset: offset as usize,
            length,
        })
    }
}

/// A row of segments, together one buffer: the readable or the writable part of a chain.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Segments {
    list: Vec<Segment>,
    length: usize,
}

impl Segments {
    /// Bytes in all segments; below 2^32 for a chain (virtio 1.3, 2.7.5.2).
    pub fn length(&self) -> usize {
        self.length
    }

    pub(super) fn push(&mut self, segment: Segment) {
        self.length += segment.length;
        self.list.push(segment);
    }

    pub(crate) fn clear(&mut self) {
        self.list.clear();
        self.length = 0;
    }

    /// The memory of bytes `offset` to `offset + length`; less where the buffer ends before.
    pub(crate) fn slices<'m>(
        &'m self,
        memory: &'m GuestMemory,
        offset: usize,
        length: usize,
    ) -> impl Iterator<Item = VolatileSlice<'m>> {
        let (mut skip, mut left) = (offset, length);
        let parts = self.list.iter().map_while(move |segment| {
            if left == 0 {
                return None;
            }
            let skipped = skip.min(segment.length);
            skip -= skipped;
            let part = Segment {
                offset: segment.offset + skipped,
                length: (segment.length - skipped).min(left),
                ..*segment
            };
            left -= part.length;
            Some(part)
        });
        parts
            .filter(|part| part.length > 0)
            .filter_map(move |part| memory.slice(&part))
    }
}
