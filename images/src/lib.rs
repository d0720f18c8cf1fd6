//! Kernels, initial RAM disks and root file systems for guests, from the distribution's own
//! packages, without root.
//!
//! Everything lands in a content-addressed [`cache::Cache`]; a second call with the same recipe
//! and package versions only looks it up.
#![forbid(unsafe_code)]

pub mod apt;
pub mod bzimage;
pub mod cache;
mod command;
pub mod cpio;
pub mod debian_root;
pub mod disk;
mod error;
pub mod initramfs;
pub mod kernel;
pub mod modules;
pub mod progress;
mod sources;

pub use command::search_path;
pub use error::{Error, MORE_NAMESPACES, Result};
