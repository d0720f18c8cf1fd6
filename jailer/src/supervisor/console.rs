//! The console relay: bounded buffers between the vmm's stream socket and the person.

use nix::errno::Errno;
use nix::unistd::{read, write};
use std::os::fd::{AsFd, OwnedFd};

/// Most bytes held for the person. When full, the vmm is not read: it drops, and counts.
const MOST_FOR_PERSON: usize = 64 << 10;
/// Most bytes held for the guest. When full, the person is not read.
const MOST_FOR_GUEST: usize = 4 << 10;
/// Bytes written to the person at once: what a pipe that polls writable takes without blocking.
const PIECE: usize = 4096;
/// Ctrl-A, which starts a command.
const ESCAPE: u8 = 1;

/// What the person asked for with Ctrl-A.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Command {
    /// Ctrl-A x.
    Quit,
}

/// Both directions of the console.
pub(super) struct Console {
    guest: Option<OwnedFd>,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    escape: Option<EscapeReader>,
    for_person: Vec<u8>,
    for_guest: Vec<u8>,
}

impl Console {
    pub(super) fn new(guest: OwnedFd, input: Option<OwnedFd>, output: Option<OwnedFd>, escape: bool) -> Self {
        Self {
            guest: Some(guest),
            input,
            output,
            escape: escape.then(EscapeReader::default),
            for_person: Vec::new(),
            for_guest: Vec::new(),
        }
    }

    /// The vmm's socket, where it is to be read.
    pub(super) fn guest_readable(&self) -> Option<&OwnedFd> {
        self.guest
            .as_ref()
            .filter(|_| self.for_person.len() < MOST_FOR_PERSON)
    }

    /// The vmm's socket, where bytes wait for it.
    pub(super) fn guest_writable(&self) -> Option<&OwnedFd> {
        self.guest.as_ref().filter(|_| !self.for_guest.is_empty())
    }

    /// The person's input, where it is to be read.
    pub(super) fn input(&self) -> Option<&OwnedFd> {
        self.input
            .as_ref()
            .filter(|_| self.guest.is_some() && self.for_guest.len() < MOST_FOR_GUEST)
    }

    /// The person's output, where bytes wait for it.
    pub(super) fn output(&self) -> Option<&OwnedFd> {
        self.output.as_ref().filter(|_| !self.for_person.is_empty())
    }

    /// Whether all that the guest wrote has been passed on.
    pub(super) fn drained(&self) -> bool {
        self.guest.is_none() && self.for_person.is_empty()
    }

    /// Takes what the guest wrote.
    pub(super) fn read_guest(&mut self) {
        let Some(guest) = &self.guest else { return };
        let mut bytes = [0; PIECE];
        match read(guest, &mut bytes) {
            Ok(0) => self.guest = None,
            Ok(n) if self.output.is_some() => self.for_person.extend_from_slice(&bytes[..n]),
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => self.guest = None,
        }
    }

    /// Gives the guest what the person typed.
    pub(super) fn write_guest(&mut self) {
        let Some(guest) = &self.guest else { return };
        if !advance(guest, &mut self.for_guest, PIECE) {
            self.for_guest.clear();
        }
    }

    /// Takes what the person typed, and the command in it.
    pub(super) fn read_input(&mut self) -> Option<Command> {
        let input = self.input.as_ref()?;
        let mut bytes = [0; 256];
        match read(input, &mut bytes) {
            Ok(n) if n > 0 => match &mut self.escape {
                Some(escape) => escape.pass(&bytes[..n], &mut self.for_guest),
                None => {
                    self.for_guest.extend_from_slice(&bytes[..n]);
                    None
                }
            },
            Err(Errno::EAGAIN | Errno::EINTR) => None,
            // The end of input (a closed stdin, a terminal that hung up) ends nothing else.
            _ => {
                self.input = None;
                None
            }
        }
    }

    /// Gives the person what the guest wrote.
    pub(super) fn write_output(&mut self) {
        let Some(output) = &self.output else { return };
        if !advance(output, &mut self.for_person, PIECE) {
            self.output = None;
            self.for_person.clear();
        }
    }
}

/// Writes the front of `bytes`; false when the other end is gone.
fn advance(fd: &impl AsFd, bytes: &mut Vec<u8>, most: usize) -> bool {
    match write(fd, &bytes[..bytes.len().min(most)]) {
        Ok(n) => {
            bytes.drain(..n);
            true
        }
        Err(Errno::EAGAIN | Errno::EINTR) => true,
        Err(_) => false,
    }
}

/// Finds Ctrl-A commands in what is typed.
#[derive(Default)]
struct EscapeReader {
    escaped: bool,
}

impl EscapeReader {
    /// Passes on all but commands. Ctrl-A Ctrl-A is one Ctrl-A.
    fn pass(&mut self, typed: &[u8], out: &mut Vec<u8>) -> Option<Command> {
        for &byte in typed {
            match (std::mem::take(&mut self.escaped), byte) {
                (true, b'x' | b'X') => return Some(Command::Quit),
                (true, ESCAPE) => out.push(ESCAPE),
                (false, ESCAPE) => self.escaped = true,
                (true, other) => out.extend([ESCAPE, other]),
                (false, other) => out.push(other),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_quits_across_reads_and_ctrl_a_twice_is_one() {
        let mut reader = EscapeReader::default();
        let mut out = Vec::new();
        assert_eq!(reader.pass(b"ls\x01", &mut out), None);
        assert_eq!(reader.pass(b"\x01x", &mut out), None);
        assert_eq!(out, b"ls\x01x");
        assert_eq!(reader.pass(b"\x01", &mut out), None);
        assert_eq!(reader.pass(b"x", &mut out), Some(Command::Quit));
        assert_eq!(out, b"ls\x01x");
    }

    #[test]
    fn another_key_after_ctrl_a_passes_with_it() {
        let mut out = Vec::new();
        assert_eq!(EscapeReader::default().pass(b"\x01c", &mut out), None);
        assert_eq!(out, b"\x01c");
    }
}
