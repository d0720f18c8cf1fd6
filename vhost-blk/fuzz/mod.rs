//! Fuzz targets: block requests, and images of every format.

mod check;
mod file;
mod hostile;
mod model;
mod qcow2;
mod queue;

pub use hostile::{qcow2_hostile, vdi, vhd, vhdx, vmdk};
pub use qcow2::{qcow2, raw};
pub use queue::queue;
