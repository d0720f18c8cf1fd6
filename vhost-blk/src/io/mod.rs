//! Moving bytes between files and guest memory without a copy in between.

mod vectored;

pub use vectored::{read_exact_at, write_all_at};
