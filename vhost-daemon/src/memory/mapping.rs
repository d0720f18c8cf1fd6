//! One shared mapping of a file, unmapped when the last user is gone.
#![expect(unsafe_code, reason = "maps memory that the guest or the front end shares")]

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::sys::stat::fstat;
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use vm_memory::VolatileSlice;

/// Bytes of a page, and of a guard.
const PAGE: usize = 4096;
/// What mappings are aligned to at least, so that memory can have huge pages where it may.
const HUGE_PAGE: usize = 2 << 20;

/// A `MAP_SHARED` mapping, readable and writable, with a page of nothing at least on both sides: what
/// runs off its end, or comes before its start, meets no other memory. The file may be closed
/// afterwards.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: NonNull<c_void>,
    length: NonZeroUsize,
    _reserved: Reserved,
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
        let offset = offset.try_into().map_err(|_| Errno::EOVERFLOW)?;
        let align = alignment(&file)?;
        let reserved = Reserved::new(length, align)?;
        let start = reserved.address.as_ptr().cast::<u8>().wrapping_add(PAGE);
        let start = start.wrapping_add(start.align_offset(align)) as usize;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
        // SAFETY: replaces pages of the reservation, which nothing else uses and in which `length` bytes,
        // rounded up as the kernel does it, and a page lie from `start` on.
        let address = unsafe { mmap(NonZeroUsize::new(start), length, protection, flags, file, offset) }?;
        Ok(Self {
            address,
            length,
            _reserved: reserved,
        })
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

/// What a mapping of `file` is aligned to. The kernel maps whole pages of a hugetlb file, whatever length
/// it is asked for; their size is the file's block size.
fn alignment(file: impl AsFd) -> nix::Result<usize> {
    let block = usize::try_from(fstat(file)?.st_blksize);
    let block = block.ok().filter(|block| block.is_power_of_two());
    Ok(block.map_or(HUGE_PAGE, |block| block.max(HUGE_PAGE)))
}

/// Address space for a mapping and what is around it; unmapped as a whole.
#[derive(Debug)]
struct Reserved {
    address: NonNull<c_void>,
    length: NonZeroUsize,
}

impl Reserved {
    fn new(length: NonZeroUsize, align: usize) -> nix::Result<Self> {
        let whole = length.get().checked_next_multiple_of(align);
        let length = whole.and_then(|whole| whole.checked_add(align.checked_add(2 * PAGE)?));
        let length = length.and_then(NonZeroUsize::new).ok_or(Errno::ENOMEM)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping of nothing, at an address of the kernel's choice.
        let address = unsafe { mmap_anonymous(None, length, ProtFlags::PROT_NONE, flags) }?;
        Ok(Self { address, length })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no slice of it is left, since each borrows it.
        if let Err(error) = unsafe { munmap(self.address, self.length.get()) } {
            tracing::warn!(%error, "cannot unmap shared memory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    #[test]
    fn nothing_lies_beside_a_mapping() {
        let file = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, 3 * PAGE as libc::off_t).unwrap();
        let length = NonZeroUsize::new(2 * PAGE).unwrap();
        let mapping = Mapping::new(&file, PAGE as u64, length).unwrap();
        let start = mapping.address.as_ptr() as usize;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let access = |address: usize| {
            let found = maps.lines().find_map(|line| {
                let (range, rest) = line.split_once(' ')?;
                let (from, to) = range.split_once('-')?;
                let bound = |hex| usize::from_str_radix(hex, 16).unwrap();
                (bound(from)..bound(to)).contains(&address).then_some(&rest[..4])
            });
            found.expect("mapped").to_owned()
        };
        assert_eq!([access(start), access(start + 2 * PAGE - 1)], ["rw-s", "rw-s"]);
        assert_eq!([access(start - 1), access(start + 2 * PAGE)], ["---p", "---p"]);
    }

    /// Needs no huge page, since nothing is touched.
    #[test]
    fn whole_huge_pages_lie_in_the_reservation() {
        for (size, flag) in [
            (2 << 20, MFdFlags::MFD_HUGE_2MB),
            (1 << 30, MFdFlags::MFD_HUGE_1GB),
        ] {
            let Ok(file) = memfd_create(c"test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | flag) else {
                eprintln!("this host has no pages of {size} bytes");
                continue;
            };
            nix::unistd::ftruncate(&file, size as libc::off_t).unwrap();
            let length = NonZeroUsize::new(PAGE).unwrap();
            let mapping = Mapping::new(&file, 0, length).unwrap();
            let start = mapping.address.as_ptr() as usize;
            let reserved = &mapping._reserved;
            let from = reserved.address.as_ptr() as usize;
            assert!(start.is_multiple_of(size) && from + PAGE <= start);
            assert!(start + size + PAGE <= from + reserved.length.get());
            assert!(Mapping::new(&file, PAGE as u64, length).is_err(), "within a page");
        }
    }
}
