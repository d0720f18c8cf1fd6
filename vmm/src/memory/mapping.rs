//! Where this process maps guest RAM: on a 2 MiB boundary, so that KVM and the host can map it with
//! huge pages, and with them already in place where the guest will surely go.
#![expect(unsafe_code, reason = "maps guest RAM at an address of its own choice")]

use super::HUGE_PAGE;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

/// `MADV_COLLAPSE` (Linux 6.1): makes huge pages of a range, whether or not the host's settings
/// would have done so at a fault.
const MADV_COLLAPSE: libc::c_int = 25;
const PAGE: usize = 4096;

/// A shared mapping of a part of the memfd, with the unused address space that aligning it left.
#[derive(Debug)]
pub(super) struct Mapping {
    reserved: *mut libc::c_void,
    reserved_size: usize,
    start: *mut u8,
    size: usize,
}

// SAFETY: the pointers only say what to unmap and to advise; the memory is accessed through
// vm-memory's volatile accessors alone.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method changes the value.
unsafe impl Sync for Mapping {}

/// A mapping of huge pages reserves them all, or fails: a guest that touches one too many would
/// end this process (SIGBUS).
fn flags(hugetlbfs: bool) -> libc::c_int {
    match hugetlbfs {
        true => libc::MAP_SHARED,
        false => libc::MAP_SHARED | libc::MAP_NORESERVE,
    }
}

