//! Reserving host clusters in runs ahead of use.
//!
//! A reserved cluster has a durable refcount of one and durably reads as zeros, so that mapping it needs
//! no barrier. What a crash leaves unused is a leak of at most one run.

use std::collections::VecDeque;
use std::ops::Range;

use super::{Kind, Meta, Qcow2};
use crate::image::ImageError;

/// Bytes of the first run.
const FIRST_RUN: u64 = 1 << 20;
/// Bytes of the longest run: bounds what a crash leaks.
const LONGEST_RUN: u64 = 64 << 20;
/// Clusters of the longest run: bounds what one reservation costs.
const MOST_CLUSTERS: u64 = 8192;
/// Clusters looked at for a long run of free ones: bounds what that costs.
const MOST_SEEN: u64 = 16 << 20;
/// Times that a long run is looked for anew, since what counts it may have been put into it.
const MOST_TRIES: u32 = 16;

/// Clusters reserved, and where to look for more.
pub(super) struct Reserve {
    free: VecDeque<Range<u64>>,
    /// No cluster below is free.
    hint: u64,
    /// Bytes of the next run.
    run: u64,
    /// A run that the host failed to make durable: it is the next to be tried, so that failures leak no
    /// more than a crash does.
    pending: Option<Run>,
}

impl Reserve {
    pub(super) fn new() -> Self {
        Self {
            free: VecDeque::new(),
            hint: 1,
            run: FIRST_RUN,
            pending: None,
        }
    }

    /// Clusters from here on may be free.
    pub(super) fn freed(&mut self, cluster: u64) {
        self.hint = self.hint.min(cluster.max(1));
    }
}

/// A reservation being made.
#[derive(Default)]
struct Run {
    clusters: Vec<Range<u64>>,
    count: u64,
    /// Refcount blocks that are not yet in the table: index and host offset.
    new_blocks: Vec<(usize, u64)>,
}

impl Run {
    fn of(clusters: Range<u64>) -> Self {
        Self {
            count: clusters.end - clusters.start,
            clusters: vec![clusters],
            new_blocks: Vec::new(),
        }
    }

    fn push(&mut self, cluster: u64) {
        self.count += 1;
        match self.clusters.last_mut() {
            Some(last) if last.end == cluster => last.end += 1,
            _ => self.clusters.push(cluster..cluster + 1),
        }
    }
}

impl Qcow2 {
    /// Takes one reserved cluster, for a table.
    pub(super) fn take_one(&self, meta: &mut Meta) -> Result<u64, ImageError> {
        Ok(self.take(meta, 1)?.start)
    }

    /// Takes up to `most` consecutive reserved clusters; at least one.
    pub(super) fn take(&self, meta: &mut Meta, most: u64) -> Result<Range<u64>, ImageError> {
        if meta.reserve.free.is_empty() {
            self.reserve(meta)?;
        }
        let Some(front) = meta.reserve.free.front_mut() else {
            return Err(no_space());
        };
        let taken = front.start..front.end.min(front.start + most);
        front.start = taken.end;
        if front.is_empty() {
            meta.reserve.free.pop_front();
        }
        for cluster in taken.clone() {
            meta.kinds.remove(&cluster);
        }
        Ok(taken)
    }

    /// Takes `count` consecutive clusters, durably zero as reserved ones are, for a table of that length.
    pub(super) fn take_consecutive(&self, meta: &mut Meta, count: u64) -> Result<Range<u64>, ImageError> {
        if meta.reserve.free.is_empty() || meta.reserve.pending.is_some() {
            self.reserve(meta)?;
        }
        let long = |run: &Range<u64>| run.end - run.start >= count;
        let taken = match meta.reserve.free.iter_mut().find(|run| long(run)) {
            Some(run) => {
                let taken = run.start..run.start + count;
                run.start = taken.end;
                meta.reserve.free.retain(|run| !run.is_empty());
                taken
            }
            None => {
                let taken = self.find_consecutive(meta, count)?;
                self.reserve_run(meta, Run::of(taken.clone()))?;
                taken
            }
        };
        for cluster in taken.clone() {
            meta.kinds.remove(&cluster);
        }
        Ok(taken)
    }

    /// Free clusters in a row, with the refcount blocks that they need, which lie elsewhere.
    fn find_consecutive(&self, meta: &mut Meta, count: u64) -> Result<Range<u64>, ImageError> {
        let per_block = self.geometry.refblock_entries();
        for _ in 0..MOST_TRIES {
            let found = self.see_free(meta, count)?;
            let blocks = found.start / per_block..(found.end - 1) / per_block + 1;
            let missing = |index: &u64| !meta.refcounts.has_block(*index);
            let missing: Vec<u64> = blocks.filter(missing).collect();
            if missing.is_empty() {
                return Ok(found);
            }
            for index in missing {
                self.add_block_elsewhere(meta, index)?;
            }
        }
        Err(no_space())
    }

