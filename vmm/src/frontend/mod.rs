//! A generic vhost-user front end (vhost-user protocol, QEMU's `docs/interop/vhost-user.rst`).
//!
//! A back end is less trusted than the vmm: it may hang, lie or die. So every exchange has a
//! deadline, every reply is judged by its code, flags, size and value before it is used, and
//! nothing that a back end sends is kept without a bound. Guest memory is not touched here but
//! for one 16-bit read of a used index.
//!
//! ```text
//! Session::connect   features, protocol features, queue count, back-end channel, memory
//!   start            features, in-flight region, rings, enable      <-+
//!   stop             GET_VRING_BASE of each: waits until drained      |
//!   reset            RESET_DEVICE, SET_VRING_BASE 0  -----------------+
//! ```

mod backend_channel;
mod channel;
mod error;
mod inflight;
mod memory;
mod message;
mod rings;
mod session;
mod shared_event;

#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(not(test), allow(dead_code, reason = "the tests use more of it"))]
pub(crate) mod fake_backend;
#[cfg(test)]
mod session_tests;

pub use crate::memory::RamRegion as MemoryRegion;
pub use error::{Error, ReplyProblem};
pub use inflight::InflightRegion;
pub use memory::{HostAddress, MemoryTable};
pub(crate) use rings::new_event;
pub use rings::{QueueState, Ring, RingAddresses, RingEvents};
pub use session::{BackendSockets, Session, SessionOptions};
pub use shared_event::SharedEvent;

use std::time::Duration;

/// Most queues of a device: a queue's index travels in eight bits (SET_VRING_KICK).
pub const MAX_QUEUES: u16 = 256;

/// How long the vmm waits for a back end.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For the very first answer: the process may still be starting. One of ours, which opens a disk first, has
    /// [`Deadlines::drain`].
    pub first_answer: Duration,
    /// For a sign of life ([`Session::ping`]): a busy host may give the process no CPU for seconds.
    pub alive: Duration,
    /// For each step of the handshake and each later message.
    pub step: Duration,
    /// For all rings of a device to drain (GET_VRING_BASE). A slow disk is not a hang.
    pub drain: Duration,
    /// For the process of a lost back end to end, or be given up.
    pub end: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            first_answer: Duration::from_secs(5),
            alive: Duration::from_secs(5),
            step: Duration::from_secs(2),
            drain: Duration::from_secs(30),
            end: Duration::from_secs(15),
        }
    }
}
