//! Split virtqueues (virtio 1.3, 2.7) on hostile memory.
//!
//! `virtio-queue` is not used for the rings themselves: its chains end silently where they are
//! malformed, a chain cannot be made from a head that a predecessor took, and each used element is
//! published alone. Here a malformed ring is a [`RingFault`], and publishing follows the order that
//! the in-flight region needs.

mod chain;
mod fault;
mod inflight;
mod notify;
mod split;
#[cfg(test)]
mod tests;

mod walk;

pub use chain::Chain;
pub use fault::RingFault;
pub(crate) use inflight::{InflightQueue, InflightRegion};
pub use split::Ring;
pub(crate) use split::RingSetup;