    /// The first free clusters in a row: past the end of a file, anywhere on a device.
    fn see_free(&self, meta: &mut Meta, count: u64) -> Result<Range<u64>, ImageError> {
        let first = if self.file.has_fixed_size() {
            meta.reserve.hint
        } else {
            self.geometry.cluster_of(meta.file_end)
        };
        let end = self.places_end()?.min(first + MOST_SEEN + count);
        self.cool(meta);
        let mut start = first;
        let mut cluster = first;
        while cluster - start < count {
            if cluster >= end {
                return Err(no_space());
            }
            let used = meta.refcounts.get(&*self.file, &self.geometry, cluster)? != 0;
            if used || meta.freed.is_hot(cluster) {
                start = cluster + 1;
            } else {
                self.check_free(meta, cluster)?;
            }
            cluster += 1;
        }
        Ok(start..cluster)
    }

    /// Makes a refcount block in a reserved cluster, which is as an empty block must be.
    fn add_block_elsewhere(&self, meta: &mut Meta, index: u64) -> Result<(), ImageError> {
        if meta.reserve.free.is_empty() {
            self.reserve(meta)?;
        }
        if meta.refcounts.has_block(index) {
            return Ok(());
        }
        if index >= meta.refcounts.table.len() as u64 {
            return self.grow_table(meta, index);
        }
        let cluster = self.take_one(meta)?;
        let block = self.geometry.offset_of(cluster);
        meta.kinds.insert(cluster, Kind::Refblock);
        // Nobody else makes it durable, and refcounts in the block are relied on from here on.
        self.file
            .write_durably(&block.to_be_bytes(), meta.refcounts.table_offset + index * 8)
            .map_err(ImageError::io("write the refcount table"))?;
        meta.refcounts.table[index as usize] = block;
        Ok(())
    }

    fn reserve(&self, meta: &mut Meta) -> Result<(), ImageError> {
        let run = match meta.reserve.pending.take() {
            Some(run) => run,
            None => self.next_run(meta)?,
        };
        let clusters = self.reserve_run(meta, run)?;
        meta.reserve.run = (meta.reserve.run * 2).min(LONGEST_RUN);
        meta.reserve.free.extend(clusters);
        Ok(())
    }

    /// Makes a run durable; one that fails is the next to be tried.
    fn reserve_run(&self, meta: &mut Meta, run: Run) -> Result<Vec<Range<u64>>, ImageError> {
        for cluster in run.clusters.iter().cloned().flatten() {
            meta.kinds.insert(cluster, Kind::Reserved);
        }
        match self.make_durable(meta, &run) {
            Ok(()) => Ok(run.clusters),
            Err(error) => {
                meta.reserve.pending = Some(run);
                Err(error)
            }
        }
    }

    fn next_run(&self, meta: &mut Meta) -> Result<Run, ImageError> {
        let mut run = Run::default();
        match self.find_free(meta, &mut run) {
            Ok(()) => Ok(run),
            Err(error) => {
                self.forget_blocks(meta, &run);
                Err(error)
            }
        }
    }

    /// Forgets blocks that the table in the file does not know: their clusters are free.
    fn forget_blocks(&self, meta: &mut Meta, run: &Run) {
        for (index, block) in &run.new_blocks {
            meta.refcounts.table[*index] = 0;
            meta.kinds.remove(&self.geometry.cluster_of(*block));
            meta.refcounts
                .blocks
                .forget(*block..*block + self.geometry.cluster_size());
        }
    }

    /// Collects free clusters; makes the refcount blocks that they need.
    fn find_free(&self, meta: &mut Meta, run: &mut Run) -> Result<(), ImageError> {
        let geometry = &self.geometry;
        let want = geometry.clusters_for(meta.reserve.run).clamp(4, MOST_CLUSTERS);
        let end = self.places_end()?;
        self.cool(meta);
        let mut cluster = meta.reserve.hint;
        while run.count < want && cluster < end {
            if meta.refcounts.block_of(geometry, cluster).is_none() {
                self.add_block(meta, run, cluster)?;
            }
            if meta.refcounts.get(&*self.file, geometry, cluster)? == 0 && !meta.freed.is_hot(cluster) {
                self.check_free(meta, cluster)?;
                run.push(cluster);
            }
            cluster += 1;
        }
        if run.count == 0 {
            return Err(no_space());
        }
        meta.reserve.hint = cluster;
        Ok(())
    }

    /// The first cluster that can be no place for anything.
    fn places_end(&self) -> Result<u64, ImageError> {
        if !self.file.has_fixed_size() {
            return Ok(self.geometry.cluster_of(1 << 56));
        }
        let size = self.file.size();
        let size = size.map_err(ImageError::io("find the size of the device"))?;
        Ok(self.geometry.cluster_of(size))
    }

