//! What the front end said about one ring before it starts.

use super::SessionError;
use crate::memory::{GuestAddress, GuestMemory};
use crate::ring::RingSetup;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Addresses in the front end (SET_VRING_ADDR).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Addresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// One ring's settings.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Vring {
    pub(super) size: u16,
    pub(super) base: u16,
    pub(super) addresses: Option<Addresses>,
    /// SET_VRING_ENABLE. Rings start disabled where protocol features are negotiated.
    pub(super) enabled: bool,
    pub(super) running: bool,
    /// The front end hears of its errors (SET_VRING_ERR).
    pub(super) has_error: bool,
}

impl Vring {
    /// The ring as the guest sees it.
    pub(super) fn setup(&self, memory: &GuestMemory, features: u64) -> Result<RingSetup, SessionError> {
        let addresses = self
            .addresses
            .ok_or(SessionError::Order("the ring has no addresses yet"))?;
        if self.size == 0 {
            return Err(SessionError::Order("the ring has no size yet"));
        }
        let guest = |what, value| -> Result<GuestAddress, SessionError> {
            memory
                .guest_address(value)
                .ok_or(SessionError::Value { what, value })
        };
        Ok(RingSetup {
            size: self.size,
            descriptors: guest("descriptor table address", addresses.descriptors)?,
            available: guest("available ring address", addresses.available)?,
            used: guest("used ring address", addresses.used)?,
            base: self.base,
            event_idx: features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            indirect: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
        })
    }
}
