//! Making the disk longer, while it is used or at rest.
//!
//! Each step is durable before the next: an L1 table that is long enough, zeros where anything else would
//! show behind the disk's end, the size in the header. What a crash cuts off leaves the disk as it was.

use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::geometry::Geometry;
use super::header::{L1_OFFSET, MAX_L1_BYTES, SIZE_OFFSET};
use super::{Kind, Meta, Qcow2};
use crate::image::{ImageError, SECTOR};

/// Guest bytes cleared before the deadline is looked at: little enough to be written as zeros where the
/// version knows no other way.
const PIECE: u64 = 64 << 20;

/// What growing keeps from one time to the next.
pub(super) struct Growth {
    /// Why the image cannot grow: a field and what is wrong with it.
    excluded: Option<(&'static str, &'static str)>,
    /// Up to here all is clear behind the cluster in which the disk ends.
    cleared: u64,
}

impl Growth {
    pub(super) fn new(excluded: Option<(&'static str, &'static str)>) -> Self {
        Self { excluded, cleared: 0 }
    }
}

/// L1 entries of a disk of `size` bytes.
///
/// # Errors
/// [`ImageError::Refused`] for a size that no disk can have.
pub(super) fn check_size(geometry: &Geometry, size: u64) -> Result<u64, ImageError> {
    if !size.is_multiple_of(SECTOR) || i64::try_from(size).is_err() {
        return Err(ImageError::refused(
            "size",
            format!("{size} is no multiple of 512 below 2^63"),
        ));
    }
    let entries = geometry.l1_entries(size);
    if entries * 8 > MAX_L1_BYTES {
        return Err(ImageError::refused(
            "size",
            "the L1 table would be over 32 MiB; it takes larger clusters",
        ));
    }
    Ok(entries)
}

impl Qcow2 {
    pub(super) fn grow_disk(&self, capacity: u64, deadline: Option<Instant>) -> Result<(), ImageError> {
        let mut growth = self.growth.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_writable()?;
        let entries = check_size(&self.geometry, capacity)?;
        let now = self.size();
        if capacity < now {
            let reason = format!("{capacity} bytes are fewer than the disk's {now}");
            return Err(ImageError::refused("size", reason));
        }
        if capacity == now {
            return Ok(());
        }
        if let Some((field, reason)) = growth.excluded {
            return Err(ImageError::refused(field, reason));
        }
        self.with_room(|| self.grow_l1(entries))?;
        self.set_limit(capacity);
        let cleared = self
            .clear(&mut growth, now..capacity, deadline)
            .and_then(|()| self.flush_and_free())
            .and_then(|()| self.is_writable());
        if cleared.is_err() {
            self.set_limit(now);
        }
        cleared?;
        self.file
            .write_at(&capacity.to_be_bytes(), SIZE_OFFSET)
            .and_then(|()| self.file.sync())
            .map_err(ImageError::io("write the header"))?;
        self.size.store(capacity, Ordering::Release);
        Ok(())
    }

    /// Under the lock: whoever holds it knows what the end is.
    fn set_limit(&self, limit: u64) {
        let _meta = self.lock();
        self.limit.store(limit, Ordering::Release);
    }