    /// An allocation must not fall on what is in use although its refcount says otherwise.
    fn check_free(&self, meta: &Meta, cluster: u64) -> Result<(), ImageError> {
        match meta.kinds.get(&cluster) {
            None => Ok(()),
            Some(kind) => Err(ImageError::corrupt(
                "refcount block",
                format!("the refcount of cluster {cluster:#x} is 0, but it holds the {kind}"),
            )),
        }
    }

    /// Makes a refcount block for `cluster` in the first cluster that it covers itself.
    fn add_block(&self, meta: &mut Meta, run: &mut Run, cluster: u64) -> Result<(), ImageError> {
        let geometry = &self.geometry;
        let index = cluster / geometry.refblock_entries();
        if index >= meta.refcounts.table.len() as u64 {
            return self.grow_table(meta, index);
        }
        let place = index * geometry.refblock_entries();
        self.check_free(meta, place)?;
        let block = geometry.offset_of(place);
        let zeros = vec![0; geometry.cluster_bytes()];
        self.file
            .write_at(&zeros, block)
            .map_err(ImageError::io("write a refcount block"))?;
        meta.file_end = meta.file_end.max(block + geometry.cluster_size());
        meta.refcounts
            .blocks
            .forget(block..block + geometry.cluster_size());
        meta.l2.forget(block..block + geometry.cluster_size());
        meta.refcounts.table[index as usize] = block;
        meta.kinds.insert(place, Kind::Refblock);
        run.new_blocks.push((index as usize, block));
        meta.refcounts
            .update(&*self.file, geometry, place..place + 1, &|_, _| Ok(1))
    }

    /// Raises the refcounts of a run, clears its clusters and waits until both are durable.
    fn make_durable(&self, meta: &mut Meta, run: &Run) -> Result<(), ImageError> {
        let geometry = &self.geometry;
        let grows = self.only_grows(meta, run);
        for clusters in &run.clusters {
            meta.refcounts
                .update(&*self.file, geometry, clusters.clone(), &|_, _| Ok(1))?;
            let range = geometry.offset_of(clusters.start)..geometry.offset_of(clusters.end);
            meta.l2.forget(range.clone());
            meta.refcounts.blocks.forget(range.clone());
            let old_end = if self.file.has_fixed_size() {
                u64::MAX
            } else {
                meta.file_end
            };
            let used_before = range.start..range.end.min(old_end);
            if !used_before.is_empty() {
                self.file
                    .zero_range(used_before.start, used_before.end - used_before.start)
                    .map_err(ImageError::io("clear free clusters"))?;
            }
            if range.end > meta.file_end {
                self.file
                    .grow_to(range.end)
                    .map_err(ImageError::io("grow the image's file"))?;
                meta.file_end = range.end;
            }
        }
        if let Some(clusters) = grows {
            return self.flush_refcounts(meta, clusters);
        }
        self.file.sync().map_err(ImageError::io("flush refcounts"))?;
        if run.new_blocks.is_empty() {
            return Ok(());
        }
        for (index, block) in &run.new_blocks {
            self.file
                .write_at(
                    &block.to_be_bytes(),
                    meta.refcounts.table_offset + *index as u64 * 8,
                )
                .map_err(ImageError::io("write the refcount table"))?;
        }
        self.file
            .sync()
            .map_err(ImageError::io("flush the refcount table"))
    }

    /// The clusters of a run that lies behind the file's end in one piece and needs no new block: its
    /// refcounts and the file's length are all that must be durable.
    fn only_grows(&self, meta: &Meta, run: &Run) -> Option<Range<u64>> {
        match (&run.clusters[..], run.new_blocks.is_empty()) {
            ([clusters], true)
                if self.geometry.offset_of(clusters.start) >= meta.file_end
                    && !self.file.has_fixed_size() =>
            {
                Some(clusters.clone())
            }
            _ => None,
        }
    }

    /// Makes the refcounts of a run durable without waiting for the guest data that is dirty meanwhile.
    fn flush_refcounts(&self, meta: &Meta, clusters: Range<u64>) -> Result<(), ImageError> {
        let mut first = clusters.start;
        while first < clusters.end {
            let per_block = self.geometry.refblock_entries();
            let end = clusters.end.min((first / per_block + 1) * per_block);
            let bytes = meta.refcounts.bytes_of(&self.geometry, first..end);
            let bytes = bytes.ok_or_else(|| ImageError::corrupt("refcount table", "lost a block"))?;
            let mut copy = vec![0; (bytes.end - bytes.start) as usize];
            self.file
                .read_at(&mut copy, bytes.start)
                .and_then(|()| self.file.write_durably(&copy, bytes.start))
                .map_err(ImageError::io("flush refcounts"))?;
            first = end;
        }
        Ok(())
    }

