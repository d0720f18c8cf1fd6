//! The registers of one virtqueue.

use super::MAX_QUEUE_SIZE;
use crate::frontend::{MemoryTable, RingAddresses};
use crate::pci::NO_VECTOR;

/// What a driver has set up of a queue.
#[derive(Clone, Debug)]
pub(super) struct QueueRegisters {
    pub(super) size: u16,
    pub(super) vector: u16,
    /// Guest physical addresses: descriptor area, driver area, device area.
    pub(super) areas: [u64; 3],
    /// Set while the queue is enabled: the checked form of the fields above.
    pub(super) enabled: Option<RingAddresses>,
}

impl QueueRegisters {
    pub(super) fn new() -> Self {
        Self {
            size: MAX_QUEUE_SIZE,
            vector: NO_VECTOR,
            areas: [0; 3],
            enabled: None,
        }
    }

    /// Enables the queue if what the driver wrote is sound; otherwise `queue_enable` goes on
    /// reading 0.
    pub(super) fn enable(&mut self, memory: &MemoryTable) -> bool {
        if self.size > MAX_QUEUE_SIZE {
            return false;
        }
        self.enabled = RingAddresses::check(memory, self.size, self.areas);
        self.enabled.is_some()
    }
}
