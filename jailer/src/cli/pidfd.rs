//! A process, held so that no later one with its number is taken for it.
#![expect(unsafe_code, reason = "pidfd_open and pidfd_send_signal have no safe form")]

use nix::sys::signal::Signal;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Readable once the process has ended.
pub(super) struct PidFd(OwnedFd);

impl PidFd {
    /// The process that has the number `pid` now.
    pub(super) fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: two numbers; touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, and nobody else owns it. Descriptors are ints.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
    }

    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        let (fd, number) = (self.0.as_raw_fd(), signal as i32);
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: without a siginfo the kernel fills in what kill(2) would.
        let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, number, none, 0) };
        match sent {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, poll};
    use std::process::Command;

    #[test]
    fn a_process_ends_by_the_signal_and_is_no_other_afterwards() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = PidFd::open(child.id().cast_signed()).unwrap();
        process.signal(Signal::SIGTERM).unwrap();
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, 10_000u16), Ok(1));
        child.wait().unwrap();
        assert_eq!(
            process.signal(Signal::SIGTERM).unwrap_err().raw_os_error(),
            Some(libc::ESRCH)
        );
    }
}
