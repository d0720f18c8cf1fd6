//! Refcounts of host clusters: the table in memory, the blocks through the cache.

use std::ops::Range;

use super::cache::Cache;
use super::geometry::Geometry;
use super::header::Header;
use crate::image::{BlockFile, ImageError};

/// Bytes of refcount blocks kept in memory.
const BLOCK_CACHE: usize = 512 << 10;

/// The refcount table and a window of its blocks.
pub(super) struct Refcounts {
    /// Host offsets of the blocks, 0 where there is none; checked when loaded.
    pub(super) table: Vec<u64>,
    pub(super) table_offset: u64,
    pub(super) blocks: Cache,
}

impl Refcounts {
    /// Those of a reader, who has no use for any.
    pub(super) fn none(geometry: &Geometry) -> Self {
        Self {
            table: Vec::new(),
            table_offset: 0,
            blocks: Cache::new(BLOCK_CACHE, geometry.cluster_size()),
        }
    }

    /// Loads the table.
    ///
    /// # Errors
    /// [`ImageError::Refused`] for an entry that places its block where none can be.
    pub(super) fn load(file: &dyn BlockFile, header: &Header, file_end: u64) -> Result<Self, ImageError> {
        Self::load_with(file, header, file_end, &mut |index, entry| {
            Err(ImageError::refused(
                "refcount table",
                format!(
                    "entry {index} places a block at {entry:#x}: not aligned, in the header or past the end"
                ),
            ))
        })
    }

    /// Loads the table; `bad` judges the entries that place a block where none can be, number and value. A
    /// block that it does not refuse counts as absent.
    pub(super) fn load_with(
        file: &dyn BlockFile,
        header: &Header,
        file_end: u64,
        bad: &mut dyn FnMut(usize, u64) -> Result<(), ImageError>,
    ) -> Result<Self, ImageError> {
        let geometry = &header.geometry;
        let mut bytes = vec![0; header.reftable_clusters as usize * geometry.cluster_bytes()];
        file.read_at(&mut bytes, header.reftable_offset)
            .map_err(ImageError::io("read the refcount table"))?;
        let mut refcounts = Self::none(geometry);
        refcounts.table_offset = header.reftable_offset;
        refcounts.table.extend(words(&bytes));
        for (index, entry) in refcounts.table.iter_mut().enumerate() {
            let inside = geometry.cluster_size()..file_end;
            if *entry != 0 && (geometry.within(*entry) != 0 || !inside.contains(entry)) {
                bad(index, std::mem::take(entry))?;
            }
        }
        Ok(refcounts)
    }

    /// The clusters of the table, then those of the blocks.
    pub(super) fn structure(&self, geometry: &Geometry) -> impl Iterator<Item = u64> {
        let first = geometry.cluster_of(self.table_offset);
        let table = first..first + geometry.clusters_for(self.table.len() as u64 * 8);
        let blocks = self.table.iter().filter(|block| **block != 0);
        let geometry = *geometry;
        table.chain(blocks.map(move |block| geometry.cluster_of(*block)))
    }

    /// Host offset of the block that covers a cluster.
    pub(super) fn block_of(&self, geometry: &Geometry, cluster: u64) -> Option<u64> {
        let index = usize::try_from(cluster / geometry.refblock_entries()).ok()?;
        self.table.get(index).copied().filter(|block| *block != 0)
    }

    /// Whether the block of this number exists.
    pub(super) fn has_block(&self, index: u64) -> bool {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.table.get(index).is_some_and(|block| *block != 0)
    }

    /// Where the refcounts of a run of clusters, which one block covers, lie in the file.
    pub(super) fn bytes_of(&self, geometry: &Geometry, clusters: Range<u64>) -> Option<Range<u64>> {
        let block = self.block_of(geometry, clusters.start)?;
        let order = geometry.refcount_order;
        let first = clusters.start % geometry.refblock_entries();
        let bits = (first + (clusters.end - clusters.start)) << order;
        Some(block + byte_of(first, order)..block + bits.div_ceil(8))
    }

