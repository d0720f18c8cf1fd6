//! Whether the host lost what a disk's process wrote, as its successor must know.
//!
//! Linux tells of a failed write-back once through each open file description (fsync(2)), and a successor works
//! on its predecessor's. Whoever was told before it died may have told nobody: neither supervisor nor guest.
//! Another description of the same file, through which nothing is flushed, is told once more.
#![expect(unsafe_code, reason = "sync_file_range, which nix does not offer")]

use nix::errno::Errno;
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// An open file description that nobody else uses, of a file that is written through another.
#[derive(Debug)]
pub(crate) struct Watch {
    file: File,
    /// Stays: the kernel tells it once.
    lost: Cell<bool>,
}

impl Watch {
    /// Of `file`; what fails from now on is seen.
    pub(crate) fn begin(file: &OwnedFd) -> io::Result<Self> {
        // By the open descriptor, not by its path, which may lead elsewhere by now.
        let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        Ok(Self::of(file.into()))
    }

    /// By what [`Watch::begin`] opened elsewhere.
    pub(crate) fn of(file: OwnedFd) -> Self {
        Self {
            file: file.into(),
            lost: Cell::new(false),
        }
    }

    /// The descriptor, for another process.
    pub(crate) fn into_descriptor(self) -> OwnedFd {
        self.file.into()
    }

    /// Whether a write-back of the file has failed. Begins none, and waits for none: the kernel waits for that
    /// of a range before it tells, and no disk reaches as far as this one.
    pub(crate) fn has_lost(&self) -> bool {
        let (first, length) = (1 << 62, 1);
        // SAFETY: a descriptor that is ours, and no pointers.
        let rc = unsafe {
            libc::sync_file_range(
                self.file.as_raw_fd(),
                first,
                length,
                libc::SYNC_FILE_RANGE_WAIT_BEFORE,
            )
        };
        let told =
            Errno::result(rc).is_err_and(|errno| matches!(errno, Errno::EIO | Errno::ENOSPC | Errno::EDQUOT));
        self.lost.set(self.lost.get() || told);
        self.lost.get()
    }

    /// Its descriptor's number.
    pub(crate) fn number(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