impl Mapping {
    /// Maps `size` bytes of `file` from `offset` on, aligned to `align`, a power of two.
    ///
    /// # Errors
    /// When there is no address space or memory left.
    pub(super) fn new(
        file: &File,
        offset: u64,
        size: usize,
        align: usize,
        hugetlbfs: bool,
    ) -> io::Result<Self> {
        let too_large = || io::Error::from_raw_os_error(libc::ENOMEM);
        // A page of nothing on both sides: what runs off the end of RAM, or comes before its
        // start, meets no other memory of this process.
        let beside = align.checked_add(2 * PAGE).ok_or_else(too_large)?;
        let reserved_size = size.checked_add(beside).ok_or_else(too_large)?;
        let offset = libc::off_t::try_from(offset).map_err(|_| too_large())?;
        // SAFETY: a fresh mapping of nothing, at an address that the kernel picks.
        let reserved = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserved_size,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = reserved.cast::<u8>();
        let padding = PAGE + start.wrapping_add(PAGE).align_offset(align);
        let mapping = Self {
            reserved,
            reserved_size,
            start: start.wrapping_add(padding),
            size,
        };
        // SAFETY: replaces pages of the reservation above, which nothing else uses: `padding` is
        // less than a page and `align`, so that `size` bytes and a page from there lie within it.
        let mapped = unsafe {
            libc::mmap(
                mapping.start.cast(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                flags(hugetlbfs) | libc::MAP_FIXED,
                file.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(mapping)
    }

    /// The same bytes for vm-memory, which does not unmap them.
    ///
    /// # Errors
    /// When vm-memory finds fault with the range.
    pub(super) fn region(&self, file: FileOffset, hugetlbfs: bool) -> io::Result<MmapRegion> {
        let builder = MmapRegionBuilder::new(self.size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags(hugetlbfs))
            .with_file_offset(file)
            .with_hugetlbfs(hugetlbfs);
        // SAFETY: `start` begins `size` mapped bytes, which stay mapped until `self` is dropped.
        let builder = unsafe { builder.with_raw_mmap_pointer(self.start) };
        builder.build().map_err(io::Error::other)
    }

    /// Gives huge pages to whatever is touched, where the host's settings leave that to us.
    pub(super) fn prefer_huge_pages(&self) {
        if let Err(error) = self.advise(0, self.size, libc::MADV_HUGEPAGE) {
            tracing::debug!(%error, "no huge pages on this host");
        }
    }

    /// Advice that changes no content, for `size` bytes from `at` on, which lie in the mapping.
    fn advise(&self, at: usize, size: usize, advice: libc::c_int) -> io::Result<()> {
        assert!(at <= self.size && size <= self.size - at);
        // SAFETY: the range lies within our own mapping (asserted above).
        match unsafe { libc::madvise(self.start.wrapping_add(at).cast(), size, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Puts huge pages below the bytes `from..to` now: each of them that lies in the mapping and is
    /// to be filled by half at least. A host that cannot goes on with small ones.
    pub(super) fn place_huge_pages(&self, from: usize, to: usize) {
        let nearest = |at: usize| (at.min(self.size) + HUGE_PAGE / 2) / HUGE_PAGE * HUGE_PAGE;
        let (first, last) = (nearest(from), nearest(to).min(self.size / HUGE_PAGE * HUGE_PAGE));
        for block in (first..last).step_by(HUGE_PAGE) {
            // Linux finds nothing to collapse where there is no page at all.
            let placed = self
                .advise(block, PAGE, libc::MADV_POPULATE_WRITE)
                .and_then(|()| self.advise(block, HUGE_PAGE, MADV_COLLAPSE));
            if let Err(error) = placed {
                // No such call, or no huge page left: the next one would fail as well.
                tracing::debug!(%error, block, "no huge page");
                return;
            }
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the whole range is ours, and whoever holds a pointer into it (vm-memory's
        // regions, KVM's slots) is dropped before: see the order of fields in `GuestRam`.
        unsafe { libc::munmap(self.reserved, self.reserved_size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(size: u64) -> File {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn a_mapping_starts_on_its_boundary_and_shows_the_file_from_its_offset() {
        use std::os::unix::fs::FileExt;
        let file = memfd(3 << 20);
        file.write_all_at(&[7], 1 << 20).unwrap();
        let mapping = Mapping::new(&file, 1 << 20, 2 << 20, HUGE_PAGE, false).unwrap();
        assert_eq!(mapping.start as usize % HUGE_PAGE, 0);
        // SAFETY: the first byte of the mapping.
        assert_eq!(unsafe { mapping.start.read_volatile() }, 7);
    }

    /// Whether this process can read a byte there; asking the kernel, which answers EFAULT.
    fn is_readable(address: *const u8) -> bool {
        let (read, write) = nix::unistd::pipe().unwrap();
        // SAFETY: the kernel checks the address and copies one byte of it, if it can.
        let written = unsafe { libc::write(write.as_raw_fd(), address.cast(), 1) };
        drop(read);
        written == 1
    }

    #[test]
    fn a_page_of_nothing_lies_on_both_sides() {
        for (size, align) in [(PAGE, PAGE), (2 << 20, HUGE_PAGE), (3 << 20, HUGE_PAGE)] {
            let file = memfd(size as u64);
            let mapping = Mapping::new(&file, 0, size, align, false).unwrap();
            assert!(is_readable(mapping.start) && is_readable(mapping.start.wrapping_add(size - 1)));
            assert!(!is_readable(mapping.start.wrapping_sub(1)));
            assert!(!is_readable(mapping.start.wrapping_sub(PAGE)));
            assert!(!is_readable(mapping.start.wrapping_add(size)));
            assert!(!is_readable(mapping.start.wrapping_add(size + PAGE - 1)));
        }
    }

    #[test]
    fn huge_pages_keep_the_content_and_stop_at_the_end() {
        let file = memfd(5 << 20);
        let mapping = Mapping::new(&file, 0, 5 << 20, HUGE_PAGE, false).unwrap();
        let last = mapping.start.wrapping_add((5 << 20) - 1);
        // SAFETY: the last byte of the mapping.
        unsafe { last.write_volatile(9) };
        mapping.prefer_huge_pages();
        mapping.place_huge_pages(1, 5 << 20);
        // SAFETY: as above.
        assert_eq!(unsafe { last.read_volatile() }, 9);
    }
}
