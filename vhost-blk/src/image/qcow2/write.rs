//! Writing: in place where a cluster is ours alone, else into new clusters.
//!
//! Order of an allocating write: guest data (and what is copied around it) into reserved clusters; a
//! barrier if anything but zeros showed there before; the L2 entries; only then the request completes.

use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};

use vm_memory::VolatileSlice;

use super::entry::{Cluster, Host};
use super::{IoGuard, Meta, Qcow2, map};
use crate::image::{Buffers, ImageError};

/// Host clusters remembered as fresh; forgetting one costs a barrier, nothing else.
const MOST_FRESH: usize = 64 << 10;

/// What the start of a write needs.
enum Step<'a> {
    InPlace { host: u64, len: u64, guard: IoGuard<'a> },
    Allocate(Job),
}

/// An allocation in flight: consecutive guest clusters to consecutive host clusters.
struct Job {
    /// Guest clusters; nobody else maps or unmaps them meanwhile.
    guest: Range<u64>,
    /// Offset of the first host cluster in the data file.
    host: u64,
    /// What the clusters were.
    old: Vec<Cluster>,
    /// Guest bytes to write.
    write: Range<u64>,
    /// Guest bytes that will be mapped: `write`, widened to whole subclusters.
    map: Range<u64>,
    /// The disk's end; what is mapped behind it becomes zeros.
    limit: u64,
    /// The host clusters are new, and durably zero.
    fresh: bool,
    /// `map` reads as zeros now, as it would from a host cluster of zeros.
    zero_before: bool,
}

impl Job {
    /// Whether old data would be lost if the L2 entries reached the disk before the data.
    fn needs_barrier(&self) -> bool {
        !(self.fresh && self.zero_before)
    }
}

impl Qcow2 {
    pub(super) fn write_buffers(&self, from: Buffers<'_>, offset: u64) -> Result<(), ImageError> {
        let mut done = 0;
        while done < from.len() {
            let at = offset + done as u64;
            let moved = match self.next_step(at, (from.len() - done) as u64)? {
                Step::InPlace { host, len, guard } => {
                    let window = from.window(done, len as usize);
                    self.data
                        .write_buffers(window, host)
                        .map_err(ImageError::io("write guest data"))?;
                    drop(guard);
                    window.len()
                }
                Step::Allocate(job) => {
                    let window = from.window(done, (job.write.end - job.write.start) as usize);
                    self.run(&job, window)?;
                    window.len()
                }
            };
            done += moved;
        }
        Ok(())
    }

