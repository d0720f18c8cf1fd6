//! The control socket to the supervisor: one datagram a message, bounded, never waited for
//! longer than a deadline.

mod descriptors;
mod socket;

pub use descriptors::{adopt, adopt_config};
pub use socket::{ControlError, ControlSocket, Incoming};
