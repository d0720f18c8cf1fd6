//! Frames through io_uring, a batch in one call, beside the floor's call a frame: is there something to
//! win? Bare loops both, with nothing between them and the TAP.
#![expect(unsafe_code, reason = "the kernel reads buffers that requests name")]

use super::net_host::BATCH;
use anyhow::{Context, Result, ensure};
use io_uring::{IoUring, opcode, types};
use nix::errno::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;

/// A ring, and buffers that live as long as it does.
pub(super) struct Frames {
    ring: IoUring,
    buffers: Vec<Vec<u8>>,
}

impl Frames {
    /// [`BATCH`] buffers that hold `bytes`.
    pub(super) fn new(bytes: &[u8]) -> Result<Self> {
        Ok(Self {
            ring: IoUring::new(BATCH as u32).context("io_uring")?,
            buffers: vec![bytes.to_vec(); BATCH],
        })
    }

    /// Sends every buffer in one call; how many the kernel took. Not for receiving: there a request waits
    /// for its frame, so that a batch does not end with what the queue has.
    pub(super) fn write(&mut self, tap: &File) -> Result<usize> {
        let fd = types::Fd(tap.as_raw_fd());
        for buffer in &self.buffers {
            let entry = opcode::Write::new(fd, buffer.as_ptr(), buffer.len() as u32).build();
            // SAFETY: every request is complete before this function returns, and the buffers stay
            // as they are meanwhile.
            unsafe { self.ring.submission().push(&entry) }?;
        }
        self.ring.submit_and_wait(self.buffers.len())?;
        let (mut done, mut count) = (0, 0);
        for completion in self.ring.completion() {
            done += 1;
            match completion.result() {
                0.. => count += 1,
                error if error == -(Errno::EAGAIN as i32) => {}
                error => return Err(Errno::from_raw(-error)).context("a frame through io_uring"),
            }
        }
        ensure!(done == self.buffers.len(), "{done} completions");
        Ok(count)
    }
}
