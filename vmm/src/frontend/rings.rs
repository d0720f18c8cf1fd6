//! A virtqueue as it goes to the back end.

use super::error::Error;
use super::memory::{HostAddress, MemoryTable};
use super::shared_event::SharedEvent;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

/// Largest queue size of a split virtqueue (virtio 1.3, 2.7).
const QUEUE_SIZE_LIMIT: u16 = 32768;

/// The three eventfds of a queue. Made once, before lockdown; they outlive back ends.
#[derive(Clone, Debug)]
pub struct RingEvents {
    /// Guest to back end: there are available buffers.
    pub kick: Arc<SharedEvent>,
    /// Back end to guest: there are used buffers.
    pub call: Arc<SharedEvent>,
    /// Back end to vmm: a ring is broken. One for all queues of a device.
    pub error: Arc<SharedEvent>,
}

impl RingEvents {
    /// Those of a device's queues, which share `error`. Descriptors from number `most` on are left to others.
    ///
    /// # Errors
    /// [`Error::Resource`]; [`Error::Descriptors`] where not enough are left.
    pub fn of_queues(queues: u16, error: &Arc<SharedEvent>, most: RawFd) -> Result<Vec<Self>, Error> {
        let events = (0..queues).map(|_| {
            let events = Self::new(error)?;
            let last = events
                .kick
                .as_fd()
                .as_raw_fd()
                .max(events.call.as_fd().as_raw_fd());
            (last < most)
                .then_some(events)
                .ok_or(Error::Descriptors { queues })
        });
        events.collect()
    }

    /// New kick and call eventfds.
    ///
    /// # Errors
    /// [`Error::Resource`].
    pub fn new(error: &Arc<SharedEvent>) -> Result<Self, Error> {
        Ok(Self {
            kick: Arc::new(SharedEvent::new()?),
            call: Arc::new(SharedEvent::new()?),
            error: Arc::clone(error),
        })
    }
}

/// A new non-blocking eventfd, which no back end is given.
///
/// # Errors
/// [`Error::Resource`].
pub(crate) fn new_event() -> Result<Arc<EventFd>, Error> {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
        .map(Arc::new)
        .map_err(|errno| Error::Resource {
            what: "an eventfd",
            source: errno.into(),
        })
}

/// Addresses and size of a split virtqueue, checked: each part lies inside guest RAM and is
/// aligned (virtio 1.3, 2.7).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingAddresses {
    size: u16,
    descriptors: HostAddress,
    driver: HostAddress,
    device: HostAddress,
    available_index: u64,
    used_index: u64,
}

impl RingAddresses {
    /// Checks what a driver wrote: guest physical addresses of the descriptor table, the
    /// available ring (driver area) and the used ring (device area). `None`: the size is no power
    /// of two, or an area is misaligned or not wholly in RAM.
    #[must_use]
    pub fn check(memory: &MemoryTable, size: u16, areas: [u64; 3]) -> Option<Self> {
        if !size.is_power_of_two() || size > QUEUE_SIZE_LIMIT {
            return None;
        }
        let [descriptors, driver, device] = areas;
        let entries = u64::from(size);
        Some(Self {
            size,
            descriptors: memory.translate(descriptors, 16 * entries, 16)?,
            driver: memory.translate(driver, 6 + 2 * entries, 2)?,
            device: memory.translate(device, 6 + 8 * entries, 4)?,
            available_index: driver + 2,
            used_index: device + 2,
        })
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Descriptor table, available ring, used ring.
    #[must_use]
    pub fn areas(&self) -> [HostAddress; 3] {
        [self.descriptors, self.driver, self.device]
    }

    /// The available index as it is in guest memory now.
    #[must_use]
    pub fn available_index(&self, memory: &MemoryTable) -> Option<u16> {
        memory.read_u16(self.available_index)
    }

    /// The used index as it is in guest memory now: where a back end that completes in order, or
    /// that has an in-flight region, goes on.
    #[must_use]
    pub fn used_index(&self, memory: &MemoryTable) -> Option<u16> {
        memory.read_u16(self.used_index)
    }
}

/// A queue to start.
#[derive(Clone, Debug)]
pub struct Ring {
    /// Its number.
    pub index: u16,
    /// Where it lies.
    pub addresses: RingAddresses,
    /// Available index to go on from: 0 after a reset.
    pub base: u16,
    /// Its eventfds.
    pub events: RingEvents,
}

/// A stopped queue: what it takes to start it again (virtio 1.3 has no name for it; vhost-user:
/// vring base).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueState {
    /// Its number.
    pub index: u16,
    /// Next available index that the back end would have taken.
    pub next_avail: u16,
}
