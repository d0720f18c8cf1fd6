//! What the tool writes to its standard output and error: comes by a pipe, so that a tool which an image has taken over
//! can neither steer the person's terminal nor read what is typed there.

use crate::tell::printable;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{pipe2, read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes that are passed on; the tool has a line to say at most.
const MOST: usize = 16 << 10;

/// Our end, and the line that is not whole yet.
pub(super) struct Words {
    /// Until nobody writes any more, or nobody would hear it.
    pipe: Option<OwnedFd>,
    line: Vec<u8>,
    left: usize,
}

impl Words {
    /// And the tool's end, which loses what finds no room: neither waits for the other.
    pub(super) fn pipe() -> nix::Result<(Self, OwnedFd)> {
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let words = Self {
            pipe: Some(ours),
            line: Vec::new(),
            left: MOST,
        };
        Ok((words, theirs))
    }

    /// Readable when there is something to [`Self::pass_on`].
    pub(super) fn readable(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Gives `tell` each line that is there, of which a terminal obeys nothing.
    pub(super) fn pass_on(&mut self, tell: &mut dyn FnMut(&str)) {
        let mut bytes = [0; 4096];
        while let Some(pipe) = &self.pipe {
            let room = bytes.len().min(self.left);
            match read(pipe, &mut bytes[..room]) {
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return,
                Ok(length @ 1..) => {
                    self.left -= length;
                    self.line.extend_from_slice(&bytes[..length]);
                }
                _ => {
                    self.pipe = None;
                    self.line.push(b'\n');
                }
            }
            while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.line.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line[..end]);
                if !line.is_empty() {
                    tell(&printable(&line));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::write;

    /// What is told of what is written.
    fn told(written: &[&[u8]]) -> Vec<String> {
        let (mut words, theirs) = Words::pipe().unwrap();
        let mut told = Vec::new();
        for part in written {
            write(&theirs, part).unwrap();
            words.pass_on(&mut |line| told.push(line.to_owned()));
        }
        drop(theirs);
        words.pass_on(&mut |line| told.push(line.to_owned()));
        assert!(words.readable().is_none(), "it is waited for although it is over");
        told
    }

    #[test]
    fn lines_come_whole_and_obey_nobody() {
        assert_eq!(
            told(&[b"a\x1b[2Jb\nha", b"lf\n\nrest\xff"]),
            ["a\\u{1b}[2Jb", "half", "rest\u{fffd}"]
        );
        assert_eq!(told(&[]), [""; 0]);
    }

    #[test]
    fn a_flood_is_cut_and_keeps_nobody() {
        let (mut words, theirs) = Words::pipe().unwrap();
        let flood = [[b'x'; 99].as_slice(), b"\n"].concat();
        let mut lines = 0;
        for _ in 0..MOST / 50 {
            // Lost when nobody reads any more.
            let _ = write(&theirs, &flood);
            words.pass_on(&mut |_| lines += 1);
        }
        assert_eq!((lines, words.readable().is_none()), (MOST / 100 + 1, true));
        assert_eq!(write(&theirs, b"x"), Err(Errno::EPIPE));
    }
}
