//! Giving host clusters back: L2 entry, barrier, refcount, never the other way round.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{Meta, Qcow2};
use crate::image::ImageError;

/// Clusters that may wait to be freed before a barrier is made for them; bounds their list.
const MOST_WAITING: usize = 16 << 10;

/// References that were dropped from the mapping, in order.
#[derive(Default)]
pub(super) struct Freed {
    waiting: VecDeque<Dropped>,
    /// Number given to the next one.
    next: u64,
    /// Those below have their L2 change on stable storage.
    durable: u64,
    /// Free, but not to be used again before I/O has ended that began up to this epoch: where refcounts
    /// lie, it may have come by another mapping. Runs in the order of their epochs.
    cooling: VecDeque<(Range<u64>, u64)>,
    /// All clusters of these runs.
    hot: HashSet<u64>,
}

impl Freed {
    /// Whether a free cluster may not be used again yet.
    pub(super) fn is_hot(&self, cluster: u64) -> bool {
        self.hot.contains(&cluster)
    }

    /// The number of a change of the mapping that drops something.
    fn number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// Changes with lower numbers are on stable storage.
    pub(super) fn durable(&self) -> u64 {
        self.durable
    }
}

/// One reference to a host cluster that the mapping no longer has.
#[derive(Clone, Copy)]
struct Dropped {
    cluster: u64,
    number: u64,
    /// I/O that began up to this epoch may still use the cluster.
    epoch: u64,
}

impl Qcow2 {
    /// Notes that one reference to each of these clusters is gone from the mapping.
    pub(super) fn free_later(&self, meta: &mut Meta, clusters: Range<u64>) {
        for cluster in clusters {
            let dropped = Dropped {
                cluster,
                number: meta.freed.number(),
                epoch: meta.epoch,
            };
            meta.freed.waiting.push_back(dropped);
        }
    }

    /// Notes that a cluster of the external data file is no longer mapped. A raw one has its zeros already.
    pub(super) fn hole_later(&self, meta: &mut Meta, cluster: u64) {
        if !self.raw_data {
            let number = meta.freed.number();
            meta.holes.add(cluster, number);
        }
    }

    /// Whether so many clusters wait that somebody should flush.
    pub(super) fn must_flush(&self, meta: &Meta) -> bool {
        waiting(meta) >= MOST_WAITING
    }

    /// The guest's flush: a barrier, then whatever that barrier allows to free.
    pub(super) fn flush_and_free(&self) -> Result<(), ImageError> {
        let covered = self.lock().freed.next;
        self.barrier()?;
        let mut meta = self.lock();
        meta.freed.durable = meta.freed.durable.max(covered);
        self.cool(&mut meta);
        if waiting(&meta) == 0 || self.corrupt.load(Ordering::Relaxed) {
            return Ok(());
        }
        if meta.holes.len() > 0 {
            drop(meta);
            self.make_holes();
            meta = self.lock();
        }
        let mut ready = take_ready(&mut meta);
        let gone = match self.last_references(&mut meta, &ready) {
            Err(error) => return put_back(&mut meta, ready, error),
            Ok(gone) => gone,
        };
        drop(meta);
        // Nothing refers to these clusters and they are not yet free: nobody can reuse them meanwhile.
        for clusters in gone {
            let start = self.geometry.offset_of(clusters.start);
            let len = self.geometry.offset_of(clusters.end) - start;
            if let Err(error) = self.file.discard_range(start, len) {
                tracing::warn!(%error, "cannot give freed space back to the host");
            }
            vhost_daemon::progress();
        }
        let mut meta = self.lock();
        let lowered = self.lower_refcounts(&mut meta, &mut ready);
        // In an image whose refcounts lie, something that is free now may still be mapped: what begins
        // from here on is checked again.
        meta.l2.forget_verified();
        lowered.or_else(|error| put_back(&mut meta, ready, error))
    }

    /// Does what needs space, once more if there was none and clusters wait to be freed: a guest whose
    /// queue has stopped sends no flush.
    pub(super) fn with_room<T>(&self, attempt: impl Fn() -> Result<T, ImageError>) -> Result<T, ImageError> {
        match attempt() {
            Err(error) if error.is_no_space() && waiting(&self.lock()) > 0 => {
                self.flush_and_free()?;
                attempt()
            }
            done => done,
        }
    }

    /// Ends what epochs can end, and lets the clusters be used again that waited for that.
    pub(super) fn cool(&self, meta: &mut Meta) {
        self.advance_epoch(meta);
        self.advance_epoch(meta);
        while let Some((clusters, epoch)) = meta.freed.cooling.front()
            && epoch + 2 <= meta.epoch
        {
            let clusters = clusters.clone();
            meta.reserve.freed(clusters.start);
            for cluster in clusters {
                meta.freed.hot.remove(&cluster);
            }
            meta.freed.cooling.pop_front();
        }
    }

