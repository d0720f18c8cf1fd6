//! The memory table: SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG with all their checks.

use super::segment::RegionHint;
use super::{GuestAddress, Mapping, Segment, Segments};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use vm_memory::VolatileSlice;

/// Most regions in a table; what GET_MAX_MEM_SLOTS answers.
pub(crate) const MAX_REGIONS: usize = 64;
/// Alignment of every address, offset and size of a region.
const PAGE_SIZE: u64 = 4096;

/// What a front end says about a region (vhost-user, "Memory region description").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegionSpec {
    /// First guest physical address.
    pub guest_address: u64,
    /// Size in bytes.
    pub size: u64,
    /// The region's address in the front end, used in SET_VRING_ADDR.
    pub user_address: u64,
    /// Where it starts in the file.
    pub offset: u64,
}

/// Whether the front end's memory must be unable to shrink under us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sealing {
    /// Memory without F_SEAL_SHRINK is refused.
    Required,
    /// It is accepted with a warning; a file cut short then ends the process by SIGBUS.
    Preferred,
}

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Size 0, not a multiple of a page, or past the end of the address space.
    #[error("memory region at {0}: its addresses, size and offset must be multiples of 4096 within 64 bits")]
    Shape(GuestAddress),
    /// Two regions share guest addresses or front-end addresses.
    #[error("memory region at {0} overlaps another one")]
    Overlap(GuestAddress),
    /// More than `MAX_REGIONS`.
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    /// REM_MEM_REG named a region that is not there.
    #[error("no memory region at {0} with this size and front-end address")]
    Unknown(GuestAddress),
    /// The fd is no file that can be mapped safely.
    #[error("memory region at {0}: its file descriptor is not a memfd or regular file")]
    NotAFile(GuestAddress),
    /// The file ends before the region does.
    #[error("memory region at {address} ends at byte {end} of its file, which has {size}")]
    TooShort {
        /// The region.
        address: GuestAddress,
        /// First byte after it in the file.
        end: u64,
        /// The file's size.
        size: u64,
    },
    /// No F_SEAL_SHRINK.
    #[error("memory region at {0} can be truncated by its owner; seal it with F_SEAL_SHRINK")]
    Unsealed(GuestAddress),
    /// The kernel refused.
    #[error("cannot map memory region at {address}")]
    Map {
        /// The region.
        address: GuestAddress,
        /// Why.
        #[source]
        source: nix::Error,
    },
}

#[derive(Clone, Debug)]
struct Region {
    spec: RegionSpec,
    mapping: Arc<Mapping>,
}

