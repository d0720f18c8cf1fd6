//! Frames through io_uring, a batch in one call, beside the floor's call a frame: is there something to
//! win? Bare loops both, with nothing between them and the TAP.
#![expect(unsafe_code, reason = "the kernel fills and reads buffers that requests name")]

use super::net_host::BATCH;
use anyhow::{Context, Result, ensure};
use io_uring::{IoUring, opcode, squeue, types};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

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

    /// Sends every buffer in one call; how many the kernel took.
    pub(super) fn write(&mut self, tap: &File) -> Result<usize> {
        let fd = types::Fd(tap.as_raw_fd());
        let entry =
            |buffer: &mut Vec<u8>| opcode::Write::new(fd, buffer.as_ptr(), buffer.len() as u32).build();
        self.batch(entry)
    }

    /// Reads up to a batch in one call, after a wait if there is nothing.
    pub(super) fn read(&mut self, tap: &File) -> Result<usize> {
        let fd = types::Fd(tap.as_raw_fd());
        let entry =
            |buffer: &mut Vec<u8>| opcode::Read::new(fd, buffer.as_mut_ptr(), buffer.len() as u32).build();
        match self.batch(entry)? {
            0 => {
                let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::from(50u16))?;
                self.batch(entry)
            }
            count => Ok(count),
        }
    }

    fn batch(&mut self, entry: impl Fn(&mut Vec<u8>) -> squeue::Entry) -> Result<usize> {
        for buffer in &mut self.buffers {
            // SAFETY: every request is complete before this function returns, and the buffers are
            // touched by nobody else meanwhile.
            unsafe { self.ring.submission().push(&entry(buffer)) }?;
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