    /// Ends the epoch if all I/O of the one before has ended.
    fn advance_epoch(&self, meta: &mut Meta) {
        let before = &self.in_flight[((meta.epoch + 1) & 1) as usize];
        if before.load(Ordering::Acquire) == 0 {
            meta.epoch += 1;
        }
    }

    /// Runs of clusters whose refcount will be 0.
    fn last_references(
        &self,
        meta: &mut Meta,
        ready: &BTreeMap<u64, u64>,
    ) -> Result<Vec<Range<u64>>, ImageError> {
        let mut gone: Vec<Range<u64>> = Vec::new();
        for (cluster, references) in ready {
            let count = meta.refcounts.get(&*self.file, &self.geometry, *cluster)?;
            if count < *references {
                return Err(ImageError::corrupt(
                    "refcount block",
                    format!("the refcount of cluster {cluster:#x} is {count}, less than its references"),
                ));
            }
            if count == *references {
                if let Some(kind) = meta.kinds.get(cluster) {
                    return Err(ImageError::corrupt(
                        "refcount block",
                        format!("the last reference to cluster {cluster:#x} went, but it holds the {kind}"),
                    ));
                }
                match gone.last_mut() {
                    Some(last) if last.end == *cluster => last.end += 1,
                    _ => gone.push(*cluster..*cluster + 1),
                }
            }
        }
        Ok(gone)
    }

    /// Lowers refcounts by what is `ready`, and takes from it what is done, or lost.
    fn lower_refcounts(&self, meta: &mut Meta, ready: &mut BTreeMap<u64, u64>) -> Result<(), ImageError> {
        while let Some(run) = first_run(ready) {
            let before = RefCell::new(Vec::new());
            let lower = |cluster: u64, old: u64| {
                before.borrow_mut().push((cluster, old));
                old.checked_sub(ready.get(&cluster).copied().unwrap_or(0))
                    .ok_or_else(|| ImageError::corrupt("refcount block", "a refcount fell below 0"))
            };
            let lowered = meta
                .refcounts
                .update(&*self.file, &self.geometry, run.clone(), &lower);
            if let Err(error) = lowered {
                self.sort_out(meta, ready, before.into_inner());
                return Err(error);
            }
            for cluster in run.clone() {
                ready.remove(&cluster);
            }
            cool_down(meta, run);
            vhost_daemon::progress();
        }
        Ok(())
    }

    /// After a write of refcounts that failed: part of it may have arrived. No reference may be dropped
    /// twice; where that cannot be told, it is not dropped at all.
    fn sort_out(&self, meta: &mut Meta, ready: &mut BTreeMap<u64, u64>, before: Vec<(u64, u64)>) {
        for (cluster, old) in before {
            match meta.refcounts.get(&*self.file, &self.geometry, cluster) {
                Ok(now) if now == old => {}
                lowered => {
                    let references = ready.remove(&cluster).unwrap_or(0);
                    if lowered.is_ok_and(|now| now + references == old) {
                        cool_down(meta, cluster..cluster + 1);
                    }
                }
            }
        }
    }
}

/// References that wait to be given up.
fn waiting(meta: &Meta) -> usize {
    meta.freed.waiting.len() + meta.holes.len()
}

/// The first clusters of `ready` that follow each other.
fn first_run(ready: &BTreeMap<u64, u64>) -> Option<Range<u64>> {
    let mut clusters = ready.keys().copied();
    let start = clusters.next()?;
    let follow = clusters
        .zip(start + 1..)
        .take_while(|(cluster, next)| cluster == next);
    Some(start..start + 1 + follow.count() as u64)
}

/// Keeps clusters whose refcount is lower from being used again before running I/O has ended.
fn cool_down(meta: &mut Meta, clusters: Range<u64>) {
    meta.freed.hot.extend(clusters.clone());
    meta.freed.cooling.push_back((clusters, meta.epoch));
}

/// The barrier stands: a flush has done its part, and what the host fails here is tried again by the next.
fn put_back(meta: &mut Meta, ready: BTreeMap<u64, u64>, error: ImageError) -> Result<(), ImageError> {
    if !matches!(error, ImageError::Io { .. }) {
        return Err(error);
    }
    tracing::warn!(%error, "cannot free clusters yet");
    for (cluster, references) in ready {
        // Before all that waits: durable, and of no epoch that I/O runs in.
        let dropped = Dropped {
            cluster,
            number: 0,
            epoch: 0,
        };
        for _ in 0..references {
            meta.freed.waiting.push_front(dropped);
        }
    }
    Ok(())
}

/// Takes the references whose L2 change is durable and that no I/O can use any more.
fn take_ready(meta: &mut Meta) -> BTreeMap<u64, u64> {
    let mut ready = BTreeMap::new();
    while let Some(first) = meta.freed.waiting.front() {
        if first.number >= meta.freed.durable || first.epoch + 2 > meta.epoch {
            break;
        }
        *ready.entry(first.cluster).or_insert(0) += 1;
        meta.freed.waiting.pop_front();
    }
    ready
}
