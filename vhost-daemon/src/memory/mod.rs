//! Guest memory: what the front end shares, mapped here, and the proofs that an access is inside.
//!
//! [`GuestMemory`] is immutable: a change of the table makes another one, and whoever uses the old
//! one (a ring, a request under way) keeps it mapped. A [`Segment`] can only be made by the memory
//! that it lies in, so the bounds of guest addresses are checked once, where they are read.

mod mapping;
mod segment;
mod table;
#[cfg(test)]
pub(crate) mod tests;

pub(crate) use mapping::Mapping;
pub(crate) use segment::RegionHint;
pub use segment::{Segment, Segments};
pub(crate) use table::MAX_REGIONS;
pub use table::{GuestMemory, MemoryError, RegionSpec, Sealing};

/// A guest physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GuestAddress(pub u64);

impl std::fmt::Display for GuestAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
