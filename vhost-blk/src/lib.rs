//! The disk process: a virtio block device (virtio 1.3, 5.2) over vhost-user.
//!
//! Trust: the guest writes request headers and the image's contents; both are checked here and
//! reach nothing but this image and the guest's own memory.
#![cfg_attr(not(test), deny(clippy::print_stderr))]

mod control;
mod counters;
pub mod device;
mod files;
mod flusher;
mod growth;
pub mod image;
pub mod io;
mod options;
mod outcome;
mod pieces;
mod queue;
mod request;
mod settings;
pub mod tool;
mod trouble;

pub use device::BlkProgram;

#[cfg(feature = "fuzzing")]
#[path = "../fuzz/mod.rs"]
pub mod fuzz;
