//! Guest memory as a back end is told of it, and the check of every ring address against it.

use crate::memory::{GuestRam, RamRegion};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// An address in the vmm's mapping of guest RAM. Made only by [`MemoryTable::translate`], so that
/// having one proves that the range lies inside RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostAddress(u64);

impl HostAddress {
    /// The number, as it goes into SET_VRING_ADDR.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }
}

/// All of guest RAM: one sealed memfd and its regions.
#[derive(Debug)]
pub struct MemoryTable {
    memfd: File,
    regions: Vec<RamRegion>,
}

impl MemoryTable {
    /// All regions of `ram`, over a copy of its memfd.
    ///
    /// # Errors
    /// When the memfd cannot be duplicated.
    pub fn of(ram: &GuestRam) -> io::Result<Self> {
        let memfd = ram.memfd().try_clone_to_owned()?;
        Ok(Self::new(memfd, ram.regions().collect()))
    }

    /// A table over `memfd`. The regions do not overlap and lie inside it.
    #[must_use]
    pub fn new(memfd: OwnedFd, regions: Vec<RamRegion>) -> Self {
        Self {
            memfd: memfd.into(),
            regions,
        }
    }

    /// The memfd.
    #[must_use]
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// The regions.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Translates `length` bytes at guest physical `address`, when they lie in one region and
    /// start at a multiple of `alignment` (a power of two).
    #[must_use]
    pub fn translate(&self, address: u64, length: u64, alignment: u64) -> Option<HostAddress> {
        let (region, offset) = self.find(address, length)?;
        let aligned = address & (alignment - 1) == 0;
        aligned.then_some(HostAddress(region.host_address + offset))
    }

    /// Reads a 16-bit little-endian number from guest memory: through the memfd, so that this
    /// needs no pointer into memory that the guest writes at the same time.
    #[must_use]
    pub fn read_u16(&self, address: u64) -> Option<u16> {
        let (region, offset) = self.find(address, 2)?;
        let mut bytes = [0; 2];
        self.memfd
            .read_exact_at(&mut bytes, region.memfd_offset + offset)
            .ok()?;
        Some(u16::from_le_bytes(bytes))
    }

    fn find(&self, address: u64, length: u64) -> Option<(&RamRegion, u64)> {
        self.regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.guest_address)?;
            let end = offset.checked_add(length)?;
            (end <= region.size).then_some((region, offset))
        })
    }
}
