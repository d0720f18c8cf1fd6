//! The launcher, the spawner, the supervisor, and the jail itself.
//!
//! [`sandbox`] is all that the vmm and the device processes link; [`supervisor`] is the resident
//! process beside them; the rest belongs to the short-lived launcher and its feature.

pub mod inherit;
pub mod sandbox;
pub mod supervisor;
pub mod wire;
