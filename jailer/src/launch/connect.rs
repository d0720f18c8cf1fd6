//! Connecting to who may not let us in.

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

/// Connects, and waits up to `limit` for a place among those that the listener has not accepted yet.
///
/// # Errors
/// `TimedOut` without one; else the system's.
pub(crate) fn connect_within(kind: SockType, address: &UnixAddr, limit: Duration) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    let send_limit = |limit: Duration| {
        let limit = TimeVal::milliseconds(i64::try_from(limit.as_millis()).unwrap_or(i64::MAX));
        setsockopt(&fd, sockopt::SendTimeout, &limit)
    };
    // It bounds connecting too.
    send_limit(limit)?;
    match connect(fd.as_raw_fd(), address) {
        Err(Errno::EAGAIN) => {
            let why = format!("it has let nobody in within {limit:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        connected => connected?,
    }
    send_limit(Duration::ZERO)?;
    Ok(fd)
}
