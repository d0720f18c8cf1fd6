//! Guest memory: one sealed memfd, mapped once, below and above the PCI hole.

pub mod layout;
mod mapping;
mod ram;

pub use layout::{Region, RegionKind};
pub use ram::{GuestRam, RamError, RamRegion};

/// Bytes of a huge page that the hardware maps as one (x86-64, second level).
pub const HUGE_PAGE: usize = 2 << 20;