    fn next_step(&self, offset: u64, len: u64) -> Result<Step<'_>, ImageError> {
        let guest = self.geometry.cluster_of(offset);
        let mut meta = self.lock_idle(guest..guest + 1);
        self.prepare(&mut meta)?;
        if let Some((host, len)) = self.in_place(&mut meta, offset, len)? {
            let guard = self.guard(&meta);
            return Ok(Step::InPlace { host, len, guard });
        }
        let job = self.plan(&mut meta, offset, len)?;
        meta.holes.keep(job.guest.clone());
        meta.busy.push(job.guest.clone());
        Ok(Step::Allocate(job))
    }

    /// Takes the lock once no allocation of these guest clusters is in flight. It waits as long as that
    /// one's I/O takes, which nothing could cut short either; whoever stops the queue has the deadline.
    pub(super) fn lock_idle(&self, guest: Range<u64>) -> MutexGuard<'_, Meta> {
        let overlaps = |range: &Range<u64>| range.start < guest.end && guest.start < range.end;
        self.allocated
            .wait_while(self.lock(), |meta| meta.busy.iter().any(overlaps))
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn plan(&self, meta: &mut Meta, offset: u64, len: u64) -> Result<Job, ImageError> {
        let geometry = &self.geometry;
        let guest = geometry.cluster_of(offset);
        self.writable_table(meta, guest)?;
        let first = self.cluster_at(meta, guest)?;
        let (old, host, fresh) = if let Some((host, fresh)) = self.keeps_host(meta, guest, &first)? {
            (vec![first], host, fresh)
        } else {
            let last = geometry.cluster_of(offset + len - 1);
            let most = (last - guest + 1).min(self.slice_span(meta, guest));
            let mut old = vec![first];
            for next in guest + 1..guest + most {
                let cluster = self.cluster_at(meta, next)?;
                let writable = matches!(cluster.host, Host::Plain { copied: true, .. });
                if writable || map::is_busy(meta, next) {
                    break;
                }
                old.push(cluster);
            }
            let taken = self.take(meta, old.len() as u64)?;
            self.check_data_place(meta, taken.clone())?;
            old.truncate((taken.end - taken.start) as usize);
            (old, geometry.offset_of(taken.start), true)
        };
        let guest = guest..guest + old.len() as u64;
        let write = offset..(offset + len).min(geometry.offset_of(guest.end));
        let map = self.mapped_range(&old, &write);
        let zero_before = !geometry.encrypted && self.reads_as_zeros(meta, map.start, map.end - map.start)?;
        Ok(Job {
            guest,
            host,
            old,
            write,
            map,
            limit: self.limit(),
            fresh,
            zero_before,
        })
    }

    /// The host cluster, if it stays the same: subclusters are added to it, its zero flag goes, or the
    /// external data file fixes it. Also whether what is not mapped in it is durably zero.
    fn keeps_host(
        &self,
        meta: &mut Meta,
        guest: u64,
        old: &Cluster,
    ) -> Result<Option<(u64, bool)>, ImageError> {
        if self.geometry.external_data {
            return Ok(Some((self.geometry.offset_of(guest), false)));
        }
        let Host::Plain { offset, copied: true } = old.host else {
            return Ok(None);
        };
        self.verify(meta, guest, offset)?;
        Ok(Some((
            offset,
            meta.fresh.contains(&self.geometry.cluster_of(offset)),
        )))
    }

    /// What a job maps: whole clusters where old data moves along, else whole subclusters. Of subclusters that
    /// keep their data where it is, only what is written: the rest needs no copy, and one would undo a write to
    /// it that began in place before this job and still runs.
    ///
    /// The disk's last cluster is mapped to its end ([`Self::publish`]): a hole behind the disk's end would show
    /// noise in an encrypted image that somebody makes longer.
    fn mapped_range(&self, old: &[Cluster], write: &Range<u64>) -> Range<u64> {
        let geometry = &self.geometry;
        let unit = |cluster: Option<&Cluster>, at: u64| match cluster.map(|old| (old.host, old.allocated)) {
            Some((Host::Plain { copied, .. }, allocated)) if copied || geometry.external_data => {
                match allocated & geometry.subcluster_mask(geometry.within(at), 1) {
                    0 => geometry.subcluster_size(),
                    _ => 1,
                }
            }
            Some((Host::Plain { .. } | Host::Compressed(_), _)) => geometry.cluster_size(),
            Some((Host::None, _)) | None => geometry.subcluster_size(),
        };
        let head = unit(old.first(), write.start);
        let tail = unit(old.last(), write.end - 1);
        let start = write.start & !(head - 1);
        let end = write.end.next_multiple_of(tail).min(self.limit());
        // A device that holds nothing but the data may end where the disk does.
        let has_room = !(geometry.external_data && self.data.has_fixed_size());
        if geometry.encrypted && has_room && end == self.limit() {
            start..end.next_multiple_of(geometry.cluster_size())
        } else {
            start..end
        }
    }

    /// Does a job's I/O and publishes it; whatever happens, its clusters are no longer busy after.
    fn run(&self, job: &Job, from: Buffers<'_>) -> Result<(), ImageError> {
        let moved = self.move_data(job, from);
        let mut meta = self.lock();
        let result = moved.and_then(|()| self.publish(&mut meta, job));
        meta.busy.retain(|range| *range != job.guest);
        if result.is_err() {
            self.abandon(&mut meta, job);
        }
        let must_flush = self.must_flush(&meta);
        drop(meta);
        self.allocated.notify_all();
        result?;
        if must_flush { self.flush_and_free() } else { Ok(()) }
    }

    /// Frees what a failed job had taken, unless the mapping may know it already.
    fn abandon(&self, meta: &mut Meta, job: &Job) {
        let first = self.geometry.cluster_of(job.host);
        if !job.fresh || self.keeps_old_host(job) {
            // Part of the data may have arrived: what is not mapped is no longer known to be zero.
            meta.fresh.remove(&first);
            return;
        }
        let unmapped = job
            .guest
            .clone()
            .zip(&job.old)
            .all(|(guest, old)| self.cluster_at(meta, guest).is_ok_and(|now| now == *old));
        if unmapped {
            self.free_later(meta, first..first + job.old.len() as u64);
        }
    }

    fn move_data(&self, job: &Job, from: Buffers<'_>) -> Result<(), ImageError> {
        let place = |offset: u64| job.host + (offset - self.geometry.offset_of(job.guest.start));
        self.data
            .write_buffers(from, place(job.write.start))
            .map_err(ImageError::io("write guest data"))?;
        for fill in [job.map.start..job.write.start, job.write.end..job.map.end] {
            if fill.is_empty() || (job.fresh && job.zero_before) {
                continue;
            }
            let mut bytes = vec![0; (fill.end - fill.start) as usize];
            let inside = job.limit.clamp(fill.start, fill.end) - fill.start;
            let slices = [VolatileSlice::from(&mut bytes[..inside as usize])];
            self.read_buffers(Buffers::new(&slices), fill.start)?;
            self.data
                .write_at(&bytes, place(fill.start))
                .map_err(ImageError::io("copy old data"))?;
        }
        if job.needs_barrier() {
            self.data
                .sync()
                .map_err(ImageError::io("flush new data before its mapping"))?;
        }
        Ok(())
    }

    fn keeps_old_host(&self, job: &Job) -> bool {
        matches!(
            job.old.first(),
            Some(Cluster {
                host: Host::Plain { copied: true, .. },
                ..
            })
        )
    }

    fn publish(&self, meta: &mut Meta, job: &Job) -> Result<(), ImageError> {
        let geometry = &self.geometry;
        let mut new = Vec::with_capacity(job.old.len());
        for (guest, old) in job.guest.clone().zip(&job.old) {
            let base = geometry.offset_of(guest);
            let start = job.map.start.max(base);
            let end = match job.map.end.min(base + geometry.cluster_size()) {
                end if end == self.limit() => base + geometry.cluster_size(),
                end => end,
            };
            let mapped = geometry.subcluster_mask(start - base, end - start);
            let offset = job.host + (base - geometry.offset_of(job.guest.start));
            new.push(Cluster {
                host: Host::Plain { offset, copied: true },
                allocated: old.allocated | mapped,
                zero: old.zero & !mapped,
            });
        }
        self.store(meta, job.guest.start, &new)?;
        if !self.keeps_old_host(job) && !geometry.external_data {
            for (old, new) in job.old.iter().zip(&new) {
                self.drop_host(meta, old);
                self.note_fresh(meta, new);
            }
        }
        Ok(())
    }

    /// Remembers a new cluster with unmapped subclusters.
    fn note_fresh(&self, meta: &mut Meta, cluster: &Cluster) {
        if let Host::Plain { offset, .. } = cluster.host
            && cluster.allocated != self.geometry.all_subclusters()
        {
            if meta.fresh.len() >= MOST_FRESH {
                meta.fresh.clear();
            }
            meta.fresh.insert(self.geometry.cluster_of(offset));
        }
    }

    /// Drops the mapping's reference to what a cluster was.
    pub(super) fn drop_host(&self, meta: &mut Meta, old: &Cluster) {
        match old.host {
            Host::Plain { offset, .. } if self.geometry.external_data => {
                self.hole_later(meta, self.geometry.cluster_of(offset));
            }
            Host::Plain { offset, .. } => {
                let cluster = self.geometry.cluster_of(offset);
                meta.fresh.remove(&cluster);
                self.free_later(meta, cluster..cluster + 1);
            }
            Host::Compressed(compressed) => self.free_later(meta, compressed.clusters(&self.geometry)),
            Host::None => {}
        }
    }
}
