//! Guest memory that front end and back end share.

use anyhow::{Context, Result};
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::Ordering,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// The memfd's name, as mappings of it show.
pub const MEMORY_NAME: &str = "guest-ram";

/// Where guest memory starts. Not 0, and other than `USER_BASE`: a back end that takes one kind
/// of address for another misses.
pub const BASE: u64 = 0x10_0000;
/// The front end's user address of [`BASE`], as SET_MEM_TABLE and SET_VRING_ADDR give it.
pub(super) const USER_BASE: u64 = 0x5000_0000_0000;

/// Guest memory: one sealed memfd from guest physical address [`BASE`].
#[derive(Debug)]
pub struct Memory {
    map: GuestMemoryMmap,
    file: File,
    size: u64,
}

impl Memory {
    /// Zeroed memory of `size` bytes, sealed against growing and shrinking.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn new(size: u64) -> Result<Self> {
        Self::with_seals(
            size,
            SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL,
        )
    }

    /// Memory that anyone who has the memfd can truncate, as other front ends offer it.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn unsealed(size: u64) -> Result<Self> {
        Self::with_seals(size, SealFlag::empty())
    }

    fn with_seals(size: u64, seals: SealFlag) -> Result<Self> {
        let fd = memfd_create(MEMORY_NAME, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
            .context("memfd_create")?;
        let file = File::from(fd);
        file.set_len(size)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).context("sealing the memfd")?;
        let offset = FileOffset::new(file.try_clone()?, 0);
        let range = (GuestAddress(BASE), usize::try_from(size)?, Some(offset));
        let map = GuestMemoryMmap::from_ranges_with_files([range]).context("mapping guest memory")?;
        Ok(Self { map, file, size })
    }

    /// The memfd.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Shrinks an unsealed memfd under the back end. Nothing but [`Memory::fd`] may be used then.
    ///
    /// # Errors
    /// When it is sealed.
    pub fn truncate(&self, size: u64) -> Result<()> {
        Ok(self.file.set_len(size)?)
    }

    /// Bytes of it.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The region as the specification's "Memory region description".
    #[must_use]
    pub fn region(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (at, field) in [BASE, self.size, USER_BASE, 0].into_iter().enumerate() {
            bytes[at * 8..at * 8 + 8].copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// Copies `data` to guest physical address `at`.
    ///
    /// # Errors
    /// When it is not memory.
    pub fn write(&self, at: u64, data: &[u8]) -> Result<()> {
        self.map
            .write_slice(data, GuestAddress(at))
            .context("write to guest memory")
    }

    /// `length` bytes from guest physical address `at`.
    ///
    /// # Errors
    /// When it is not memory.
    pub fn read(&self, at: u64, length: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; length];
        self.map
            .read_slice(&mut data, GuestAddress(at))
            .context("read from guest memory")?;
        Ok(data)
    }

    /// Publishes a 16-bit ring index: what was written before is visible with it.
    ///
    /// # Errors
    /// When it is not memory.
    pub fn publish(&self, at: u64, value: u16) -> Result<()> {
        self.map
            .store(value, GuestAddress(at), Ordering::SeqCst)
            .context("store to guest memory")
    }

    /// Reads a 16-bit ring index that the other side publishes.
    ///
    /// # Errors
    /// When it is not memory.
    pub fn observe(&self, at: u64) -> Result<u16> {
        self.map
            .load(GuestAddress(at), Ordering::SeqCst)
            .context("load from guest memory")
    }
}