/// All guest memory at one moment, sorted by guest address.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// This memory and one more region, which is mapped; `file` is closed.
    ///
    /// # Errors
    /// Any [`MemoryError`]; this memory stays as it is.
    pub fn with_region(
        &self,
        spec: RegionSpec,
        file: OwnedFd,
        sealing: Sealing,
    ) -> Result<Self, MemoryError> {
        let address = GuestAddress(spec.guest_address);
        check_shape(&spec)?;
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        if self.regions.iter().any(|region| overlap(&region.spec, &spec)) {
            return Err(MemoryError::Overlap(address));
        }
        check_file(file.as_fd(), &spec, sealing)?;
        let length = usize::try_from(spec.size).ok().and_then(NonZeroUsize::new);
        let length = length.ok_or(MemoryError::Shape(address))?;
        let mapping = Mapping::new(&file, spec.offset, length)
            .map_err(|source| MemoryError::Map { address, source })?;
        let mut regions = self.regions.clone();
        let place = regions.partition_point(|region| region.spec.guest_address < spec.guest_address);
        regions.insert(
            place,
            Region {
                spec,
                mapping: Arc::new(mapping),
            },
        );
        Ok(Self { regions })
    }

    /// This memory without one region. The mapping goes when its last user does.
    ///
    /// # Errors
    /// [`MemoryError::Unknown`].
    pub fn without_region(
        &self,
        guest_address: u64,
        user_address: u64,
        size: u64,
    ) -> Result<Self, MemoryError> {
        let same = |region: &Region| {
            region.spec.guest_address == guest_address
                && region.spec.user_address == user_address
                && region.spec.size == size
        };
        let place = self.regions.iter().position(same);
        let place = place.ok_or(MemoryError::Unknown(GuestAddress(guest_address)))?;
        let mut regions = self.regions.clone();
        regions.remove(place);
        Ok(Self { regions })
    }

    /// Whether all of `other` is in this table too, by the same mappings.
    pub(crate) fn holds(&self, other: &Self) -> bool {
        let held = |wanted: &Region| {
            let same = |region: &Region| Arc::ptr_eq(&region.mapping, &wanted.mapping);
            self.regions.iter().any(same)
        };
        other.regions.iter().all(held)
    }

    /// The guest address that the front end knows as `user_address`.
    pub fn guest_address(&self, user_address: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|Region { spec, .. }| {
            let offset = user_address.checked_sub(spec.user_address)?;
            (offset < spec.size).then(|| GuestAddress(spec.guest_address + offset))
        })
    }

    /// Proves that `length` bytes from `address` lie in one region.
    pub fn segment(&self, address: GuestAddress, length: usize) -> Option<Segment> {
        let segment = self.first_segment(address, length)?;
        (segment.length == length).then_some(segment)
    }

    /// Appends the segments that make up `length` bytes from `address`, which may cross regions. `hint`
    /// is where the latest buffer was found, and then where this one was. Returns false, with some
    /// appended, where a byte is not in guest memory.
    #[inline]
    pub(crate) fn append_segments(
        &self,
        address: GuestAddress,
        length: usize,
        hint: &mut RegionHint,
        segments: &mut Segments,
    ) -> bool {
        if let Some(segment) = hint.find(address, length) {
            segments.push(segment);
            return true;
        }
        self.append_anywhere(address, length, hint, segments)
    }

    #[cold]
    fn append_anywhere(
        &self,
        mut address: GuestAddress,
        mut length: usize,
        hint: &mut RegionHint,
        segments: &mut Segments,
    ) -> bool {
        while length > 0 {
            let Some(segment) = self.first_segment(address, length) else {
                return false;
            };
            segments.push(segment);
            *hint = self.hint(segment.region);
            length -= segment.length;
            let Some(next) = address.0.checked_add(segment.length as u64) else {
                return length == 0;
            };
            address = GuestAddress(next);
        }
        true
    }

    fn hint(&self, region: usize) -> RegionHint {
        self.regions
            .get(region)
            .map_or_else(RegionHint::default, |Region { spec, mapping }| RegionHint {
                region,
                start: spec.guest_address,
                length: mapping.length() as u64,
            })
    }

    /// The memory behind `segment`, which this memory made.
    ///
    /// Every access of this process to guest memory starts here, and every write to it is made
    /// through what this returns for a ring or for the writable part of a chain.
    pub(crate) fn slice(&self, segment: &Segment) -> Option<VolatileSlice<'_>> {
        let region = self.regions.get(segment.region)?;
        region.mapping.slice(segment.offset, segment.length)
    }

    /// As much of the range as the region that holds `address` has.
    fn first_segment(&self, address: GuestAddress, length: usize) -> Option<Segment> {
        let after = self
            .regions
            .partition_point(|region| region.spec.guest_address <= address.0);
        let index = after.checked_sub(1)?;
        let region = self.regions.get(index)?;
        let offset = usize::try_from(address.0 - region.spec.guest_address).ok()?;
        let left = region
            .mapping
            .length()
            .checked_sub(offset)
            .filter(|left| *left > 0)?;
        Some(Segment {
            region: index,
            offset,
            length: length.min(left),
        })
    }
}

fn check_shape(spec: &RegionSpec) -> Result<(), MemoryError> {
    let aligned = [spec.guest_address, spec.size, spec.user_address, spec.offset]
        .iter()
        .all(|value| value.is_multiple_of(PAGE_SIZE));
    let ends = [spec.guest_address, spec.user_address, spec.offset]
        .iter()
        .all(|start| start.checked_add(spec.size).is_some());
    if spec.size > 0 && aligned && ends {
        Ok(())
    } else {
        Err(MemoryError::Shape(GuestAddress(spec.guest_address)))
    }
}

fn overlap(one: &RegionSpec, other: &RegionSpec) -> bool {
    let cross = |a: u64, a_size: u64, b: u64, b_size: u64| a < b + b_size && b < a + a_size;
    cross(one.guest_address, one.size, other.guest_address, other.size)
        || cross(one.user_address, one.size, other.user_address, other.size)
}

fn check_file(file: BorrowedFd<'_>, spec: &RegionSpec, sealing: Sealing) -> Result<(), MemoryError> {
    let address = GuestAddress(spec.guest_address);
    let not_a_file = |_| MemoryError::NotAFile(address);
    let status = fstat(file).map_err(not_a_file)?;
    if SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(MemoryError::NotAFile(address));
    }
    let size = u64::try_from(status.st_size).unwrap_or(0);
    let end = spec.offset + spec.size;
    if end > size {
        return Err(MemoryError::TooShort { address, end, size });
    }
    // EINVAL: a file system without seals.
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map_or(SealFlag::empty(), SealFlag::from_bits_truncate);
    if seals.contains(SealFlag::F_SEAL_SHRINK) {
        return Ok(());
    }
    match sealing {
        Sealing::Required => Err(MemoryError::Unsealed(address)),
        Sealing::Preferred => {
            tracing::warn!(%address, "guest memory is not sealed; if its owner truncates it, this process ends");
            Ok(())
        }
    }
}
