//! The launcher, the spawner, the supervisor, and the jail itself.
//!
//! [`sandbox`] is all that the vmm and the device processes link; [`supervisor`] is the resident
//! process beside them; the rest belongs to the short-lived launcher and its feature.
#![cfg_attr(not(test), deny(clippy::print_stderr))]

pub mod audit;
#[cfg(feature = "launcher")]
pub mod cli;
pub mod clock;
mod escape;
#[cfg(feature = "launcher")]
pub mod failure;
pub mod inherit;
#[cfg(feature = "launcher")]
pub mod launch;
mod log_line;
pub mod sandbox;
pub mod supervisor;
pub mod tell;
pub mod wire;
pub mod wire_fds;

#[cfg(all(feature = "fuzzing", feature = "launcher"))]
#[path = "../fuzz/mod.rs"]
pub mod fuzz;
