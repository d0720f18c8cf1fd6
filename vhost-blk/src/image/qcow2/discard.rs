//! Discard and write-zeroes: whole clusters by their L2 entries, the edges by writing zeros.

use std::ops::Range;

use vm_memory::VolatileSlice;

use super::entry::{Cluster, Host};
use super::{Meta, Qcow2};
use crate::image::{Buffers, ImageError};

/// Zeros written at a time.
const ZERO_CHUNK: u64 = 256 << 10;

/// What becomes of a whole cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// Its content may go.
    Discard,
    /// It reads as zeros, and its space is given back.
    Unmap,
    /// It reads as zeros, and its space is kept.
    Keep,
}

impl Qcow2 {
    pub(super) fn discard_range(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        if self.geometry.version < 3 && self.backing.is_some() {
            return Ok(());
        }
        let (_, whole) = self.split(offset, len);
        self.change_clusters(whole, offset + len, Wish::Discard).map(drop)
    }

    pub(super) fn zero_range(&self, offset: u64, len: u64, unmap: bool) -> Result<(), ImageError> {
        // Version 2 has no zero flag: what a backing file shows through can only be overwritten, and
        // space can only be kept by writing to it.
        let end = offset + len;
        if self.geometry.version < 3 && (offset < self.covered() || !unmap) {
            return self.write_zeros(offset..end);
        }
        let (head, whole) = self.split(offset, len);
        self.write_zeros(head)?;
        let wish = if unmap { Wish::Unmap } else { Wish::Keep };
        let done = self.change_clusters(whole, end, wish)?;
        self.write_zeros(done..end)
    }

    /// The bytes before the first whole cluster, and the whole guest clusters.
    fn split(&self, offset: u64, len: u64) -> (Range<u64>, Range<u64>) {
        let geometry = &self.geometry;
        let end = offset + len;
        let first = geometry.clusters_for(offset);
        // The disk's last cluster is whole even if the disk ends inside it.
        let last = if end == self.limit() {
            geometry.clusters_for(end)
        } else {
            geometry.cluster_of(end)
        };
        if first >= last {
            return (offset..end, 0..0);
        }
        (offset..geometry.offset_of(first), first..last)
    }

    /// Writes zeros where something else shows.
    fn write_zeros(&self, range: Range<u64>) -> Result<(), ImageError> {
        if range.is_empty() {
            return Ok(());
        }
        let mut zeros = vec![0; ZERO_CHUNK.min(range.end - range.start) as usize];
        let slices = [VolatileSlice::from(&mut zeros[..])];
        let zeros = Buffers::new(&slices);
        let mut at = range.start;
        while at < range.end {
            let piece = self.locate(&mut self.lock(), at, range.end - at)?;
            let end = at + piece.len();
            if matches!(piece, super::Piece::Zero { .. }) {
                at = end;
            }
            while at < end {
                let len = (end - at).min(ZERO_CHUNK);
                self.write_buffers(zeros.window(0, len as usize), at)?;
                at += len;
            }
        }
        Ok(())
    }

    /// Changes whole clusters of a request that ends at `end`; says where it stopped, there or before a last
    /// cluster that is no longer whole since the disk has grown.
    fn change_clusters(&self, guest: Range<u64>, end: u64, wish: Wish) -> Result<u64, ImageError> {
        if guest.is_empty() {
            return Ok(end);
        }
        let mut at = guest.start;
        let mut last = guest.end;
        while at < last {
            let span = self.slice_span(&self.lock(), at);
            let part = at..last.min(at + span);
            if self.raw_data {
                // Before the image says so: who ends in between leaves the same zeros in both.
                self.zero_data_file(&part, end)?;
            }
            let mut meta = self.lock_idle(part.clone());
            if self.geometry.offset_of(last) > end && end != self.limit() {
                last = self.geometry.cluster_of(end);
                continue;
            }
            self.prepare(&mut meta)?;
            at = if self.needs_no_table(&meta, at)? {
                // Nothing is mapped here and nothing shows through: on to the next table.
                ((self.geometry.l1_index(at) + 1) << self.geometry.l2_bits()).min(last)
            } else {
                self.change_part(&mut meta, part.clone(), wish)?;
                part.end
            };
            let must_flush = self.must_flush(&meta);
            drop(meta);
            if self.raw_data {
                // And after: what others wrote there meanwhile does not show either.
                self.zero_data_file(&part, self.limit())?;
            }
            if must_flush {
                self.flush_and_free()?;
            }
        }
        Ok(self.geometry.offset_of(last).min(end))
    }

    fn needs_no_table(&self, meta: &Meta, guest: u64) -> Result<bool, ImageError> {
        let shows_below = self.geometry.offset_of(guest) < self.covered();
        Ok(!self.raw_data && !self.has_table(meta, guest)? && !shows_below)
    }

    /// A raw data file must show the zeros itself, up to `limit`.
    fn zero_data_file(&self, guest: &Range<u64>, limit: u64) -> Result<(), ImageError> {
        let start = self.geometry.offset_of(guest.start);
        let end = self.geometry.offset_of(guest.end).min(limit);
        self.data
            .zero_range(start, end - start)
            .map_err(ImageError::io("clear the external data file"))
    }

    fn change_part(&self, meta: &mut Meta, guest: Range<u64>, wish: Wish) -> Result<(), ImageError> {
        let mut changed: Vec<(Cluster, Cluster)> = Vec::new();
        let mut start = guest.start;
        for at in guest.clone() {
            let old = self.cluster_at(meta, at)?;
            let new = self.emptied(&old, at, wish);
            if new != old {
                if changed.is_empty() {
                    start = at;
                }
                changed.push((old, new));
            } else if !changed.is_empty() {
                self.store_changed(meta, start, &changed)?;
                changed.clear();
            }
        }
        if changed.is_empty() {
            Ok(())
        } else {
            self.store_changed(meta, start, &changed)
        }
    }

    fn store_changed(
        &self,
        meta: &mut Meta,
        start: u64,
        changed: &[(Cluster, Cluster)],
    ) -> Result<(), ImageError> {
        let new: Vec<Cluster> = changed.iter().map(|(_, new)| *new).collect();
        self.store(meta, start, &new)?;
        for (old, new) in changed {
            if old.host != new.host {
                self.drop_host(meta, old);
            } else if let Host::Plain { offset, .. } = old.host {
                meta.fresh.remove(&self.geometry.cluster_of(offset));
            }
        }
        Ok(())
    }

    /// What a cluster becomes.
    fn emptied(&self, old: &Cluster, guest: u64, wish: Wish) -> Cluster {
        let covered = self.geometry.offset_of(guest) < self.covered();
        let all = self.geometry.all_subclusters();
        match (wish, old.host) {
            (Wish::Keep, Host::Plain { copied: true, .. }) => Cluster {
                host: old.host,
                allocated: 0,
                zero: all,
            },
            _ if self.geometry.version >= 3 && (covered || self.geometry.external_data) => Cluster {
                host: Host::None,
                allocated: 0,
                zero: all,
            },
            (_, Host::None) if old.zero == all => *old,
            _ => Cluster::UNALLOCATED,
        }
    }
}
