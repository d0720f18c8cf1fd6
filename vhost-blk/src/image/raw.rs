//! The raw format: byte N of the file is byte N of the disk.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use vm_memory::VolatileSlice;

use super::{
    BlockFile, Buffers, Extent, HostFile, Image, ImageError, IoGuard, Resolved, SECTOR, Way, check_range,
};

/// A raw image in a regular file or on a block device.
pub struct RawImage {
    file: Arc<dyn BlockFile>,
    capacity: AtomicU64,
    read_only: bool,
}

impl RawImage {
    /// Takes a file or block device as a disk.
    ///
    /// # Errors
    /// When its size cannot be found or is refused by [`Self::on`].
    pub fn open(fd: OwnedFd, read_only: bool) -> io::Result<Self> {
        let file = HostFile::new(fd).map_err(ImageError::io("use the image's file"))?;
        Ok(Self::on(Arc::new(file), read_only)?)
    }

    /// Takes any file as a disk.
    ///
    /// A size that is no multiple of 512 is rounded up with zeros for reading, and refused for writing:
    /// the last bytes could not be kept. An empty disk is refused for writing.
    ///
    /// # Errors
    /// [`ImageError::Refused`] for the size; `Io` when it cannot be found.
    pub fn on(file: Arc<dyn BlockFile>, read_only: bool) -> Result<Self, ImageError> {
        let len = file
            .size()
            .map_err(ImageError::io("find the size of the raw image"))?;
        if !read_only && (len == 0 || !len.is_multiple_of(SECTOR)) {
            return Err(ImageError::refused(
                "size",
                format!("{len} bytes is not a positive multiple of {SECTOR}"),
            ));
        }
        let capacity = len
            .checked_next_multiple_of(SECTOR)
            .filter(|capacity| i64::try_from(*capacity).is_ok())
            .ok_or_else(|| ImageError::refused("size", "the file's length overflows"))?;
        Ok(Self {
            file,
            capacity: AtomicU64::new(capacity),
            read_only,
        })
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        if self.read_only {
            return Err(ImageError::ReadOnly { corrupt: false });
        }
        check_range(offset, len, self.capacity())
    }
}

/// All of a range, in `file` if that can be had.
fn resolved(file: Option<BorrowedFd<'_>>, offset: u64, len: u64, way: Way) -> Resolved<'_> {
    let extent = |file| Extent {
        file,
        offset,
        len,
        way,
    };
    match file {
        Some(file) => Resolved::Mapped(extent(file), IoGuard::none()),
        None => Resolved::Elsewhere { len },
    }
}

impl Image for RawImage {
    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    /// A file is made longer. A block device has grown already, as whoever says so has seen: finding its
    /// size takes a system call that a confined process lacks.
    fn grow(&self, capacity: u64, _deadline: Option<Instant>) -> Result<(), ImageError> {
        if self.read_only {
            return Err(ImageError::ReadOnly { corrupt: false });
        }
        let now = self.capacity();
        if !capacity.is_multiple_of(SECTOR) || capacity < now || i64::try_from(capacity).is_err() {
            let reason = format!("{capacity} bytes is not a multiple of {SECTOR}, or less than now ({now})");
            return Err(ImageError::refused("size", reason));
        }
        self.file
            .grow_to(capacity)
            .map_err(ImageError::io("make the raw image longer"))?;
        self.capacity.store(capacity, Ordering::Release);
        Ok(())
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn can_discard(&self) -> bool {
        !self.read_only && self.file.makes_holes()
    }

    fn discard_granularity(&self) -> u64 {
        4096
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let to = Buffers::new(buffers);
        check_range(offset, to.len() as u64, self.capacity())?;
        self.file.read_buffers(to, offset)
    }

    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let from = Buffers::new(buffers);
        self.check_write(offset, from.len() as u64)?;
        self.file.write_buffers(from, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_write(offset, length)?;
        self.file.discard_range(offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.check_write(offset, length)?;
        if unmap {
            self.file.zero_range(offset, length)
        } else {
            self.file.zero_in_place(offset, length)
        }
    }

    fn resolve_read(&self, offset: u64, len: u64) -> io::Result<Resolved<'_>> {
        check_range(offset, len, self.capacity())?;
        let (len, is_hole) = self.file.hole_at(offset, len)?;
        if is_hole {
            return Ok(Resolved::Zero { len });
        }
        Ok(resolved(self.file.descriptor(), offset, len, self.file.way()))
    }

    fn resolve_write(&self, offset: u64, len: u64) -> io::Result<Resolved<'_>> {
        self.check_write(offset, len)?;
        let file = self.file.descriptor_to_write(offset, len);
        Ok(resolved(file, offset, len, self.file.way()))
    }

    fn describe(&self) -> String {
        format!(
            "raw, {} bytes{}",
            self.capacity(),
            if self.read_only { ", read-only" } else { "" }
        )
    }
}
