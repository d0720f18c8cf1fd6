//! Bus mastering (PCI 3.0, 6.2.2, table 6-1, bit 2): a driver that switches it off stops what the
//! device does to memory, and its messages.
//!
//! Linux switches it off before it starts another kernel (kexec), and most of its virtio drivers do
//! nothing more: rings that went on would write to memory that is the next kernel's. A vCPU thread
//! waits for no back end, so they stop once the device's thread has drained them: milliseconds later, or as
//! long as a slow disk takes for what it has begun. Messages stop at once.
//!
//! Only a change counts: a driver that never switches it on is served all the same.

use super::worker::{Phase, Worker};
use nix::poll::PollTimeout;
use std::time::{Duration, Instant};

/// From the moment when it is on again to that when rings go on that a driver has not reset. The
/// next kernel switches it on first and resets the device then (Linux: `virtio_pci_probe`); its
/// memory must not be written to in between.
pub(super) const PAUSE: Duration = Duration::from_millis(200);

pub(super) enum BusMaster {
    /// On, or never switched off.
    On,
    Off,
    /// On again; rings that were stopped go on at this time.
    Soon(Instant),
}

impl BusMaster {
    /// Until rings go on, where they are about to.
    pub(super) fn timeout(&self) -> Option<PollTimeout> {
        let Self::Soon(at) = self else {
            return None;
        };
        // One more millisecond, so that the time has come when poll returns.
        let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        Some(PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX))
    }

    /// The driver has reset the device: what it starts from now on is its own.
    pub(super) fn note_reset(&mut self) {
        if let Self::Soon(_) = self {
            *self = Self::On;
        }
    }
}

impl Worker {
    /// Whether rings may run.
    pub(super) fn masters_bus(&self) -> bool {
        matches!(self.bus_master, BusMaster::On)
    }

    /// It was switched off, on, or off and then on.
    pub(super) fn set_bus_master(&mut self, off: bool, on: bool) {
        if off {
            // One that does not drain is lost, and has been reported as that.
            let _ = self.drain();
            self.bus_master = BusMaster::Off;
        }
        if on && matches!(self.bus_master, BusMaster::Off) {
            self.bus_master = match self.phase {
                // What a driver starts from now on is its own; but where it was off for less than a look
                // a start that waits may be from before.
                Phase::Idle if !off => BusMaster::On,
                _ => BusMaster::Soon(Instant::now() + PAUSE),
            };
        }
    }

    /// Looks, where rings are about to go on, at the time.
    pub(super) fn look_at_bus_master(&mut self) {
        if let BusMaster::Soon(at) = self.bus_master
            && Instant::now() >= at
        {
            self.bus_master = BusMaster::On;
            // Where there is no back end its successor starts them; a loss has been reported.
            let _ = self.resume();
        }
    }
}