    /// Moves the refcount table to a larger place, past everything that it covers now.
    ///
    /// The new table and the blocks that count its own clusters lie together there.
    fn grow_table(&self, meta: &mut Meta, needed: u64) -> Result<(), ImageError> {
        let geometry = &self.geometry;
        let per_block = geometry.refblock_entries();
        let old_len = meta.refcounts.table.len() as u64;
        let limit = super::header::MAX_REFTABLE_BYTES / 8;
        let mut entries = (needed + 1).max(old_len + old_len / 2 + 1);
        let (clusters, blocks) = loop {
            let clusters = geometry.clusters_for(entries * 8);
            let blocks = (clusters + 1).div_ceil(per_block.saturating_sub(1).max(1));
            if needed + blocks <= clusters * geometry.cluster_size() / 8 {
                break (clusters, blocks);
            }
            entries = needed + blocks;
        };
        if clusters * geometry.cluster_size() / 8 > limit {
            return Err(no_space());
        }
        let start = needed * per_block;
        let total = blocks + clusters;
        for cluster in start..start + total {
            self.check_free(meta, cluster)?;
        }
        let block_at = |index: u64| geometry.offset_of(start + index);
        let mut table = meta.refcounts.table.clone();
        table.resize((clusters * geometry.cluster_size() / 8) as usize, 0);
        for index in 0..blocks {
            table[(needed + index) as usize] = block_at(index);
            let counted = total.saturating_sub(index * per_block).min(per_block);
            let block = super::structure::block_of_ones(geometry, counted);
            self.file
                .write_at(&block, block_at(index))
                .map_err(ImageError::io("write a refcount block"))?;
        }
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let place = block_at(blocks);
        self.file
            .write_at(&bytes, place)
            .map_err(ImageError::io("write the refcount table"))?;
        self.file
            .sync()
            .map_err(ImageError::io("flush the refcount table"))?;
        self.publish_reftable(place, clusters)?;
        let old = geometry.cluster_of(meta.refcounts.table_offset);
        let old = old..old + geometry.clusters_for(old_len * 8);
        meta.refcounts.table = table;
        meta.refcounts.table_offset = place;
        meta.file_end = meta.file_end.max(geometry.offset_of(start + total));
        let moved = geometry.offset_of(start)..geometry.offset_of(start + total);
        meta.refcounts.blocks.forget(moved.clone());
        meta.l2.forget(moved);
        for cluster in old.clone() {
            meta.kinds.remove(&cluster);
        }
        for index in 0..total {
            let kind = if index < blocks {
                Kind::Refblock
            } else {
                Kind::Table("refcount table")
            };
            meta.kinds.insert(start + index, kind);
        }
        self.free_later(meta, old);
        Ok(())
    }

    /// Points the header to a refcount table that is durable, and waits until that is.
    pub(super) fn publish_reftable(&self, offset: u64, clusters: u64) -> Result<(), ImageError> {
        let mut field = [0; 12];
        field[..8].copy_from_slice(&offset.to_be_bytes());
        field[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
        self.file
            .write_at(&field, super::header::REFTABLE_OFFSET)
            .and_then(|()| self.file.sync())
            .map_err(ImageError::io("write the header"))
    }

    /// Gives back what is reserved: it was never mapped, so that no barrier is needed before.
    pub(super) fn release_reserve(&self) -> Result<(), ImageError> {
        let mut meta = self.lock();
        let mut unused = std::mem::take(&mut meta.reserve.free);
        let pending = meta.reserve.pending.take();
        unused.extend(pending.iter().flat_map(|run| run.clusters.iter().cloned()));
        for clusters in &unused {
            meta.refcounts
                .update(&*self.file, &self.geometry, clusters.clone(), &|_, _| Ok(0))?;
            for cluster in clusters.clone() {
                meta.kinds.remove(&cluster);
            }
            meta.reserve.freed(clusters.start);
        }
        if let Some(run) = pending {
            self.forget_blocks(&mut meta, &run);
        }
        let tail = unused
            .iter()
            .find(|range| self.geometry.offset_of(range.end) == meta.file_end);
        if let Some(start) = tail.map(|range| self.geometry.offset_of(range.start)) {
            self.file
                .cut_to(start)
                .map_err(ImageError::io("cut the image's file"))?;
            meta.file_end = start;
        }
        if unused.is_empty() {
            return Ok(());
        }
        meta.reserve.run = FIRST_RUN;
        self.file.sync().map_err(ImageError::io("flush refcounts"))
    }
}

fn no_space() -> ImageError {
    ImageError::io("find free clusters")(crate::image::no_space())
}
