//! One memfd, sealed so that no process it is shared with can shrink it under us (SIGBUS).

use super::HUGE_PAGE;
use super::layout::ram_ranges;
use super::mapping::Mapping;
use jailer::sandbox::SEALS;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};
use vm_spec::machine;

/// Not executable, and never to become so (Linux 6.3).
const MFD_NOEXEC_SEAL: MFdFlags = MFdFlags::from_bits_retain(8);

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// Outside what the machine allows.
    #[error("guest memory of {0} bytes is outside what the machine allows, 32 MiB to 1 TiB")]
    Size(u64),
    /// Not a multiple of the page size.
    #[error("{memory} bytes of guest memory is not a multiple of the page size, {page} bytes")]
    Alignment {
        /// Bytes asked for.
        memory: u64,
        /// Page size in bytes.
        page: u64,
    },
    /// A huge page size that x86-64 does not have.
    #[error("no huge pages of {0} bytes: 2 MiB and 1 GiB exist")]
    HugePageSize(u64),
    /// The kernel has not enough memory or huge pages.
    #[error("cannot {what} {size} bytes of guest memory")]
    System {
        /// The step.
        what: &'static str,
        /// Bytes.
        size: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A contiguous piece of guest RAM, as a vhost-user memory table describes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RamRegion {
    /// Guest physical address of its first byte.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Where in the memfd it starts, in bytes.
    pub memfd_offset: u64,
    /// Where this process maps it.
    pub host_address: u64,
}

/// All RAM of the guest.
pub struct GuestRam {
    // Points into the mappings: dropped before them.
    memory: GuestMemoryMmap,
    mappings: Vec<(u64, Mapping)>,
    memfd: Arc<File>,
    size: u64,
    used: AtomicBool,
}

impl GuestRam {
    /// Makes, seals and maps `size` bytes of RAM, on pages of `huge_page_size` bytes if given.
    ///
    /// # Errors
    /// Any [`RamError`].
    pub fn new(size: u64, huge_page_size: Option<u64>) -> Result<Self, RamError> {
        if !(machine::MIN_MEMORY..=machine::MAX_MEMORY).contains(&size) {
            return Err(RamError::Size(size));
        }
        let huge = match huge_page_size {
            None => MFdFlags::empty(),
            Some(0x20_0000) => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
            Some(0x4000_0000) => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB,
            Some(other) => return Err(RamError::HugePageSize(other)),
        };
        let page = huge_page_size.unwrap_or(4096);
        if !size.is_multiple_of(page) {
            return Err(RamError::Alignment { memory: size, page });
        }
        let failed = |what| move |source: io::Error| RamError::System { what, size, source };
        let memfd = create(huge).map_err(failed("allocate"))?;
        memfd.set_len(size).map_err(failed("allocate"))?;
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(SEALS)).map_err(|e| failed("seal")(e.into()))?;
        let memfd = Arc::new(memfd);
        let hugetlbfs = huge_page_size.is_some();
        let mappings = map(&memfd, size, page, hugetlbfs).map_err(failed("map"))?;
        if !hugetlbfs {
            mappings
                .iter()
                .for_each(|(_, mapping)| mapping.prefer_huge_pages());
        }
        let memory = regions(&memfd, &mappings, hugetlbfs).map_err(failed("map"))?;
        Ok(Self {
            memory,
            mappings,
            memfd,
            size,
            used: AtomicBool::new(false),
        })
    }

    /// The mapping, for reads and writes by guest physical address.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The sealed memfd, to be handed to back ends.
    #[must_use]
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Puts huge pages below what is about to be written anyway, so that neither this process nor
    /// the guest takes a fault for every 4 KiB of it. Where the host has none, or RAM is made of
    /// huge pages already, nothing happens.
    pub fn place_huge_pages(&self, start: u64, size: u64) {
        for (base, mapping) in &self.mappings {
            let within = |address: u64| usize::try_from(address.saturating_sub(*base)).unwrap_or(usize::MAX);
            mapping.place_huge_pages(within(start), within(start.saturating_add(size)));
        }
    }

    /// A guest may have written here: from now on nothing is known to be zero.
    pub fn mark_used(&self) {
        self.used.store(true, Ordering::Release);
    }

    /// Whether a guest may have written here.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.used.load(Ordering::Acquire)
    }

    /// The contiguous pieces, in order of guest address.
    pub fn regions(&self) -> impl Iterator<Item = RamRegion> + '_ {
        self.memory.iter().map(|region| RamRegion {
            guest_address: region.start_addr().0,
            size: region.len(),
            memfd_offset: region.file_offset().map_or(0, FileOffset::start),
            host_address: region.get_mmap().as_ptr() as u64,
        })
    }
}

/// A memfd that can be sealed, and that no process it is shared with can execute: a guest's bytes
/// are no program.
fn create(huge: MFdFlags) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | huge;
    let no_exec = flags | MFD_NOEXEC_SEAL;
    let memfd = match memfd_create(c"guest-ram", no_exec) {
        // A kernel that knows no such flag.
        Err(Errno::EINVAL) => memfd_create(c"guest-ram", flags),
        other => other,
    }?;
    Ok(memfd.into())
}

