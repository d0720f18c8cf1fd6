//! The disk as it should read, beside the image.

use crate::image::Image;
use vm_memory::VolatileSlice;

pub(super) struct Model {
    pub(super) bytes: Vec<u8>,
}

/// A range in bytes, inside the disk.
#[derive(Clone, Copy)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Model {
    fn part(&mut self, range: Range) -> &mut [u8] {
        &mut self.bytes[range.offset as usize..][..range.length as usize]
    }

    pub(super) fn read(&mut self, image: &dyn Image, range: Range) {
        let found = read(image, range);
        assert!(
            found == self.part(range),
            "a read shows other data than was written"
        );
    }

    pub(super) fn write(&mut self, image: &dyn Image, range: Range, tag: u8) {
        let mut bytes = vec![tag; range.length as usize];
        let half = bytes.len() / 1024 * 512;
        let (first, second) = bytes.split_at_mut(half);
        let slices = [VolatileSlice::from(first), VolatileSlice::from(second)];
        let result = image.write(&slices, range.offset);
        self.settle(image, range, tag, result.is_ok());
    }

    pub(super) fn zero(&mut self, image: &dyn Image, range: Range, unmap: bool) {
        let result = image.write_zeroes(range.offset, range.length, unmap);
        self.settle(image, range, 0, result.is_ok());
    }

    /// What was discarded reads as before or as zeros.
    pub(super) fn discard(&mut self, image: &dyn Image, range: Range) {
        let _ = image.discard(range.offset, range.length);
        self.settle(image, range, 0, false);
    }

    /// A growth that failed leaves the disk as long as it was.
    pub(super) fn grow(&mut self, image: &dyn Image, capacity: u64) {
        let before = image.capacity();
        match image.grow(capacity, None) {
            Ok(()) => self.bytes.resize(capacity as usize, 0),
            Err(_) => assert!(image.capacity() == before, "a growth that failed took place"),
        }
    }

    /// A request that succeeded has taken effect; of one that failed, any part.
    fn settle(&mut self, image: &dyn Image, range: Range, tag: u8, done: bool) {
        let part = self.part(range);
        if done {
            part.fill(tag);
            return;
        }
        let now = read(image, range);
        for (now, old) in now.iter().zip(part.iter_mut()) {
            assert!(
                now == old || *now == tag,
                "data that was neither there nor written"
            );
            *old = *now;
        }
    }
}

fn read(image: &dyn Image, range: Range) -> Vec<u8> {
    let mut bytes = vec![0xAA; range.length as usize];
    let slices = [VolatileSlice::from(&mut bytes[..])];
    image.read(&slices, range.offset).expect("a sound image reads");
    bytes
}
