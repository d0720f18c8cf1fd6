//! One shared mapping of a file, unmapped when the last user is gone.
#![expect(unsafe_code, reason = "maps memory that the guest or the front end shares")]

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use vm_memory::VolatileSlice;

/// A `MAP_SHARED` mapping, readable and writable. The file may be closed afterwards.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: NonNull<c_void>,
    length: NonZeroUsize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only reached through volatile
// or atomic accesses.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent accesses are what VolatileSlice is made for.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes of `file` from `offset`. The caller has checked that the file is that
    /// long: an access past its end is a SIGBUS.
    pub(crate) fn new(file: impl AsFd, offset: u64, length: NonZeroUsize) -> nix::Result<Self> {
        let offset = offset.try_into().map_err(|_| nix::errno::Errno::EOVERFLOW)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let address = unsafe { mmap(None, length, protection, flags, file, offset) }?;
        Ok(Self { address, length })
    }

    pub(crate) fn length(&self) -> usize {
        self.length.get()
    }

    /// `length` bytes from `offset`, or nothing if they do not lie in the mapping.
    pub(crate) fn slice(&self, offset: usize, length: usize) -> Option<VolatileSlice<'_>> {
        let end = offset.checked_add(length)?;
        if end > self.length.get() {
            return None;
        }
        let start = self.address.as_ptr().cast::<u8>().wrapping_add(offset);
        // SAFETY: the range lies in the mapping, which the returned slice borrows, and which is
        // only ever accessed through volatile slices.
        Some(unsafe { VolatileSlice::new(start, length) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no slice of it is left, since each borrows it.
        if let Err(error) = unsafe { munmap(self.address, self.length.get()) } {
            tracing::warn!(%error, "cannot unmap shared memory");
        }
    }
}
