//! Frames that the guest does not see: what comes while the link is down, and what waits in the TAP for a
//! driver that took more than this one does.

use super::{LONGEST, ReceiveQueue, read_retrying};
use crate::buffers::FrameBuffers;
use crate::counters::Drop;
use std::fmt::Display;
use vhost_daemon::Wait;

/// Most frames that are dropped for a driver that does not take what the one before did: more than a TAP's
/// queue holds (1000), unless it was given another length. Bounds the wait for a host that sends on.
const MOST_UNFIT: usize = 1 << 14;

impl ReceiveQueue {
    /// Takes one frame off the TAP that the guest does not see, and says why. What to wait for if there is
    /// none.
    pub(super) fn discard(&mut self, why: &dyn Display) -> Option<Wait> {
        self.spill.resize(LONGEST, 0);
        let mut buffers = FrameBuffers::from_storage(std::mem::take(&mut self.storage));
        buffers.push_private(&mut self.spill);
        let result = read_retrying(&self.pacer, &buffers);
        self.storage = buffers.into_storage();
        match result {
            Ok(_) => {
                self.give_up(Drop::Interface, why);
                None
            }
            Err(error) => Some(self.failed(&error)),
        }
    }

    /// Empties the TAP's queue of what the driver does not take.
    pub(super) fn discard_unfit(&mut self) {
        let unfit = "of a kind that only the driver before took";
        (0..MOST_UNFIT).any(|_| self.discard(&unfit).is_some());
    }
}
