//! Fuzz targets: what a person writes.

pub use crate::cli::fuzz::{flags, spec};
