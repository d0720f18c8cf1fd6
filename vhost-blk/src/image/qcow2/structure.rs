//! A new refcount structure: where it finds room, and how it is written.

use std::collections::BTreeSet;
use std::ops::Range;

use super::geometry::Geometry;
use super::header::{MAX_REFTABLE_BYTES, REFTABLE_OFFSET};
use super::refcount::insert;
use crate::image::{BlockFile, ImageError};

/// The host clusters of a refcount structure.
pub(super) struct Structure {
    /// In the order of what they count, from cluster 0 on.
    blocks: Vec<u64>,
    table: Range<u64>,
}

impl Structure {
    /// Finds room in clusters that count as 0 and are not `taken`, from the first on, below `end`; `None` where
    /// there is not enough.
    ///
    /// # Errors
    /// [`ImageError::Refused`] where the table would be too long.
    pub(super) fn place(
        geometry: &Geometry,
        counts: &[u16],
        taken: &BTreeSet<u64>,
        end: u64,
    ) -> Result<Option<Self>, ImageError> {
        let used = counts.iter().rposition(|count| *count > 0);
        let used = used.map_or(0, |last| last as u64 + 1);
        let is_free = |cluster: &u64| {
            let count = counts.get(*cluster as usize);
            count.is_none_or(|count| *count == 0) && !taken.contains(cluster)
        };
        let (mut blocks, mut clusters) = (0, 1);
        loop {
            let Some(placed) = Self::first(blocks, clusters, is_free, end) else {
                return Ok(None);
            };
            // What it counts includes itself.
            let counted = used.max(placed.end());
            let needed = counted.div_ceil(geometry.refblock_entries());
            if needed <= blocks && geometry.clusters_for(blocks * 8) <= clusters {
                return Ok(Some(placed));
            }
            blocks = blocks.max(needed);
            clusters = clusters.max(geometry.clusters_for(blocks * 8));
            if geometry.offset_of(clusters) > MAX_REFTABLE_BYTES {
                return Err(ImageError::refused(
                    "refcount_table_clusters",
                    "the rebuilt table would be over 8 MiB",
                ));
            }
        }
    }

    /// The first free clusters: so many blocks, and clusters in a row.
    fn first(blocks: u64, clusters: u64, is_free: impl Fn(&u64) -> bool, end: u64) -> Option<Self> {
        let found: Vec<u64> = (1..end).filter(&is_free).take(blocks as usize).collect();
        let is_left = |cluster: &u64| is_free(cluster) && found.binary_search(cluster).is_err();
        let table = free_run(clusters, is_left, end)?;
        (found.len() as u64 == blocks).then_some(Self { blocks: found, table })
    }

    /// All its clusters are below.
    fn end(&self) -> u64 {
        let blocks = self.blocks.last().map_or(0, |last| last + 1);
        blocks.max(self.table.end)
    }

    /// Its clusters.
    pub(super) fn runs(&self) -> Vec<Range<u64>> {
        let mut runs = vec![self.table.clone()];
        for block in &self.blocks {
            match runs.last_mut() {
                Some(last) if last.end == *block => last.end += 1,
                _ => runs.push(*block..*block + 1),
            }
        }
        runs
    }

    /// Writes `counts`, to which the structure itself is added, then points the header to it.
    pub(super) fn write(
        &self,
        file: &dyn BlockFile,
        geometry: &Geometry,
        counts: &mut Vec<u16>,
    ) -> Result<(), ImageError> {
        counts.resize(counts.len().max(self.end() as usize), 0);
        for run in self.runs() {
            counts[run.start as usize..run.end as usize].fill(1);
        }
        let mut parts = counts.chunks(geometry.refblock_entries() as usize);
        for cluster in &self.blocks {
            let part = parts.next().unwrap_or(&[]);
            let place = geometry.offset_of(*cluster);
            file.write_at(&block(geometry, part.iter().copied()), place)
                .map_err(ImageError::io("write a refcount block"))?;
        }
        let clusters = self.table.end - self.table.start;
        let mut table = vec![0; clusters as usize * geometry.cluster_bytes()];
        for (entry, cluster) in table.chunks_exact_mut(8).zip(&self.blocks) {
            entry.copy_from_slice(&geometry.offset_of(*cluster).to_be_bytes());
        }
        let place = geometry.offset_of(self.table.start);
        let mut field = [0; 12];
        field[..8].copy_from_slice(&place.to_be_bytes());
        field[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
        file.write_at(&table, place)
            .and_then(|()| file.sync())
            .and_then(|()| file.write_at(&field, REFTABLE_OFFSET))
            .and_then(|()| file.sync())
            .map_err(ImageError::io("write the refcount table"))
    }
}

/// The first so many clusters in a row below `end`, behind the header, that are free.
pub(super) fn free_run(clusters: u64, is_free: impl Fn(&u64) -> bool, end: u64) -> Option<Range<u64>> {
    let mut run = 1..1;
    while run.end - run.start < clusters {
        if run.end >= end {
            return None;
        }
        let next = run.end;
        run.end += 1;
        if !is_free(&next) {
            run.start = run.end;
        }
    }
    Some(run)
}

/// A refcount block with these counts.
fn block(geometry: &Geometry, counts: impl Iterator<Item = u16>) -> Vec<u8> {
    let order = geometry.refcount_order;
    let mut bytes = vec![0; geometry.cluster_bytes()];
    for (index, count) in counts.enumerate() {
        let bit = index << order;
        insert(&mut bytes[bit / 8..], bit as u64 % 8, order, u64::from(count));
    }
    bytes
}

/// A refcount block whose first `counted` clusters are used once.
pub(super) fn block_of_ones(geometry: &Geometry, counted: u64) -> Vec<u8> {
    block(geometry, (0..counted).map(|_| 1))
}
