//! A file to be booted: read by offset, straight into guest memory, never past its end.

use super::BootError;
use crate::memory::GuestRam;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// A kernel or initrd.
pub struct Image {
    file: File,
    name: &'static str,
    size: u64,
}

impl Image {
    /// Takes an open file; `name` is what errors call it.
    ///
    /// # Errors
    /// [`BootError::Read`] when it is no file with a size.
    pub fn new(fd: OwnedFd, name: &'static str) -> Result<Self, BootError> {
        let file = File::from(fd);
        let read = |source| BootError::Read { file: name, source };
        let metadata = file.metadata().map_err(read)?;
        if !metadata.is_file() {
            return Err(read(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            )));
        }
        Ok(Self {
            file,
            name,
            size: metadata.len(),
        })
    }

    /// Bytes in the file.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// [`BootError::Truncated`] and [`BootError::Read`].
    pub(super) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), BootError> {
        self.check(offset, buffer.len() as u64)?;
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|source| self.failed(source))
    }

    /// Copies `size` bytes from `offset` of the file to `address` in guest memory.
    ///
    /// # Errors
    /// [`BootError::Truncated`], [`BootError::Read`], [`BootError::Memory`].
    pub(super) fn load(&self, ram: &GuestRam, offset: u64, address: u64, size: u64) -> Result<(), BootError> {
        self.check(offset, size)?;
        // No MADV_POPULATE_WRITE first: measured, it zeroes what the copy overwrites and costs more
        // than the faults it saves.
        if !ram.is_used() {
            ram.place_huge_pages(address, size);
        }
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset))
            .map_err(|source| self.failed(source))?;
        let count = usize::try_from(size).map_err(|_| self.truncated(offset, u64::MAX))?;
        let mut done = 0;
        while done < count {
            let to = GuestAddress(address + done as u64);
            // One read(2), which takes 2 GiB less a page at most.
            match ram.memory().read_volatile_from(to, &mut file, count - done) {
                // The file has become shorter since it was opened.
                Ok(0) => {
                    return Err(BootError::Truncated {
                        file: self.name,
                        offset,
                        end: offset + size,
                        size: offset + done as u64,
                    });
                }
                Ok(read) => done += read,
                Err(GuestMemoryError::IOError(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(GuestMemoryError::IOError(error)) => return Err(self.failed(error)),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn check(&self, offset: u64, size: u64) -> Result<(), BootError> {
        match offset.checked_add(size) {
            Some(end) if end <= self.size => Ok(()),
            end => Err(self.truncated(offset, end.unwrap_or(u64::MAX))),
        }
    }

    fn truncated(&self, offset: u64, end: u64) -> BootError {
        BootError::Truncated {
            file: self.name,
            offset,
            end,
            size: self.size,
        }
    }

    fn failed(&self, source: io::Error) -> BootError {
        BootError::Read {
            file: self.name,
            source,
        }
    }
}
