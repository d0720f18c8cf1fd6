//! Guest memory: one sealed memfd, mapped once, below and above the PCI hole.

pub mod layout;
mod ram;

pub use layout::{Region, RegionKind};
pub use ram::{GuestRam, RamError, RamRegion};
