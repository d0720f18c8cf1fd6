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
        self.is(PollFlags::POLLIN)
    }

    /// Adds one to what it has counted. It takes nothing out: a back end that was told of a count and finds none may
    /// give its ring up (those built on the crate `vhost-user-backend` do).
    ///
    /// A counter that is full stays as it is, for there is a signal to see anyway, and a write could wait. While KVM
    /// has the eventfd as an irqfd none can, since KVM empties the counter within each write. Otherwise whoever lets
    /// writers wait and fills the counter between the look and the write can make it: so it is for a device's own
    /// thread, not for those of vCPUs.
    pub fn signal(&self) {
        if self.is(PollFlags::POLLOUT) {
            // EAGAIN: somebody has filled it since.
            let _ = nix::unistd::write(self.as_fd(), &1_u64.to_ne_bytes());
        }
    }

    fn is(&self, ready: PollFlags) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), ready)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
            && fds[0].revents().is_some_and(|found| found.contains(ready))
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    #[test]
    fn a_signal_takes_nothing_that_somebody_was_told_of() {
        let event = SharedEvent::new().unwrap();
        event.signal();
        event.signal();
        assert_eq!(event.take(), 2);
    }

    #[test]
    fn a_full_counter_holds_nobody_up() {
        let event = SharedEvent::new().unwrap();
        fcntl(event.as_fd(), FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        nix::unistd::write(event.as_fd(), &(u64::MAX - 1).to_ne_bytes()).unwrap();
        // A write would wait for ever.
        event.signal();
        assert_eq!(event.take(), u64::MAX - 1);
        assert_eq!(event.take(), 0);
    }
}
