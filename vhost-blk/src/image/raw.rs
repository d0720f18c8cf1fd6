//! The raw format: byte N of the file is byte N of the disk.

use super::Image;
use crate::io::{read_exact_at, write_all_at};
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use vm_memory::VolatileSlice;

/// A raw image file.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    capacity: u64,
    read_only: bool,
}

impl RawImage {
    /// Takes a file or block device as a disk. A file whose size is no multiple of 512 is refused:
    /// its last bytes could be neither kept nor shown.
    ///
    /// # Errors
    /// When the size cannot be found, is 0, or is no multiple of 512.
    pub fn open(fd: OwnedFd, read_only: bool) -> io::Result<Self> {
        use std::io::{Seek, SeekFrom};
        let mut file = File::from(fd);
        // Works for block devices too, whose metadata says 0.
        let capacity = file.seek(SeekFrom::End(0))?;
        if capacity == 0 || !capacity.is_multiple_of(512) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("size of {capacity} bytes is not a positive multiple of 512"),
            ));
        }
        Ok(Self {
            file,
            capacity,
            read_only,
        })
    }

    fn range(offset: u64, length: u64) -> io::Result<(i64, i64)> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        Ok((
            offset.try_into().map_err(invalid)?,
            length.try_into().map_err(invalid)?,
        ))
    }
}

impl Image for RawImage {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn can_discard(&self) -> bool {
        !self.read_only
    }

    fn discard_granularity(&self) -> u64 {
        4096
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        read_exact_at(self.file.as_fd(), buffers, offset)
    }

    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        write_all_at(self.file.as_fd(), buffers, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let (offset, length) = Self::range(offset, length)?;
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.file, punch, offset, length) {
            // A discard is advice: a host that cannot follow it keeps the data.
            Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let (start, count) = Self::range(offset, length)?;
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let mode = if unmap {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        } else {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        };
        match fallocate(&self.file, mode | keep, start, count) {
            Ok(()) => Ok(()),
            Err(nix::errno::Errno::EOPNOTSUPP) => self.write_plain_zeroes(offset, length),
            Err(error) => Err(error.into()),
        }
    }
}

impl RawImage {
    /// For file systems that have no such operation (tmpfs knows no ZERO_RANGE).
    fn write_plain_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let mut done = 0;
        while done < length {
            let step = (length - done).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..step as usize], offset + done)?;
            done += step;
        }
        Ok(())
    }
}
