//! Proven ranges of guest memory.

use super::GuestMemory;
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

    /// The memory of bytes `offset` to `offset + length`, appended to `slices`; less where the
    /// buffer ends before.
    pub(crate) fn slices<'m>(
        &self,
        memory: &'m GuestMemory,
        offset: usize,
        length: usize,
        slices: &mut Vec<VolatileSlice<'m>>,
    ) {
        let (mut skip, mut left) = (offset, length);
        for segment in &self.list {
            if left == 0 {
                break;
            }
            if skip >= segment.length {
                skip -= segment.length;
                continue;
            }
            let part = Segment {
                offset: segment.offset + skip,
                length: (segment.length - skip).min(left),
                ..*segment
            };
            skip = 0;
            left -= part.length;
            slices.extend(memory.slice(&part));
        }
    }
}
