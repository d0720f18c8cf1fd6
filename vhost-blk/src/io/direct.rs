//! An image's file without the page cache: guest data by O_DIRECT, metadata and what is not aligned by
//! a second open file description of the same file.
//!
//! The kernel keeps the two coherent as long as no page is written both ways at once: one that becomes dirty
//! while a direct write to a part of it is under way may bring that part's old content back. So only whole
//! pages are written past the cache. Metadata, small clusters and parts of pages then never share one with
//! such a write, unless the guest's own writes overlap.
#![expect(unsafe_code, reason = "statx for the alignment, which nix does not offer")]

use crate::image::{BlockFile, Buffers, HostFile, Way};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, FsType, TMPFS_MAGIC, fstatfs};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// What every O_DIRECT transfer is aligned to where the host does not say.
const SAFE_ALIGNMENT: u64 = 4096;
/// Of the page cache (x86-64).
const PAGE: u64 = 4096;

/// Two descriptions of one file.
#[derive(Debug)]
pub struct DirectFile {
    plain: HostFile,
    direct: HostFile,
    way: Way,
    /// Alignment of addresses and of offsets and lengths, in bytes.
    memory: u64,
    offset: u64,
}

impl DirectFile {
    /// Takes `plain`, and the same file as `direct`, opened with O_DIRECT.
    ///
    /// # Errors
    /// When they are not the same file, or `direct` is not open with O_DIRECT (`InvalidInput`).
    pub fn new(plain: HostFile, direct: OwnedFd) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let flags = OFlag::from_bits_truncate(fcntl(&direct, FcntlArg::F_GETFL)?);
        if !flags.contains(OFlag::O_DIRECT) {
            return Err(invalid("the second descriptor is not open with O_DIRECT"));
        }
        let (memory, offset) = alignment(direct.as_fd()).unwrap_or((SAFE_ALIGNMENT, SAFE_ALIGNMENT));
        let direct = HostFile::new(direct)?;
        if plain.identity()? != direct.identity()? {
            return Err(invalid("the two descriptors are of different files"));
        }
        Ok(Self {
            plain,
            direct,
            way: Way::Calls,
            memory,
            offset,
        })
    }

    /// As it is, with aligned data moved so by an I/O engine.
    #[must_use]
    pub fn moved_by(self, way: Way) -> Self {
        Self { way, ..self }
    }

    /// Whether the host takes this transfer, of whole units, past the page cache.
    fn takes(&self, buffers: Buffers<'_>, offset: u64, unit: u64) -> bool {
        let mut fits = is_whole(offset, buffers.len() as u64, unit);
        buffers.with_slices(|slices| {
            for slice in slices {
                let address = slice.ptr_guard().as_ptr() as u64;
                fits &=
                    address.is_multiple_of(self.memory) && (slice.len() as u64).is_multiple_of(self.memory);
            }
        });
        fits
    }

    /// What is written past the cache is a multiple of this, and lies at one.
    fn write_unit(&self) -> u64 {
        self.offset.max(PAGE)
    }
}

fn is_whole(offset: u64, len: u64, unit: u64) -> bool {
    offset.is_multiple_of(unit) && len.is_multiple_of(unit)
}

/// Whether direct writes that a killed process had begun by an io_uring can be waited for; they would
/// land on newer data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fence {
    /// They were waited for.
    Passed,
    /// Nothing waits for them: not on a block device, not on a file system of another kind. There
    /// data may only move by calls: a process ends no sooner than its calls.
    None,
}

/// Where `fallocate` waits for all direct writes to the file, whoever began them (`inode_dio_wait`), or
/// where there are none. btrfs waits for those to the range only.
const WAITING: [FsType; 3] = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, TMPFS_MAGIC];
/// `linux/magic.h`; not every C library has it.
const XFS_SUPER_MAGIC: FsType = FsType(0x5846_5342);

/// Waits for direct writes of a process that was killed. `fallocate` does; its one byte exists, or costs
/// a block. `fdatasync` does not.
///
/// # Errors
/// The file's.
pub fn await_direct_writes(file: BorrowedFd<'_>) -> io::Result<Fence> {
    let kind = SFlag::from_bits_truncate(fstat(file)?.st_mode) & SFlag::S_IFMT;
    if kind == SFlag::S_IFBLK || !WAITING.contains(&fstatfs(file)?.filesystem_type()) {
        return Ok(Fence::None);
    }
    match fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 1) {
        // Space is looked for after the wait: where there is none, nothing is on its way either.
        Ok(()) | Err(Errno::ENOSPC | Errno::EDQUOT) => Ok(Fence::Passed),
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV) => Ok(Fence::None),
        Err(error) => Err(error.into()),
    }
}

