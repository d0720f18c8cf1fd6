//! Eventfds that a back end has, too: one open file, whose mode and counter it may change at any moment. So
//! nothing here trusts O_NONBLOCK to keep a thread from waiting.

#![expect(unsafe_code, reason = "preadv2 takes the counter's place by pointer")]

use super::error::Error;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// An eventfd that may be anybody's.
#[derive(Debug)]
pub struct SharedEvent(OwnedFd);

impl SharedEvent {
    /// A new one, whose mode is not to wait.
    ///
    /// # Errors
    /// [`Error::Resource`].
    pub fn new() -> Result<Self, Error> {
        EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map(|event| Self(event.into()))
            .map_err(|errno| Error::Resource {
                what: "an eventfd",
                source: errno.into(),
            })
    }

    /// Takes what it has counted; 0: nothing. Never waits, whatever the mode.
    pub fn take(&self) -> u64 {
        let mut count = 0_u64;
        let place = libc::iovec {
            iov_base: (&raw mut count).cast(),
            iov_len: size_of::<u64>(),
        };
        // By its number: the C library's call has no such position. -1 is the file's own.
        // SAFETY: one piece, valid for writing until the call returns; any eight bytes are a u64.
        let read = unsafe {
            libc::syscall(
                libc::SYS_preadv2,
                self.0.as_raw_fd(),
                &raw const place,
                1_usize,
                -1_i64,
                0_i64,
                libc::RWF_NOWAIT,
            )
        };
        // A failure, EAGAIN, has written nothing.
        if read == 8 { count } else { 0 }
    }

    /// Whether it has counted something, which stays there.
    #[must_use]
    pub fn is_signalled(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
    }

    /// Signals it. There is no write that never waits: the counter is emptied before, so that one at its maximum
    /// does not hold the caller up. While KVM has the eventfd as an irqfd nothing can, since KVM empties the
    /// counter within each write. Otherwise whoever lets writers wait and fills the counter between the two
    /// calls can: so it is for a device's own thread, not for those of vCPUs.
    pub fn signal(&self) {
        self.take();
        // EAGAIN: somebody has filled it, so there is a signal to see anyway.
        let _ = nix::unistd::write(self.as_fd(), &1_u64.to_ne_bytes());
    }
}

impl AsFd for SharedEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for SharedEvent {
    /// Takes an eventfd over.
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}
