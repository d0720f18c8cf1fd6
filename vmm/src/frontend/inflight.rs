//! The in-flight region: the back end's note of requests taken and not yet completed. The vmm
//! keeps it for the back end's successor and zeroes it when the driver resets the device. It is
//! never mapped or read here, so that nothing in it can hurt.

use super::error::Error;
use super::message::Inflight;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::stat::fstat;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Longest region taken. The largest device (256 queues of 1024 entries, 16 bytes each) needs
/// 4 MiB; without this bound a back end could make the vmm hold and zero any amount of memory.
const MAX_SIZE: u64 = 16 << 20;

/// A region that was accepted.
#[derive(Debug)]
pub struct InflightRegion {
    fd: OwnedFd,
    offset: u64,
    size: u64,
    num_queues: u16,
    queue_size: u16,
}

impl InflightRegion {
    /// Judges what GET_INFLIGHT_FD gave. Only a memfd is accepted: its system calls do not block
    /// on anything that the back end controls. It must be as long as it says, writable, and (in
    /// `sealed`) unable to shrink. It is zeroed, which proves that a later reset can do it.
    pub(super) fn accept(
        fd: OwnedFd,
        message: Inflight,
        wanted: Inflight,
        sealed: bool,
    ) -> Result<Self, Error> {
        let (offset, size) = (message.mmap_offset, message.mmap_size);
        let end = offset
            .checked_add(size)
            .ok_or(Error::Inflight("its end overflows"))?;
        if size == 0 || end > MAX_SIZE {
            return Err(Error::Inflight("its size is zero or more than 16 MiB"));
        }
        let seals = fcntl(fd.as_fd(), FcntlArg::F_GET_SEALS)
            .map(SealFlag::from_bits_retain)
            .map_err(|_| Error::Inflight("it is not a memfd"))?;
        if seals.intersects(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_FUTURE_WRITE) {
            return Err(Error::Inflight("it is sealed against writing"));
        }
        if !seals.contains(SealFlag::F_SEAL_SHRINK) {
            if sealed {
                return Err(Error::Inflight("it is not sealed against shrinking"));
            }
            tracing::warn!("in-flight region is not sealed against shrinking");
        }
        let length = fstat(fd.as_fd())
            .map_err(|errno| Error::InflightIo(errno.into()))?
            .st_size;
        if u64::try_from(length).is_ok_and(|length| length < end) {
            return Err(Error::Inflight("its file is shorter than it says"));
        }
        let region = Self {
            fd,
            offset,
            size,
            num_queues: wanted.num_queues,
            queue_size: wanted.queue_size,
        };
        region.zero()?;
        Ok(region)
    }

    /// Forgets all requests: the driver has reset the device.
    ///
    /// # Errors
    /// [`Error::InflightIo`].
    pub fn zero(&self) -> Result<(), Error> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // Both were bounded by MAX_SIZE when the region was accepted.
        fallocate(self.fd.as_fd(), flags, self.offset as i64, self.size as i64)
            .map_err(|errno| Error::InflightIo(errno.into()))
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn description(&self) -> Inflight {
        Inflight {
            mmap_size: self.size,
            mmap_offset: self.offset,
            num_queues: self.num_queues,
            queue_size: self.queue_size,
            padding: [0; 4],
        }
    }
}