/// STATX_DIOALIGN: alignment of memory and of offsets; `None` where the kernel or file system does not
/// say.
fn alignment(file: BorrowedFd<'_>) -> Option<(u64, u64)> {
    // SAFETY: all bytes 0 are a valid `statx`.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string, and `status` is valid for the call to write.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut status,
        )
    };
    let (memory, offset) = (status.stx_dio_mem_align, status.stx_dio_offset_align);
    let known = result == 0 && status.stx_mask & libc::STATX_DIOALIGN != 0 && memory > 0 && offset > 0;
    known.then(|| (memory.into(), offset.into()))
}

impl BlockFile for DirectFile {
    fn size(&self) -> io::Result<u64> {
        self.plain.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.plain.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.plain.write_at(buf, offset)
    }

    fn write_durably(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.plain.write_durably(buf, offset)
    }

    fn read_buffers(&self, to: Buffers<'_>, offset: u64) -> io::Result<()> {
        if self.takes(to, offset, self.offset) {
            self.direct.read_buffers(to, offset)
        } else {
            self.plain.read_buffers(to, offset)
        }
    }

    fn write_buffers(&self, from: Buffers<'_>, offset: u64) -> io::Result<()> {
        if self.takes(from, offset, self.write_unit()) {
            self.direct.write_buffers(from, offset)
        } else {
            self.plain.write_buffers(from, offset)
        }
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.plain.zero_range(offset, len)
    }

    fn discard_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.plain.discard_range(offset, len)
    }

    fn zero_in_place(&self, offset: u64, len: u64) -> io::Result<()> {
        self.plain.zero_in_place(offset, len)
    }

    fn grow_to(&self, len: u64) -> io::Result<()> {
        self.plain.grow_to(len)
    }

    fn secure_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.plain.secure_range(offset, len)
    }

    fn cut_to(&self, len: u64) -> io::Result<()> {
        self.plain.cut_to(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.plain.sync()
    }

    fn makes_holes(&self) -> bool {
        self.plain.makes_holes()
    }

    fn has_fixed_size(&self) -> bool {
        self.plain.has_fixed_size()
    }

    fn identity(&self) -> io::Result<(u64, u64)> {
        self.plain.identity()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.direct.descriptor()
    }

    fn way(&self) -> Way {
        self.way
    }

    fn descriptor_to_write(&self, offset: u64, len: u64) -> Option<BorrowedFd<'_>> {
        self.descriptor()
            .filter(|_| is_whole(offset, len, self.write_unit()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    use vm_memory::VolatileSlice;

    const PAGES: usize = 4 * PAGE as usize;

    /// A file whose descriptor with O_DIRECT refuses writes; `None` where the host has no O_DIRECT.
    fn file() -> Option<(tempfile::TempDir, DirectFile)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, [1; PAGES]).unwrap();
        let plain = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let direct = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path);
        let direct = match direct {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                eprintln!("no O_DIRECT in {}", path.display());
                return None;
            }
            direct => direct.unwrap(),
        };
        let plain = HostFile::new(plain.into()).unwrap();
        Some((folder, DirectFile::new(plain, direct.into()).unwrap()))
    }

    #[test]
    fn a_part_of_a_page_is_not_written_past_the_cache() {
        let Some((folder, file)) = file() else { return };
        let mut memory = vec![7; PAGES + PAGE as usize];
        let start = memory.as_ptr().align_offset(PAGE as usize);
        let write = |memory: &mut [u8], offset: u64, len: usize| {
            let slices = [VolatileSlice::from(&mut memory[start..][..len])];
            let error = file.write_buffers(Buffers::new(&slices), offset).err();
            assert_eq!(
                error.is_some(),
                file.descriptor_to_write(offset, len as u64).is_some(),
                "one way for calls and rings"
            );
            error.and_then(|error| error.raw_os_error())
        };
        for (offset, len) in [(512, 512), (0, 512), (3584, 1024), (512, 4096), (8192, 4608)] {
            assert_eq!(write(&mut memory, offset, len), None, "{len} bytes at {offset}");
        }
        let path = folder.path().join("file");
        let mut bytes = [0; PAGES];
        let plain = std::fs::File::open(path).unwrap();
        plain.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(
            (bytes[4607], bytes[4608], bytes[12_799], bytes[12_800]),
            (7, 1, 7, 1)
        );
        for (offset, len) in [(0, 4096), (4096, 8192)] {
            assert_eq!(
                write(&mut memory, offset, len),
                Some(libc::EBADF),
                "{len} bytes at {offset}"
            );
        }
        assert!(file.descriptor().is_some(), "reads need no whole pages");
    }
}
