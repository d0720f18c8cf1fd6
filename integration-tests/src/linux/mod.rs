//! Linux guests for tests: Debian's kernels with a busybox script that does what the kernel's
//! command line asks for and reports it on the console.

mod images;
mod launch;
pub mod pattern;
pub mod words;

pub use images::{IMAGES, Images, KernelImages};
pub use launch::{Disk, Launch, Loader, Ran, Work};