fn map(memfd: &File, size: u64, page: u64, hugetlbfs: bool) -> io::Result<Vec<(u64, Mapping)>> {
    let align = HUGE_PAGE.max(usize::try_from(page).unwrap_or(HUGE_PAGE));
    let mut offset = 0;
    let mut mappings = Vec::new();
    for (start, len) in ram_ranges(size) {
        let len_here = usize::try_from(len).map_err(io::Error::other)?;
        mappings.push((start, Mapping::new(memfd, offset, len_here, align, hugetlbfs)?));
        offset += len;
    }
    Ok(mappings)
}
fn regions(memfd: &Arc<File>, mappings: &[(u64, Mapping)], huge: bool) -> io::Result<GuestMemoryMmap> {
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, mapping) in mappings {
        let region = mapping.region(FileOffset::from_arc(memfd.clone(), offset), huge)?;
        offset += region.size() as u64;
        let region = GuestRegionMmap::new(region, GuestAddress(*start))
            .ok_or_else(|| io::Error::other("guest address overflows"))?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::SealFlag;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use vm_memory::Bytes;

    #[test]
    fn ram_is_sealed_against_shrinking_growing_and_unsealing() {
        let ram = GuestRam::new(machine::MIN_MEMORY, None).unwrap();
        let file = File::from(ram.memfd().try_clone_to_owned().unwrap());
        assert_eq!(file.set_len(0).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(
            file.set_len(1 << 40).unwrap_err().raw_os_error(),
            Some(libc::EPERM)
        );
        assert!(fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
    }

    #[test]
    fn ram_is_no_program() {
        if memfd_create(c"probe", MFD_NOEXEC_SEAL).err() == Some(Errno::EINVAL) {
            return;
        }
        let ram = GuestRam::new(machine::MIN_MEMORY, None).unwrap();
        let file = File::from(ram.memfd().try_clone_to_owned().unwrap());
        let mode = |file: &File| file.metadata().unwrap().permissions().mode();
        assert_eq!(mode(&file) & 0o111, 0);
        assert!(file.set_permissions(Permissions::from_mode(0o700)).is_err());
        assert_eq!(mode(&file) & 0o111, 0);
    }

    /// SIGBUS is what a mapping gives behind its file's end. Whoever holds the memfd can cut no
    /// byte off it; what it can do is punch holes, and they read as zeros.
    #[test]
    fn nobody_who_holds_the_memfd_can_cause_a_sigbus() {
        let ram = GuestRam::new(machine::MIN_MEMORY, None).unwrap();
        let at = GuestAddress(0x1000);
        ram.memory().write_obj(7u64, at).unwrap();
        let file = File::from(ram.memfd().try_clone_to_owned().unwrap());
        let hole = nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE
            | nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE;
        let size = i64::try_from(machine::MIN_MEMORY).unwrap();
        nix::fcntl::fallocate(&file, hole, 0, size).unwrap();
        assert_eq!(ram.memory().read_obj::<u64>(at).unwrap(), 0);
        for cut in [0, 0x1000, machine::MIN_MEMORY - 1] {
            assert!(file.set_len(cut).is_err());
        }
        let collapse = nix::fcntl::FallocateFlags::FALLOC_FL_COLLAPSE_RANGE;
        assert!(nix::fcntl::fallocate(&file, collapse, 0, 0x1000).is_err());
    }

    #[test]
    fn five_gibibytes_are_two_regions_of_one_memfd() {
        let ram = GuestRam::new(5 << 30, None).unwrap();
        let regions: Vec<_> = ram.regions().collect();
        assert_eq!(regions.len(), 2);
        assert_eq!(regions[1].guest_address, machine::HIGH_RAM_START);
        assert_eq!(regions[1].memfd_offset, regions[0].size);
        let top = GuestAddress(machine::HIGH_RAM_START + (2 << 30) - 8);
        ram.memory().write_obj(7u64, top).unwrap();
        assert!(
            ram.memory()
                .write_obj(7u64, GuestAddress(machine::PCI_HOLE_START))
                .is_err()
        );
    }

    #[test]
    fn huge_pages_that_the_host_lacks_are_missed_at_once() {
        // More than any host has of them.
        let error = GuestRam::new(machine::MAX_MEMORY, Some(2 << 20)).err().unwrap();
        assert!(matches!(error, RamError::System { .. }), "{error}");
    }

    #[test]
    fn sizes_that_cannot_be_are_refused_by_reason() {
        assert!(matches!(GuestRam::new(1 << 20, None), Err(RamError::Size(_))));
        assert!(matches!(
            GuestRam::new((32 << 20) + 1, None),
            Err(RamError::Alignment { .. })
        ));
        assert!(matches!(
            GuestRam::new(33 << 20, Some(2 << 20)),
            Err(RamError::Alignment { .. })
        ));
        assert!(matches!(
            GuestRam::new(32 << 20, Some(4 << 20)),
            Err(RamError::HugePageSize(_))
        ));
    }
}
