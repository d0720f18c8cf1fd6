//! Giving space in an external data file back: L2 entry, barrier, hole.
//!
//! There a guest cluster has one place, mapped or not: what waits for its hole may be mapped again at any
//! time, and stays as it is then.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Meta, Qcow2};

/// Runs of clusters that are busy at a time while holes are made: bounds what it costs others to look.
const MOST_RUNS: usize = 64;

/// Guest clusters that are no longer mapped, and the number of the change that dropped each. One that is mapped
/// or dropped again while it waits has no older number: after a crash that mapping may be back.
#[derive(Default)]
pub(super) struct Holes(BTreeMap<u64, u64>);

impl Holes {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Notes that a cluster is no longer mapped.
    pub(super) fn add(&mut self, cluster: u64, number: u64) {
        self.0.insert(cluster, number);
    }

    /// Forgets clusters that are about to be mapped.
    pub(super) fn keep(&mut self, clusters: Range<u64>) {
        for cluster in clusters {
            self.0.remove(&cluster);
        }
    }

    /// Takes some runs, from `start` on, of those dropped before `durable`; moves `start` past them.
    fn take(&mut self, start: &mut u64, durable: u64) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (cluster, number) in self.0.range(*start..) {
            if *number >= durable {
                continue;
            }
            let full = runs.len() == MOST_RUNS;
            match runs.last_mut() {
                Some(last) if last.end == *cluster => last.end += 1,
                _ if full => break,
                _ => runs.push(*cluster..*cluster + 1),
            }
            *start = cluster + 1;
        }
        runs.iter().for_each(|run| self.keep(run.clone()));
        runs
    }
}

impl Qcow2 {
    /// Makes holes for what is durably not mapped. Nobody maps it meanwhile.
    pub(super) fn make_holes(&self) {
        let mut start = 0;
        loop {
            let runs = {
                let Meta {
                    holes, freed, busy, ..
                } = &mut *self.lock();
                let runs = holes.take(&mut start, freed.durable());
                busy.extend(runs.iter().cloned());
                runs
            };
            if runs.is_empty() {
                return;
            }
            for run in &runs {
                self.make_hole(run);
            }
            vhost_daemon::progress();
            self.lock().busy.retain(|range| !runs.contains(range));
            self.allocated.notify_all();
        }
    }

    fn make_hole(&self, clusters: &Range<u64>) {
        let start = self.geometry.offset_of(clusters.start);
        let end = self.geometry.offset_of(clusters.end).min(self.limit());
        if let Err(error) = self.data.discard_range(start, end - start) {
            tracing::warn!(%error, "cannot give space of the external data file back to the host");
        }
    }
}
