//! The console relay: bounded buffers between the vmm's stream socket, the person, and who else listens.

use super::audience::Audience;
use crate::escape::{Command, EscapeReader};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::unistd::{read, write};
use std::os::fd::{AsFd, OwnedFd};

/// Most bytes held for the person. When full, the vmm is not read: it drops, and counts.
const MOST_FOR_PERSON: usize = 64 << 10;
/// Most bytes held for the guest. When full, the person is not read.
const MOST_FOR_GUEST: usize = 4 << 10;
/// Bytes written to the person at once: what a pipe that polls writable takes without blocking.
const PIECE: usize = 4096;
/// Bytes that someone who comes to listen hears of what was said before.
const REMEMBERED: usize = 16 << 10;

/// Both directions of the console.
pub(super) struct Console {
    guest: Option<OwnedFd>,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    escape: Option<EscapeReader>,
    for_person: Vec<u8>,
    for_guest: Vec<u8>,
    /// That the output has no room was told.
    told: bool,
    /// Other commands of the VM's owner.
    pub(super) audience: Audience,
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
            told: false,
            audience: Audience::new(REMEMBERED),
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
        self.input.as_ref().filter(|_| self.has_room_for_guest())
    }

    fn has_room_for_guest(&self) -> bool {
        self.guest.is_some() && self.for_guest.len() < MOST_FOR_GUEST
    }

    /// Who else listens, and may type.
    pub(super) fn listeners(&self) -> impl Iterator<Item = (&OwnedFd, PollFlags)> {
        self.audience.sources(self.has_room_for_guest())
    }

    /// Serves those for which a poll found something.
    pub(super) fn serve_listeners(&mut self, found: &[PollFlags]) {
        let typed = self.has_room_for_guest().then_some(&mut self.for_guest);
        self.audience.serve(found, typed);
    }

    /// The person's output, where bytes wait for it.
    pub(super) fn output(&self) -> Option<&OwnedFd> {
        self.output.as_ref().filter(|_| !self.for_person.is_empty())
    }

    /// Whether all that the guest wrote has been passed on.
    pub(super) fn drained(&mut self) -> bool {
        self.guest.is_none() && self.for_person.is_empty() && self.audience.drained()
    }

    /// Takes what the guest wrote.
    pub(super) fn read_guest(&mut self) {
        let Some(guest) = &self.guest else { return };
        let mut bytes = [0; PIECE];
        match read(guest, &mut bytes) {
            Ok(0) => self.guest = None,
            Ok(n) => {
                self.audience.hear(&bytes[..n]);
                if self.output.is_some() {
                    self.for_person.extend_from_slice(&bytes[..n]);
                }
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => self.guest = None,
        }
    }

    /// Gives the guest what the person typed.
    pub(super) fn write_guest(&mut self) {
        let Some(guest) = &self.guest else { return };
        if advance(guest, &mut self.for_guest, PIECE).is_err() {
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

    /// Gives the person what the guest wrote. A file without room, which there may be again, loses it: why is returned,
    /// the first time.
    pub(super) fn write_output(&mut self) -> Option<Errno> {
        let output = self.output.as_ref()?;
        match advance(output, &mut self.for_person, PIECE) {
            Ok(()) => None,
            Err(why @ (Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG)) => {
                let lost = self.for_person.len().min(PIECE);
                self.for_person.drain(..lost);
                (!std::mem::replace(&mut self.told, true)).then_some(why)
            }
            Err(_) => {
                self.output = None;
                self.for_person.clear();
                None
            }
        }
    }
}

/// Writes the front of `bytes`.
fn advance(fd: &impl AsFd, bytes: &mut Vec<u8>, most: usize) -> nix::Result<()> {
    match write(fd, &bytes[..bytes.len().min(most)]) {
        Ok(n) => {
            bytes.drain(..n);
            Ok(())
        }
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
        Err(why) => Err(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use nix::unistd::{dup2, pipe};
    use std::fs::File;

    #[test]
    fn a_file_without_room_loses_what_does_not_fit_and_takes_what_comes_later() {
        let (guest, vmm) =
            socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty()).unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut console = Console::new(guest, None, Some(full.into()), false);
        let says = |console: &mut Console, text: &[u8]| {
            write(&vmm, text).unwrap();
            console.read_guest();
            console.write_output()
        };
        assert_eq!(says(&mut console, b"lost"), Some(Errno::ENOSPC));
        assert_eq!(says(&mut console, b"lost too"), None, "it is told once");
        assert!(console.output().is_none(), "nothing waits");
        let (reader, writer) = pipe().unwrap();
        dup2(&writer, console.output.as_mut().unwrap()).unwrap();
        assert_eq!(says(&mut console, b"kept"), None);
        let mut bytes = [0; 16];
        let count = read(&reader, &mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"kept");
        // One whose reader is gone has no more to come.
        drop(reader);
        assert_eq!(says(&mut console, b"unheard"), None);
        assert!(console.output.is_none());
    }
}
