//! Fuzz targets: hostile rings, in-flight regions and front ends.
//!
//! [`serve`] is what the device crates put their queues' handlers to.

mod guest;
mod inflight;
mod ring;
mod session;

pub use guest::serve;
pub use inflight::inflight;
pub use ring::ring;
pub use session::session;
