//! Whether a back end that runs makes progress. The vmm is not on the data path, so it looks from
//! time to time at the indices in guest memory; where requests wait and none is completed it asks
//! the back end for a sign of life. One that answers is waited for as long as it takes: a slow
//! disk is no hang, and a thread that spins is found by the process itself when it is asked. A NIC of ours is asked in any
//! case: what waits in a receive queue says nothing. Others' back ends may write a line each time that they are asked:
//! the longer a queue of theirs has waited, the less often.

use super::device_type::DeviceType;
use super::mailbox::StartOrder;
use super::worker::{Phase, Worker};
use crate::frontend::{MemoryTable, Ring, Session};
use nix::poll::PollTimeout;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_net::VIRTIO_NET_F_CTRL_VQ;

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// Longest between two questions to someone else's back end whose queues stay as they are.
const LONGEST_REST: Duration = Duration::from_secs(30);
/// A NIC is asked at every so manieth look.
const LOOKS_PER_QUESTION: u8 = 3;

/// What the looks found.
pub(super) struct Pulse {
    next: Instant,
    /// Since a NIC was asked.
    looks: u8,
    /// The used index of each queue that had requests waiting at the latest look.
    waiting: BTreeMap<u16, u16>,
    /// When someone else's back end may be asked again, and how long it rests after that.
    rest: (Instant, Duration),
}

impl Pulse {
    pub(super) fn new() -> Self {
        Self {
            next: Instant::now() + PERIOD,
            looks: 0,
            waiting: BTreeMap::new(),
            rest: (Instant::now(), PERIOD),
        }
    }

    /// Until the next look.
    pub(super) fn timeout(&self) -> PollTimeout {
        // One more millisecond, so that the time has come when poll returns.
        let left = self.next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    fn due(&mut self) -> bool {
        let now = Instant::now();
        let due = now >= self.next;
        if due {
            self.next = now + PERIOD;
        }
        due
    }

    /// Whether a NIC is to be asked at this look.
    fn asks(&mut self) -> bool {
        self.looks = (self.looks + 1) % LOOKS_PER_QUESTION;
        self.looks == 0
    }

    /// Whether someone else's back end, some of whose queues stay as they are, is to be asked.
    fn rested(&mut self, now: Instant) -> bool {
        let (at, rest) = self.rest;
        let rested = now >= at;
        if rested {
            self.rest = (now + rest, (2 * rest).min(LONGEST_REST));
        }
        rested
    }

    /// The queues whose requests waited at the latest look already, none of them completed since.
    fn stalled<'r>(&mut self, rings: impl Iterator<Item = &'r Ring>, memory: &MemoryTable) -> Vec<&'r Ring> {
        let before = std::mem::take(&mut self.waiting);
        rings
            .filter(|ring| {
                let indices = (
                    ring.addresses.available_index(memory),
                    ring.addresses.used_index(memory),
                );
                let (Some(available), Some(used)) = indices else {
                    return false;
                };
                if available != used {
                    self.waiting.insert(ring.index, used);
                }
                available != used && before.get(&ring.index) == Some(&used)
            })
            .collect()
    }
}

impl Worker {
    /// Requests that the driver made available and has not seen completed.
    pub(super) fn outstanding(&self) -> u32 {
        let (Phase::Running(order) | Phase::Drained(order) | Phase::Orphaned(order)) = &self.phase else {
            return 0;
        };
        let memory = &self.transport.memory;
        let waiting = |ring: &Ring| {
            let available = ring.addresses.available_index(memory)?;
            let used = ring.addresses.used_index(memory)?;
            Some(u32::from(available.wrapping_sub(used)))
        };
        order.rings.iter().filter_map(waiting).sum()
    }

    /// Looks, where it is time to.
    pub(super) fn look_for_progress(&mut self) {
        if !self.pulse.due() {
            return;
        }
        let is_net = DeviceType(self.context.spec.device_type) == DeviceType::NET;
        let ours = self.context.options.ours;
        let asks = is_net && ours && matches!(self.phase, Phase::Running(_)) && self.pulse.asks();
        if asks {
            // One that failed was reported as it cost the session.
            let _ = self.with_session(Session::ping);
        }
        let (Phase::Running(order), Some(session)) = (&self.phase, &mut self.session) else {
            return;
        };
        let rings = order.rings.iter();
        let rings = rings.filter(|ring| !is_net || is_answered(ring, order));
        let stalled = self.pulse.stalled(rings, &self.transport.memory);
        if stalled.is_empty() {
            self.pulse.rest = (Instant::now(), PERIOD);
            return;
        }
        if !ours && !self.pulse.rested(Instant::now()) {
            return;
        }
        match session.ping() {
            // A kick that was lost, by whoever, costs a moment instead of the queue.
            Ok(()) => {
                let count = stalled.len() as u64;
                self.transport.rekicks.fetch_add(count, Ordering::Relaxed);
                stalled.iter().for_each(|ring| ring.events.kick.signal());
            }
            Err(error) => self.lose(&error),
        }
    }
}

/// Whether what waits in a NIC's queue is soon done with: receive buffers wait for as long as nobody sends. The
/// control queue is the last (virtio 1.3, 5.1.2).
fn is_answered(ring: &Ring, order: &StartOrder) -> bool {
    let has_control = order.features >> VIRTIO_NET_F_CTRL_VQ & 1 != 0;
    let is_last = order.rings.last().is_some_and(|last| last.index == ring.index);
    ring.index % 2 == 1 || (has_control && is_last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_someone_elses_queue_waits_the_less_often_it_is_asked() {
        let mut pulse = Pulse::new();
        let start = Instant::now();
        let mut asked = Vec::new();
        for second in 0..100 {
            if pulse.rested(start + Duration::from_secs(second)) {
                asked.push(second);
            }
        }
        assert_eq!(asked, [0, 1, 3, 7, 15, 31, 61, 91]);
    }
}
