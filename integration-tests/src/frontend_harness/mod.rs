//! A vhost-user front end with no VM: it drives the real device processes over a socket.
//!
//! It has guest memory of its own (a sealed memfd), split rings of a chosen size with kick and
//! call eventfds, EVENT_IDX and indirect descriptors, keeps the in-flight region as a front end
//! must, and can put anything into a ring or onto the socket that a hostile guest or vmm could.
//! Every wait has a deadline.
//!
//! ```text
//!   BlockDriver, NetDriver      requests, frames
//!         Ring                  one split ring in Memory
//!        Session                handshake, rings, in-flight region
//!       Connection              messages of one socket
//! ```

mod blk;
mod memory;
mod net;
mod ring;
mod session;
mod wire;

pub use blk::{
    BlockDriver, BlockRequest, Completion, SECTOR, SLOT_DATA, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP,
};
pub use memory::{BASE, MEMORY_NAME, Memory};
pub use net::NetDriver;
pub use ring::{INDIRECT, NEXT, Ring, Segment, WRITE};
pub use session::{Inflight, Options, Session, protocol, virtio};
pub use wire::{Connection, Reply, request};

use std::time::Duration;

/// How long any one answer may take on a slow machine.
pub const DEADLINE: Duration = Duration::from_secs(10);
