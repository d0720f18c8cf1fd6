//! A bounded cache of metadata in slices of at most 4 KiB, always equal to what the file holds.
//!
//! Every change is written to the file first (a completed request may have no mapping that lives in this
//! process alone), so that eviction never writes.

use crate::image::{BlockFile, ImageError};

const SLICE: usize = 4096;
const WAYS: usize = 4;

struct Slice {
    /// Host offset of the first byte.
    start: u64,
    /// For the choice of a victim: when it was last used.
    used: u64,
    /// One bit for each 8 bytes: the entry has been checked for being overwritten in place.
    verified: [u64; SLICE / 8 / 64],
    data: [u8; SLICE],
}

/// A set-associative cache of metadata, by host offset.
pub(super) struct Cache {
    sets: Vec<[Option<Box<Slice>>; WAYS]>,
    slice_len: usize,
    clock: u64,
}

impl Cache {
    /// At most `bytes` of slices (at least one set), for tables in clusters of `cluster_size`.
    pub(super) fn new(bytes: usize, cluster_size: u64) -> Self {
        let slice_len = usize::try_from(cluster_size).unwrap_or(SLICE).min(SLICE);
        let sets = (bytes / (SLICE * WAYS)).max(1);
        let sets = if sets.is_power_of_two() {
            sets
        } else {
            sets.next_power_of_two() / 2
        };
        Self {
            sets: (0..sets).map(|_| [const { None }; WAYS]).collect(),
            slice_len,
            clock: 0,
        }
    }

    fn start_of(&self, offset: u64) -> u64 {
        offset & !(self.slice_len as u64 - 1)
    }

    /// Last byte, plus one, of the slice that holds `offset`.
    pub(super) fn slice_end(&self, offset: u64) -> u64 {
        self.start_of(offset) + self.slice_len as u64
    }

    fn set_of(&self, start: u64) -> usize {
        let hash = (start / self.slice_len as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (hash >> 32) as usize & (self.sets.len() - 1)
    }

    fn slice(&mut self, file: &dyn BlockFile, offset: u64) -> Result<&mut Slice, ImageError> {
        let start = self.start_of(offset);
        let set = self.set_of(start);
        self.clock += 1;
        let ways = &mut self.sets[set];
        let found = ways
            .iter()
            .position(|way| way.as_ref().is_some_and(|slice| slice.start == start));
        let way = match found {
            Some(way) => way,
            None => {
                let victim = oldest(ways);
                let mut slice = ways[victim].take().unwrap_or_else(|| {
                    Box::new(Slice {
                        start: 0,
                        used: 0,
                        verified: [0; SLICE / 8 / 64],
                        data: [0; SLICE],
                    })
                });
                slice.start = start;
                slice.verified = [0; SLICE / 8 / 64];
                file.read_at(&mut slice.data[..self.slice_len], start)
                    .map_err(ImageError::io("read a metadata table"))?;
                ways[victim] = Some(slice);
                victim
            }
        };
        match &mut ways[way] {
            Some(slice) => {
                slice.used = self.clock;
                Ok(slice)
            }
            None => Err(ImageError::corrupt("metadata cache", "lost a slice")),
        }
    }

    /// The bytes from `offset` to the end of its slice.
    pub(super) fn bytes(&mut self, file: &dyn BlockFile, offset: u64) -> Result<&[u8], ImageError> {
        let from = (offset - self.start_of(offset)) as usize;
        let len = self.slice_len;
        Ok(&self.slice(file, offset)?.data[from..len])
    }

    /// The big-endian word at `offset`, a multiple of 8.
    pub(super) fn word(&mut self, file: &dyn BlockFile, offset: u64) -> Result<u64, ImageError> {
        let bytes = self.bytes(file, offset)?;
        Ok(bytes.first_chunk().map_or(0, |word| u64::from_be_bytes(*word)))
    }

    /// Writes `bytes`, which lie in one slice, to the file and to the cache.
    pub(super) fn write(
        &mut self,
        file: &dyn BlockFile,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        let from = (offset - self.start_of(offset)) as usize;
        if let Err(error) = file.write_at(bytes, offset) {
            self.forget(offset..offset + 1);
            return Err(ImageError::io("write a metadata table")(error));
        }
        let slice = self.slice(file, offset)?;
        slice.data[from..from + bytes.len()].copy_from_slice(bytes);
        for index in from / 8..(from + bytes.len()).div_ceil(8) {
            slice.verified[index / 64] &= !(1 << (index % 64));
        }
        Ok(())
    }

    /// Whether [`Self::set_verified`] was called for the entry at `offset` since it was last changed.
    pub(super) fn is_verified(&mut self, file: &dyn BlockFile, offset: u64) -> Result<bool, ImageError> {
        let index = (offset - self.start_of(offset)) as usize / 8;
        Ok(self.slice(file, offset)?.verified[index / 64] >> (index % 64) & 1 != 0)
    }

    pub(super) fn set_verified(&mut self, file: &dyn BlockFile, offset: u64) -> Result<(), ImageError> {
        let index = (offset - self.start_of(offset)) as usize / 8;
        self.slice(file, offset)?.verified[index / 64] |= 1 << (index % 64);
        Ok(())
    }

    /// Takes back every [`Self::set_verified`]: what it was said for may have changed.
    pub(super) fn forget_verified(&mut self) {
        for slice in self.sets.iter_mut().flatten().flatten() {
            slice.verified = [0; SLICE / 8 / 64];
        }
    }

    /// Drops what it holds of a range of the file, which is about to get another use.
    pub(super) fn forget(&mut self, range: std::ops::Range<u64>) {
        let slices = (range.end - self.start_of(range.start)).div_ceil(self.slice_len as u64);
        if slices > (self.sets.len() * WAYS) as u64 {
            for way in self.sets.iter_mut().flatten() {
                way.take_if(|slice| range.contains(&slice.start));
            }
            return;
        }
        for index in 0..slices {
            let start = self.start_of(range.start) + index * self.slice_len as u64;
            let set = self.set_of(start);
            for way in &mut self.sets[set] {
                way.take_if(|slice| slice.start == start);
            }
        }
    }
}

fn oldest(ways: &[Option<Box<Slice>>; WAYS]) -> usize {
    let age = |index: &usize| ways[*index].as_ref().map_or(0, |slice| slice.used);
    (0..WAYS).min_by_key(age).unwrap_or(0)
}
