//! The host file below an image: what the engines ask of it, and the real one.
//!
//! The trait exists so that a test can record every write and barrier that an engine issues and replay
//! any prefix or reordering of them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::unistd::{Whence, lseek};

use super::buffers::Buffers;
use super::calls::{answers_at_once, piece, position, read_vectors, room, transfer, write_vectors};
use super::syncs::Syncs;
use super::{SECTOR, Way};

/// A hole that any file system can make that makes any.
const HOLE: u64 = 4096;

/// Zeros written at a time where the file system cannot make holes.
const ZERO_CHUNK: usize = 64 << 10;

/// A file that images are stored in. All methods may be called from several threads at once.
pub trait BlockFile: Send + Sync {
    /// Length in bytes; for a block device its size.
    fn size(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset`; what lies past the end of the file reads as zeros.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` at `offset`, growing the file where it may grow.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` at `offset` inside the file; these bytes and the file's length are on stable
    /// storage when it returns, and not necessarily anything else.
    fn write_durably(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(buf, offset)?;
        self.sync()
    }

    /// [`Self::read_at`] straight into guest memory.
    fn read_buffers(&self, to: Buffers<'_>, offset: u64) -> io::Result<()> {
        let mut bounce = vec![0; to.len()];
        self.read_at(&mut bounce, offset)?;
        to.copy_from(&bounce);
        Ok(())
    }

    /// [`Self::write_at`] straight from guest memory.
    fn write_buffers(&self, from: Buffers<'_>, offset: u64) -> io::Result<()> {
        let mut bounce = vec![0; from.len()];
        from.copy_to(&mut bounce);
        self.write_at(&bounce, offset)
    }

    /// Makes a range inside the file read as zeros and gives its blocks back where the host can.
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Gives a range's blocks back if the host can; it may read as before otherwise.
    fn discard_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero_range(offset, len)
    }

    /// Makes a range inside the file read as zeros and keeps its blocks if the host can.
    fn zero_in_place(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero_range(offset, len)
    }

    /// Makes the file at least `len` bytes long; the new part reads as zeros. A block device has to be that long
    /// already, and shows what it holds.
    fn grow_to(&self, len: u64) -> io::Result<()>;

    /// Makes the file reach to the end of this range and has space for it, so that writing there lacks none. What
    /// the file held stays.
    fn secure_range(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Cuts the file to `len` bytes if it is longer and can be cut.
    fn cut_to(&self, len: u64) -> io::Result<()>;

    /// The barrier: everything written before is on stable storage when it returns (fdatasync). Once one
    /// has failed, none succeeds.
    fn sync(&self) -> io::Result<()>;

    /// How far, from its start on, a range is a hole, which reads as zeros, or may be data: a length in bytes, and
    /// whether it is a hole. No hole is looked for unless somebody has use for it ([`HostFile::telling_holes`]).
    fn hole_at(&self, _offset: u64, len: u64) -> io::Result<(u64, bool)> {
        Ok((len, false))
    }

    /// Whether [`Self::discard_range`] gives space back. True where it cannot be told (a block device).
    fn makes_holes(&self) -> bool {
        true
    }

    /// Whether parts past the length that the engine knows may hold old data (a block device).
    fn has_fixed_size(&self) -> bool {
        false
    }

    /// What tells this file from another: device and inode.
    fn identity(&self) -> io::Result<(u64, u64)>;

    /// Whether transfers must be aligned (O_DIRECT).
    fn needs_alignment(&self) -> io::Result<bool> {
        Ok(false)
    }

    /// The descriptor, for an I/O engine that submits by itself; `None` where none stands behind it.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// How data is best moved by that descriptor.
    fn way(&self) -> Way {
        Way::Calls
    }

    /// As [`Self::descriptor`], to write to this range; `None` too where only [`Self::write_buffers`] may.
    fn descriptor_to_write(&self, _offset: u64, _len: u64) -> Option<BorrowedFd<'_>> {
        self.descriptor()
    }
}

/// A regular file or block device of the host.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    /// Size of a block device, looked up once: finding it takes a system call that a jailed process lacks.
    fixed_size: Option<u64>,
    makes_holes: bool,
    tells_holes: bool,
    way: Way,
    syncs: Syncs,
}

impl HostFile {
    /// Takes the descriptor of a regular file or block device.
    ///
    /// # Errors
    /// When it cannot be examined, or is something else (`InvalidInput`).
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let fixed_size = match file_type(&fstat(&file)?) {
            SFlag::S_IFREG => None,
            SFlag::S_IFBLK => {
                let end = lseek(&file, 0, Whence::SeekEnd)?;
                Some(u64::try_from(end).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?)
            }
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "neither a regular file nor a block device",
                ));
            }
        };
        let mut host = Self {
            file,
            fixed_size,
            makes_holes: true,
            tells_holes: false,
            way: Way::Calls,
            syncs: Syncs::default(),
        };
        if fixed_size.is_none() {
            // A hole behind the end changes nothing.
            let end = host.size()?.next_multiple_of(HOLE);
            host.makes_holes = host
                .allocate_inside(FallocateFlags::FALLOC_FL_PUNCH_HOLE, end, HOLE)
                .unwrap_or(false);
        }
        Ok(host)
    }

    /// As [`Self::new`], of a file that lost what another process had written to it: no flush of it succeeds.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn after_loss(fd: OwnedFd) -> io::Result<Self> {
        let host = Self::new(fd)?;
        Ok(Self {
            syncs: Syncs::lost(),
            ..host
        })
    }

    /// As it is, with its data moved so by an I/O engine. [`Way::Attempt`] is [`Way::Calls`] where the file
    /// system cannot say that a read would wait, as those in memory.
    #[must_use]
    pub fn moved_by(self, way: Way) -> Self {
        let way = match way {
            Way::Attempt if !answers_at_once(self.file.as_fd()) => Way::Calls,
            way => way,
        };
        Self { way, ..self }
    }

    /// As it is, and [`BlockFile::hole_at`] looks for holes if `tells_holes`.
    #[must_use]
    pub fn telling_holes(self, tells_holes: bool) -> Self {
        Self { tells_holes, ..self }
    }

    /// [`Self::allocate`] that leaves the size as it is.
    fn allocate_inside(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        self.allocate(mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len)
    }

    /// Runs `fallocate`; says whether this file system can, or this block device with such a range.
    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        let (Ok(start), Ok(count)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        loop {
            return match nix::fcntl::fallocate(&self.file, mode, start, count) {
                Ok(()) => Ok(true),
                // An end in the ring interrupts other calls of its thread.
                Err(Errno::EINTR) => continue,
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(false),
                // A device takes whole logical blocks of its own, which may be larger than a sector.
                Err(Errno::EINVAL) if self.fixed_size.is_some() => Ok(false),
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Whether a block device is this long by now.
    fn reaches(&self, len: u64) -> io::Result<bool> {
        let last = position(len.saturating_sub(1))?;
        let mut byte = [0];
        loop {
            return match read_vectors(self.file.as_fd(), &[room(&mut byte)], last, 0) {
                Err(Errno::EINTR) => continue,
                found => Ok(found? == 1),
            };
        }
    }

    fn write_zeros(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        static ZEROS: [u8; ZERO_CHUNK] = [0; ZERO_CHUNK];
        while len > 0 {
            let part = usize::try_from(len).unwrap_or(usize::MAX).min(ZERO_CHUNK);
            self.write_at(&ZEROS[..part], offset)?;
            offset += part as u64;
            len -= part as u64;
        }
        Ok(())
    }
}

impl BlockFile for HostFile {
    fn size(&self) -> io::Result<u64> {
        if let Some(size) = self.fixed_size {
            return Ok(size);
        }
        // Not `File::metadata`: it may be statx, which takes a path, and a jailed process lacks it.
        let size = fstat(&self.file)?.st_size;
        u64::try_from(size).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            // Vectored like all else: one call less in the policy.
            let position = position(offset)?;
            match read_vectors(self.file.as_fd(), &[room(buf)], position, 0) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(done) => {
                    buf = &mut buf[done..];
                    offset += done as u64;
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write_at(&self, mut buf: &[u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match write_vectors(&self.file, &[piece(buf)], position(offset)?, 0) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(done) => {
                    buf = &buf[done..];
                    offset += done as u64;
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// By RWF_DSYNC: it does not wait for what else is dirty, as fdatasync does. That the length is durable
    /// with it is not promised by a page of the manual, but done by file systems with a journal or a log:
    /// the inode is committed as a whole.
    fn write_durably(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let position = position(offset)?;
        let done = self.syncs.one_write(|| {
            match write_vectors(&self.file, &[piece(buf)], position, libc::RWF_DSYNC) {
                Err(Errno::EINTR | Errno::EOPNOTSUPP) => Ok(0),
                // It may be the flush that failed.
                done => Ok(done?),
            }
        })?;
        if done == buf.len() {
            return Ok(());
        }
        self.write_at(buf, offset)?;
        self.sync()
    }

    fn read_buffers(&self, to: Buffers<'_>, offset: u64) -> io::Result<()> {
        transfer(to, offset, |list, offset| {
            read_vectors(self.file.as_fd(), list, offset, 0)
        })
        .map(|done| to.window(done, usize::MAX).fill_zero())
    }

    fn write_buffers(&self, from: Buffers<'_>, offset: u64) -> io::Result<()> {
        let done = transfer(from, offset, |list, offset| {
            write_vectors(&self.file, list, offset, 0)
        })?;
        if done < from.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.allocate_inside(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len)? {
            return Ok(());
        }
        self.write_zeros(offset, len)
    }

    fn discard_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate_inside(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len)
            .map(|_| ())
    }

    fn zero_in_place(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.allocate_inside(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len)? {
            return Ok(());
        }
        self.write_zeros(offset, len)
    }

    fn grow_to(&self, len: u64) -> io::Result<()> {
        let now = self.size()?;
        match (len > now, self.fixed_size) {
            (false, _) => Ok(()),
            (true, Some(_)) if self.reaches(len)? => Ok(()),
            (true, Some(_)) => Err(super::no_space()),
            (true, None) => self.file.set_len(len),
        }
    }

    fn secure_range(&self, offset: u64, len: u64) -> io::Result<()> {
        let size = self.size()?;
        if self.fixed_size.is_none() && !self.allocate(FallocateFlags::empty(), offset, len)? {
            // What is inside may be in use: only zeros behind the end change nothing.
            let start = offset.max(size);
            return self.write_zeros(start, (offset + len).saturating_sub(start));
        }
        self.grow_to(offset + len)
    }

    fn cut_to(&self, len: u64) -> io::Result<()> {
        if self.fixed_size.is_some() || len >= self.size()? {
            return Ok(());
        }
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.syncs.everything(|| self.file.sync_data())
    }

    /// In whole sectors, so that who goes on behind it stays aligned. Where a file system cannot tell, all is data.
    fn hole_at(&self, offset: u64, len: u64) -> io::Result<(u64, bool)> {
        if !self.tells_holes {
            return Ok((len, false));
        }
        let start = position(offset)?;
        let until = |at: i64| u64::try_from(at - start).unwrap_or(0).min(len);
        let hole = match lseek(&self.file, start, Whence::SeekData) {
            Ok(data) => until(data) / SECTOR * SECTOR,
            Err(Errno::ENXIO) => len,
            Err(_) => 0,
        };
        if hole > 0 {
            return Ok((hole, true));
        }
        let data = lseek(&self.file, start, Whence::SeekHole).map_or(len, until);
        Ok(match data.next_multiple_of(SECTOR).min(len) {
            0 => (len, false),
            data => (data, false),
        })
    }

    fn makes_holes(&self) -> bool {
        self.makes_holes
    }

    fn has_fixed_size(&self) -> bool {
        self.fixed_size.is_some()
    }

    fn identity(&self) -> io::Result<(u64, u64)> {
        let status = fstat(&self.file)?;
        Ok(if self.fixed_size.is_some() {
            (u64::MAX, status.st_rdev)
        } else {
            (status.st_dev, status.st_ino)
        })
    }

    fn needs_alignment(&self) -> io::Result<bool> {
        let flags = nix::fcntl::fcntl(&self.file, nix::fcntl::FcntlArg::F_GETFL)?;
        Ok(nix::fcntl::OFlag::from_bits_truncate(flags).contains(nix::fcntl::OFlag::O_DIRECT))
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn way(&self) -> Way {
        self.way
    }
}

fn file_type(status: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT
}
