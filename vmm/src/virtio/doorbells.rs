//! One ioeventfd a queue: attached while the queue is enabled and the BAR is decoded, at the
//! address where the guest put the BAR.

use super::layout;
use crate::frontend::RingEvents;
use crate::platform::Doorbells;
use std::os::fd::AsFd;
use std::sync::Arc;

pub(super) struct DoorbellSet {
    doorbells: Arc<dyn Doorbells>,
    bar: Option<u64>,
    queues: Vec<Doorbell>,
}

struct Doorbell {
    events: RingEvents,
    enabled: bool,
    attached: Option<u64>,
}

impl DoorbellSet {
    pub(super) fn new(doorbells: Arc<dyn Doorbells>, events: &[RingEvents]) -> Self {
        let queues = events
            .iter()
            .map(|events| Doorbell {
                events: events.clone(),
                enabled: false,
                attached: None,
            })
            .collect();
        Self {
            doorbells,
            bar: None,
            queues,
        }
    }

    /// The BAR is decoded at `bar` from now on, or nowhere.
    pub(super) fn move_bar(&mut self, bar: Option<u64>) {
        if self.bar != bar {
            self.bar = bar;
            for index in 0..self.queues.len() {
                self.settle(index);
            }
        }
    }

    pub(super) fn enable(&mut self, index: u16) {
        if let Some(queue) = self.queues.get_mut(usize::from(index)) {
            queue.enabled = true;
            self.settle(index.into());
        }
    }

    pub(super) fn disable_all(&mut self) {
        for index in 0..self.queues.len() {
            self.queues[index].enabled = false;
            self.settle(index);
        }
    }

    /// There are no queues any more.
    pub(super) fn retire(&mut self) {
        self.disable_all();
        self.queues.clear();
    }

    /// Whose doorbell `bell` is, which came as an exit: KVM had no ioeventfd for it (it refused one, or another
    /// vCPU is moving the BAR). Bells of queues that are not enabled are nobody's.
    pub(super) fn queue(&self, bell: u64) -> Option<u16> {
        let queue = self.queues.get(usize::try_from(bell).ok()?)?;
        queue.enabled.then_some(bell as u16)
    }

    fn settle(&mut self, index: usize) {
        let queue = &mut self.queues[index];
        let wanted = self
            .bar
            .filter(|_| queue.enabled)
            .map(|bar| bar + layout::NOTIFY.start + layout::NOTIFY_MULTIPLIER * index as u64);
        if queue.attached == wanted {
            return;
        }
        let kick = queue.events.kick.as_fd();
        if let Some(address) = queue.attached.take()
            && let Err(error) = self.doorbells.detach(address, kick)
        {
            tracing::error!(%error, address, "cannot detach a doorbell");
        }
        if let Some(address) = wanted {
            match self.doorbells.attach(address, kick) {
                Ok(()) => queue.attached = wanted,
                // The guest can cause this (two BARs at one address); the bell works by exits.
                Err(error) => tracing::debug!(%error, address, "KVM refused a doorbell"),
            }
        }
    }
}
