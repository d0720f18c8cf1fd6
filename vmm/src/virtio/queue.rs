//! The registers of one virtqueue.

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
    /// Of a queue of at most `size` entries.
    pub(super) fn new(size: u16) -> Self {
        Self {
            size,
            vector: NO_VECTOR,
            areas: [0; 3],
            enabled: None,
        }
    }

    /// Makes it smaller than its maximum, or as large again; of no other size are queues (4.1.4.3).
    pub(super) fn resize(&mut self, size: u16, most: u16) {
        if size.is_power_of_two() && size <= most {
            self.size = size;
        }
    }

    /// Enables the queue if what the driver wrote is sound; otherwise `queue_enable` goes on
    /// reading 0.
    pub(super) fn enable(&mut self, memory: &MemoryTable) -> bool {
        self.enabled = RingAddresses::check(memory, self.size, self.areas);
        self.enabled.is_some()
    }
}
