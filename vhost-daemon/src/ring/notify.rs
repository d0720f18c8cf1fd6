//! Who may skip a kick or an interrupt (virtio 1.3, 2.7.7 and 2.7.10).

use super::RingFault;
use super::split::{RingLayout, load, store};
use crate::memory::GuestMemory;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

/// Suppression of kicks and interrupts on one ring.
#[derive(Debug)]
pub(super) struct Notifications {
    /// VIRTIO_F_EVENT_IDX: indices say when, not flags.
    event_idx: bool,
    /// The used index when the driver's wish was last looked at.
    looked_at: Wrapping<u16>,
    forced: bool,
}

impl Notifications {
    pub(super) fn new(event_idx: bool, used_index: u16) -> Self {
        Self {
            event_idx,
            looked_at: Wrapping(used_index),
            forced: false,
        }
    }

    /// The next look answers yes whatever the driver says.
    pub(super) fn force(&mut self) {
        self.forced = true;
    }

    pub(super) fn needs_interrupt(
        &mut self,
        memory: &GuestMemory,
        layout: &RingLayout,
        used: Wrapping<u16>,
    ) -> Result<bool, RingFault> {
        let old = std::mem::replace(&mut self.looked_at, used);
        if std::mem::take(&mut self.forced) {
            return Ok(true);
        }
        if used == old {
            return Ok(false);
        }
        // The used index must be visible before the driver's wish is read: the driver writes its
        // wish, then looks at the index once more.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = load(memory, &layout.available, layout.used_event(), Ordering::Relaxed)?;
            Ok((used - Wrapping(event) - Wrapping(1)) < (used - old))
        } else {
            let flags = load(memory, &layout.available, 0, Ordering::Relaxed)?;
            Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    pub(super) fn enable_kicks(
        &self,
        memory: &GuestMemory,
        layout: &RingLayout,
        next: Wrapping<u16>,
    ) -> Result<(), RingFault> {
        if self.event_idx {
            store(
                memory,
                &layout.used,
                layout.avail_event(),
                next.0,
                Ordering::Relaxed,
            )?;
        } else {
            store(memory, &layout.used, 0, 0, Ordering::Relaxed)?;
        }
        // The driver adds a chain, then reads our wish; we write it, then look for a chain.
        fence(Ordering::SeqCst);
        Ok(())
    }

    pub(super) fn disable_kicks(&self, memory: &GuestMemory, layout: &RingLayout) -> Result<(), RingFault> {
        if self.event_idx {
            // The event index left behind asks for no further kick until it is set again.
            return Ok(());
        }
        store(
            memory,
            &layout.used,
            0,
            VRING_USED_F_NO_NOTIFY as u16,
            Ordering::Relaxed,
        )
    }
}
