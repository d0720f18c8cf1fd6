//! How the process ends: by SIGTERM (and SIGINT) in order, by SIGBUS, which a front end causes that
//! truncates the memory it shares, by a panic, and when it is done. A file that may grow no further
//! (RLIMIT_FSIZE) does not end it: that is an error of the write.
//!
//! Whatever the reason, one call to the kernel does it: a thread that ends by itself, or an abort,
//! takes several that the policy would have to allow.
#![expect(unsafe_code, reason = "installs a signal handler")]

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// Readable when the process is asked to end.
#[derive(Debug)]
pub(crate) struct Termination(SignalFd);

impl Termination {
    /// Blocks the signals in this thread and those it makes: call it before any thread exists. Until then they end
    /// the process.
    pub(crate) fn new() -> io::Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGTERM);
        signals.add(Signal::SIGINT);
        signals.thread_block()?;
        let fd = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self(fd))
    }

    /// Takes the signal off the fd.
    pub(crate) fn acknowledge(&self) {
        // Only the fact counts, and poll told it.
        let _ = self.0.read_signal();
    }
}

impl AsFd for Termination {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Keeps a file that may grow no further from ending this thread and those it makes: nobody takes the signal, and
/// the call says EFBIG as well.
pub(crate) fn outlive_file_limits() -> io::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGXFSZ);
    Ok(signals.thread_block()?)
}

/// Exit code after a SIGBUS: 128 and the signal's number.
const SIGBUS_EXIT: libc::c_int = 128 + libc::SIGBUS;

/// Makes an access to memory that its owner truncated end the process with one line, and nothing
/// else: no core file of guest memory, no half-done request reported as done.
pub(crate) fn end_on_sigbus() -> io::Result<()> {
    extern "C" fn end(_signal: libc::c_int) {
        const LINE: &[u8] = b"guest memory was truncated by its owner; ending\n";
        // SAFETY: write(2) may be called in a signal handler; the buffer is static.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, LINE.as_ptr().cast(), LINE.len()) };
        // SAFETY: _exit(2) may be called in a signal handler and runs no code of ours.
        unsafe { libc::_exit(SIGBUS_EXIT) }
    }
    let action = SigAction::new(SigHandler::Handler(end), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler calls only functions that are allowed in one.
    unsafe { sigaction(Signal::SIGBUS, &action) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_may_grow_no_further_does_not_end_the_process() {
        outlive_file_limits().unwrap();
        // Sent to this thread, as the kernel does it.
        nix::sys::signal::raise(Signal::SIGXFSZ).unwrap();
    }
}
