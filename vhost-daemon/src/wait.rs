//! The one call that waits. It is `ppoll`: after a stop of the process the kernel makes it again as it
//! was made, where `poll` goes on by `restart_syscall`, a call more for the policy.

use nix::errno::Errno;
use nix::poll::{PollFd, ppoll};
use nix::sys::time::TimeSpec;
use std::io;
use std::time::Duration;

/// Waits until one of `fds` is ready or `limit` has passed; without a limit, for ever. A signal ends the
/// wait too: then none is ready.
pub(crate) fn wait(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> io::Result<()> {
    match ppoll(fds, limit.map(TimeSpec::from_duration), None) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether a wait found anything on `fd`.
pub(crate) fn is_ready(fd: &PollFd<'_>) -> bool {
    fd.any().unwrap_or(false)
}
