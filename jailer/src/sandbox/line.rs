//! Last words of a process that must not allocate: in a signal handler, or without memory.
#![expect(
    unsafe_code,
    reason = "a call that every policy allows, and a handler may make"
)]

use std::fmt;

/// A line in place. What does not fit is cut.
pub(super) struct Line {
    text: [u8; 512],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            text: [0; 512],
            length: 0,
        }
    }
}

impl Line {
    /// Writes it to standard error, by one call.
    pub(super) fn tell(&self) {
        // SAFETY: write(2) may be called in a handler; the line is live and as long as said.
        unsafe { libc::write(libc::STDERR_FILENO, self.text.as_ptr().cast(), self.length) };
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let room = &mut self.text[self.length..];
        let count = room.len().min(part.len());
        room[..count].copy_from_slice(&part.as_bytes()[..count]);
        self.length += count;
        Ok(())
    }
}
