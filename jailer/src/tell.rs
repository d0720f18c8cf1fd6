//! Words on standard error. Its reader may have left, or may not read: neither is an error, and no process that
//! others depend on waits for it.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;
use std::fmt;
use std::io::{Cursor, Write as _, stderr};
use std::os::fd::AsFd;

/// Longest line in bytes (PIPE_BUF): a pipe that polls writable takes it without waiting.
pub(crate) const MOST_AT_ONCE: usize = 4096;
/// How long a terminal that takes nothing keeps a command from its end, in milliseconds.
const PATIENCE_MS: u16 = 5000;

/// Writes one line if standard error takes it now; else it is lost, as is what exceeds `MOST_AT_ONCE`.
/// Allocates nothing.
pub fn tell(line: fmt::Arguments<'_>) {
    let mut buffer = [b'\n'; MOST_AT_ONCE];
    let mut text = Cursor::new(&mut buffer[..MOST_AT_ONCE - 1]);
    // What does not fit is cut off.
    let _ = text.write_fmt(line);
    let end = usize::try_from(text.position()).unwrap_or(0);
    buffer[end] = b'\n';
    // A line that nobody takes is lost.
    let _ = tell_bytes(&buffer[..=end]);
}

/// As [`tell`], at most [`MOST_AT_ONCE`] bytes with the line's end; false: it is lost.
pub(crate) fn tell_bytes(line: &[u8]) -> bool {
    let stderr = stderr();
    writable(&stderr, PollTimeout::ZERO) && write(&stderr, line).is_ok()
}

/// A command's own words to whoever typed it, who may be slow to read them.
pub fn say(line: fmt::Arguments<'_>) {
    let text = format!("{line}\n");
    let mut rest = text.as_bytes();
    let stderr = stderr();
    while !rest.is_empty() {
        match write(&stderr, rest) {
            Ok(0) => return,
            Ok(written) => rest = &rest[written..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if writable(&stderr, PATIENCE_MS.into()) => {}
            Err(_) => return,
        }
    }
}

fn writable(fd: &impl AsFd, timeout: PollTimeout) -> bool {
    let mut ready = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    poll(&mut ready, timeout) == Ok(1)
}