    /// Makes what the disk grows by read as zeros: the rest of the cluster in which it ends, what a backing
    /// file shows there, what is mapped there although no disk was.
    fn clear(
        &self,
        growth: &mut Growth,
        new: Range<u64>,
        deadline: Option<Instant>,
    ) -> Result<(), ImageError> {
        // A write that was planned before the limit rose maps its cluster without what lies behind.
        let last = self.geometry.cluster_of(new.start);
        drop(self.lock_idle(last..last + 1));
        let whole = new
            .start
            .next_multiple_of(self.geometry.cluster_size())
            .min(new.end);
        self.clear_piece(new.start..whole)?;
        let mut at = whole.max(growth.cleared.min(new.end));
        while at < new.end {
            let end = self.piece_end(at).min(new.end);
            self.clear_piece(at..end)?;
            vhost_daemon::progress();
            growth.cleared = end;
            at = end;
            if at < new.end && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(ImageError::refused(
                    "size",
                    format!(
                        "clearing the new part takes longer, it is at {at}; order it again to go on there"
                    ),
                ));
            }
        }
        Ok(())
    }

    fn clear_piece(&self, range: Range<u64>) -> Result<(), ImageError> {
        if range.is_empty() {
            return Ok(());
        }
        self.with_room(|| self.zero_range(range.start, range.end - range.start, true))
    }

    /// Where the piece ends that starts at `at`. Nothing is written for most of what no backing file covers.
    fn piece_end(&self, at: u64) -> u64 {
        let covered = self.covered().next_multiple_of(self.geometry.cluster_size());
        if at < covered {
            return ((at / PIECE + 1) * PIECE).min(covered);
        }
        let table = self.geometry.offset_of(1 << self.geometry.l2_bits());
        let piece = PIECE.max(table);
        (at / piece + 1) * piece
    }

    /// Makes the L1 table long enough.
    fn grow_l1(&self, entries: u64) -> Result<(), ImageError> {
        let mut meta = self.lock();
        self.prepare(&mut meta)?;
        let old = meta.l1.len() as u64;
        let room = self.geometry.offset_of(self.geometry.clusters_for(old * 8)) / 8;
        if entries <= old {
            Ok(())
        } else if entries <= room {
            self.extend_l1(&mut meta, entries)
        } else {
            self.move_l1(&mut meta, entries)
        }
    }

    /// Makes the L1 table longer inside its last cluster.
    fn extend_l1(&self, meta: &mut Meta, entries: u64) -> Result<(), ImageError> {
        let old = meta.l1.len() as u64;
        let zeros = vec![0; (entries - old) as usize * 8];
        self.file
            .write_at(&zeros, meta.l1_offset + old * 8)
            .and_then(|()| self.file.sync())
            .map_err(ImageError::io("write the L1 table"))?;
        self.point_to_l1(meta.l1_offset, entries)?;
        meta.l1.resize(entries as usize, 0);
        self.file.sync().map_err(ImageError::io("flush the header"))
    }

    /// Moves the L1 table to a larger place.
    fn move_l1(&self, meta: &mut Meta, entries: u64) -> Result<(), ImageError> {
        let geometry = &self.geometry;
        let clusters = self.take_consecutive(meta, geometry.clusters_for(entries * 8))?;
        let place = geometry.offset_of(clusters.start);
        let bytes: Vec<u8> = meta.l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let written = self.file.write_at(&bytes, place).and_then(|()| self.file.sync());
        if let Err(error) = written {
            self.free_later(meta, clusters);
            return Err(ImageError::io("write the L1 table")(error));
        }
        for cluster in clusters {
            meta.kinds.insert(cluster, Kind::Table("l1_table_offset"));
        }
        // Should this fail, nobody can tell where the header points: neither table's place is free.
        self.point_to_l1(place, entries)?;
        let first = geometry.cluster_of(meta.l1_offset);
        let old = first..first + geometry.clusters_for(meta.l1.len() as u64 * 8);
        meta.l1.resize(entries as usize, 0);
        meta.l1_offset = place;
        for cluster in old.clone() {
            meta.kinds.remove(&cluster);
        }
        self.free_later(meta, old);
        self.file.sync().map_err(ImageError::io("flush the header"))
    }

    /// Writes length and place of the L1 table to the header, in one piece.
    fn point_to_l1(&self, place: u64, entries: u64) -> Result<(), ImageError> {
        let mut fields = [0; 12];
        fields[..4].copy_from_slice(&(entries as u32).to_be_bytes());
        fields[4..].copy_from_slice(&place.to_be_bytes());
        self.file
            .write_at(&fields, L1_OFFSET)
            .map_err(ImageError::io("write the header"))
    }
}