    /// Refcount of a cluster; 0 where no block covers it.
    pub(super) fn get(
        &mut self,
        file: &dyn BlockFile,
        geometry: &Geometry,
        cluster: u64,
    ) -> Result<u64, ImageError> {
        let Some(block) = self.block_of(geometry, cluster) else {
            return Ok(0);
        };
        let index = cluster % geometry.refblock_entries();
        let bytes = self
            .blocks
            .bytes(file, block + byte_of(index, geometry.refcount_order))?;
        Ok(extract(
            bytes,
            bit_in_byte(index, geometry.refcount_order),
            geometry.refcount_order,
        ))
    }

    /// Replaces the refcounts of a run of clusters by what `change` makes of each.
    pub(super) fn update(
        &mut self,
        file: &dyn BlockFile,
        geometry: &Geometry,
        clusters: Range<u64>,
        change: &dyn Fn(u64, u64) -> Result<u64, ImageError>,
    ) -> Result<(), ImageError> {
        let order = geometry.refcount_order;
        let mut cluster = clusters.start;
        while cluster < clusters.end {
            let block = self.block_of(geometry, cluster).ok_or_else(|| {
                ImageError::corrupt("refcount table", format!("no block covers cluster {cluster:#x}"))
            })?;
            let index = cluster % geometry.refblock_entries();
            let address = block + byte_of(index, order);
            let slice_end = self.blocks.slice_end(address);
            let in_slice = ((slice_end - address) * 8 - bit_in_byte(index, order)) >> order;
            let count = in_slice.min(clusters.end - cluster);
            let last_bit = bit_in_byte(index, order) + (count << order);
            let len = last_bit.div_ceil(8) as usize;
            let mut bytes = self.blocks.bytes(file, address)?[..len].to_vec();
            for step in 0..count {
                let bit = bit_in_byte(index, order) + (step << order);
                let at = (bit / 8) as usize;
                let old = extract(&bytes[at..], bit % 8, order);
                insert(&mut bytes[at..], bit % 8, order, change(cluster + step, old)?);
            }
            self.blocks.write(file, address, &bytes)?;
            cluster += count;
        }
        Ok(())
    }
}

/// Byte of a block that holds the start of an entry.
fn byte_of(index: u64, order: u32) -> u64 {
    (index << order) / 8
}

/// First bit, in its byte, of an entry; 0 for entries of a byte and more.
fn bit_in_byte(index: u64, order: u32) -> u64 {
    (index << order) % 8
}

/// Reads an entry that starts at `bit` of the first byte; low bits come first.
pub(super) fn extract(bytes: &[u8], bit: u64, order: u32) -> u64 {
    if order < 3 {
        let mask = (1_u64 << (1 << order)) - 1;
        return u64::from(bytes[0]) >> bit & mask;
    }
    bytes[..1 << (order - 3)]
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Writes an entry, the reverse of [`extract`].
pub(super) fn insert(bytes: &mut [u8], bit: u64, order: u32, value: u64) {
    if order < 3 {
        let mask = (1_u8 << (1 << order)).wrapping_sub(1);
        bytes[0] = bytes[0] & !(mask << bit) | (value as u8 & mask) << bit;
        return;
    }
    let len = 1 << (order - 3);
    bytes[..len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
}

/// Big-endian words.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + use<'_> {
    bytes
        .chunks_exact(8)
        .map(|word| word.try_into().map_or(0, u64::from_be_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_every_width_keep_to_themselves() {
        for order in 0..=6 {
            let mut bytes = [0; 64];
            let max = if order == 6 {
                u64::MAX
            } else {
                (1 << (1_u32 << order)) - 1
            };
            for index in 0..8_u64 {
                let (at, bit) = (byte_of(index, order) as usize, bit_in_byte(index, order));
                insert(&mut bytes[at..], bit, order, if index % 2 == 0 { max } else { 0 });
            }
            for index in 0..8_u64 {
                let (at, bit) = (byte_of(index, order) as usize, bit_in_byte(index, order));
                let expected = if index % 2 == 0 { max } else { 0 };
                assert_eq!(
                    extract(&bytes[at..], bit, order),
                    expected,
                    "order {order} index {index}"
                );
            }
        }
    }

    #[test]
    fn low_bits_come_first_below_a_byte() {
        let mut byte = [0];
        insert(&mut byte, 0, 0, 1);
        insert(&mut byte, 2, 1, 3);
        assert_eq!(byte, [0b1101]);
    }
}
