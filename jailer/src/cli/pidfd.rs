//! A process, held so that no later one with its number is taken for it.
#![expect(unsafe_code, reason = "pidfd_open and pidfd_send_signal have no safe form")]

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
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

/// Waits until one of `processes` has ended or `other` can be read; those that have ended are taken out.
pub(super) fn wait_for_one(
    processes: &mut Vec<PidFd>,
    other: BorrowedFd<'_>,
    timeout: PollTimeout,
) -> io::Result<()> {
    let all = processes.iter().map(AsFd::as_fd).chain([other]);
    let mut ready: Vec<_> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    match poll(&mut ready, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(e) => return Err(e.into()),
    }
    let ended: Vec<_> = ready.iter().map(|fd| fd.any().unwrap_or(false)).collect();
    let mut ended = ended.into_iter();
    processes.retain(|_| !ended.next().unwrap_or(false));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
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
