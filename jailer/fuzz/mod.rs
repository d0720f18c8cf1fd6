//! Fuzz targets: what a person writes, and what the launcher reads of files.

pub use crate::cli::fuzz::{flags, spec};
pub use crate::launch::fuzz::files;
