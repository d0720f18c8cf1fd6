//! Carries frames between a TAP and passt's stream, in which each follows its length (4 bytes, in
//! network order). It looks at lengths only.

use super::line;
use crate::sandbox::{Locked, end};
use crate::tell::tell;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use nix::sys::uio::readv;
use nix::unistd::write;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// The virtio-net header that a TAP puts before a frame (`TUNSETVNETHDRSZ`'s default).
const HEADER: usize = 10;
/// Bytes of a length.
const LENGTH: usize = 4;
/// The longest frame that a guest sends: an IP packet behind an Ethernet header with a tag.
const LONGEST: usize = 65535 + 18;
/// What passt takes: it would end the connection over another.
const TAKEN: std::ops::RangeInclusive<usize> = 14..=65535;
/// Bytes on their way in one direction.
const BUFFER: usize = 4 * (LENGTH + LONGEST);
/// A passt that is gone is an error, and no signal.
const SEND: MsgFlags = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_NOSIGNAL);

/// Why passt is of no use any more. (To word an `io::Error` takes memory.)
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("it closed its socket")]
    Closed,
    #[error("a frame that is too long")]
    TooLong,
    #[error("{0}")]
    Call(#[from] Errno),
}

/// A relay with all the memory that it will need.
pub(super) struct Relay<'a> {
    tap: &'a OwnedFd,
    stream: OwnedFd,
    /// Where another passt comes from.
    line: Option<OwnedFd>,
    outgoing: Outgoing,
    incoming: Incoming,
    /// passt is there.
    alive: bool,
}

impl<'a> Relay<'a> {
    pub(super) fn new(tap: &'a OwnedFd, stream: OwnedFd, line: Option<OwnedFd>) -> Self {
        Self {
            tap,
            stream,
            line,
            outgoing: Outgoing::new(),
            incoming: Incoming::new(),
            alive: true,
        }
    }

    /// Relays until `lifeline` is closed, and ends the process. A passt that is gone leaves the guest
    /// without a network until there is another. `None`: the person wants no jails.
    pub(super) fn run(mut self, lifeline: &OwnedFd, _: Option<&Locked>) -> ! {
        while self.wait(lifeline) {
            if !self.alive {
                self.take_another();
            } else if let Err(error) = self.turn() {
                self.lose(&error);
            }
        }
        end(0)
    }

    fn lose(&mut self, error: &Lost) {
        tell(format_args!(
            "bulkhead: passt is gone, the guest's network with it: {error}"
        ));
        self.alive = false;
        self.line.take_if(|line| line::say(line).is_err());
    }

    /// Goes on with another passt, with the next whole frame either way.
    fn take_another(&mut self) {
        let Some(line) = &self.line else { return };
        match line::take(line) {
            Ok(Some(stream)) => {
                self.stream = stream;
                self.outgoing.clear();
                self.incoming.clear();
                self.alive = true;
            }
            Ok(None) => {}
            Err(_) => self.line = None,
        }
    }

    /// Waits for a cause; false when the launcher is gone.
    fn wait(&self, lifeline: &OwnedFd) -> bool {
        let mut tap = PollFlags::empty();
        let mut stream = PollFlags::empty();
        tap.set(PollFlags::POLLIN, self.outgoing.is_empty());
        stream.set(PollFlags::POLLOUT, !self.outgoing.is_empty());
        stream.set(PollFlags::POLLIN, !self.incoming.has_frame());
        tap.set(PollFlags::POLLOUT, self.incoming.has_frame());
        let lifeline = PollFd::new(lifeline.as_fd(), PollFlags::POLLIN);
        let (mut fds, count) = match (&self.line, self.alive) {
            (_, true) => {
                let (tap, stream) = (
                    PollFd::new(self.tap.as_fd(), tap),
                    PollFd::new(self.stream.as_fd(), stream),
                );
                ([lifeline, tap, stream], 3)
            }
            (Some(line), false) => {
                let line = PollFd::new(line.as_fd(), PollFlags::POLLIN);
                ([lifeline, line.clone(), line], 2)
            }
            (None, false) => ([lifeline.clone(), lifeline.clone(), lifeline], 1),
        };
        match poll(&mut fds[..count], PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => !fds.first().is_some_and(|fd| fd.any().unwrap_or(false)),
            Err(_) => false,
        }
    }

    fn turn(&mut self) -> Result<(), Lost> {
        self.outgoing.fill(self.tap)?;
        self.outgoing.empty_into(&self.stream)?;
        self.incoming.fill(&self.stream)?;
        self.incoming.empty_into(self.tap)
    }
}

/// Frames from the TAP, with their lengths.
struct Outgoing {
    bytes: Vec<u8>,
    /// The stream has taken this many.
    sent: usize,
    end: usize,
}

impl Outgoing {
    fn new() -> Self {
        Self {
            bytes: vec![0; BUFFER],
            sent: 0,
            end: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.sent == self.end
    }

    fn clear(&mut self) {
        (self.sent, self.end) = (0, 0);
    }

    /// Reads frames while there is room, if everything before them is gone.
    fn fill(&mut self, tap: &OwnedFd) -> Result<(), Lost> {
        if !self.is_empty() {
            return Ok(());
        }
        self.clear();
        let mut header = [0; HEADER];
        while BUFFER - self.end >= LENGTH + LONGEST {
            let (length, frame) = self.bytes[self.end..].split_at_mut(LENGTH);
            let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(frame)];
            let Some(count) = quiet(readv(tap, &mut parts))? else {
                break;
            };
            let count = count.saturating_sub(HEADER);
            if !TAKEN.contains(&count) {
                continue;
            }
            length.copy_from_slice(&(count as u32).to_be_bytes());
            self.end += LENGTH + count;
        }
        Ok(())
    }

    fn empty_into(&mut self, stream: &OwnedFd) -> Result<(), Lost> {
        let fd = stream.as_raw_fd();
        while !self.is_empty() {
            match quiet(send(fd, &self.bytes[self.sent..self.end], SEND))? {
                Some(count) => self.sent += count,
                None => break,
            }
        }
        Ok(())
    }
}

/// What came over the stream, in whatever pieces.
struct Incoming {
    /// Room for a TAP's header lies before the first byte.
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Incoming {
    fn new() -> Self {
        Self {
            bytes: vec![0; HEADER + BUFFER],
            start: HEADER,
            end: HEADER,
        }
    }

    fn clear(&mut self) {
        (self.start, self.end) = (HEADER, HEADER);
    }

    /// The next frame's length, where its first bytes are here.
    fn length(&self) -> Option<usize> {
        let bytes = self.bytes.get(self.start..self.end)?.first_chunk()?;
        Some(u32::from_be_bytes(*bytes) as usize)
    }

    fn has_frame(&self) -> bool {
        self.length()
            .is_some_and(|length| self.end - self.start >= LENGTH + length)
    }

    fn fill(&mut self, stream: &OwnedFd) -> Result<(), Lost> {
        if self.has_frame() {
            return Ok(());
        }
        self.bytes.copy_within(self.start..self.end, HEADER);
        self.end -= self.start - HEADER;
        self.start = HEADER;
        match quiet(recv(
            stream.as_raw_fd(),
            &mut self.bytes[self.end..],
            MsgFlags::MSG_DONTWAIT,
        ))? {
            Some(0) => Err(Lost::Closed),
            Some(count) => {
                self.end += count;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn empty_into(&mut self, tap: &OwnedFd) -> Result<(), Lost> {
        while let Some(length) = self.length() {
            if length > LONGEST {
                return Err(Lost::TooLong);
            }
            let frame = self.start + LENGTH;
            if self.end - self.start < LENGTH + length {
                break;
            }
            // A header of zeros: a whole frame with its checksums. What lies there is done with.
            let header = frame - HEADER;
            self.bytes[header..frame].fill(0);
            match write(tap, &self.bytes[header..frame + length]) {
                Err(Errno::EAGAIN) => {
                    let again = (length as u32).to_be_bytes();
                    self.bytes[self.start..frame].copy_from_slice(&again);
                    break;
                }
                // A frame that the kernel does not take (too short, or the interface is down).
                Ok(_) | Err(_) => self.start = frame + length,
            }
        }
        Ok(())
    }
}

/// `None`: nothing can be done now.
fn quiet(result: nix::Result<usize>) -> Result<Option<usize>, Lost> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};

    /// Datagrams stand for a TAP's frames.
    fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        for fd in [&ours, &theirs] {
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        }
        (ours, theirs)
    }

    /// As the kernel gives and takes it.
    fn frame(length: usize, fill: u8) -> Vec<u8> {
        [vec![0; HEADER], vec![fill; length]].concat()
    }

    fn with_length(length: usize, fill: u8) -> Vec<u8> {
        [(length as u32).to_be_bytes().to_vec(), vec![fill; length]].concat()
    }

    /// All that can be read now, in the pieces in which it comes.
    fn pieces(fd: &OwnedFd) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let mut bytes = vec![0; HEADER + LONGEST];
            match nix::unistd::read(fd, &mut bytes) {
                Ok(count) if count > 0 => all.push(bytes[..count].to_vec()),
                _ => return all,
            }
        }
    }

    #[test]
    fn only_what_passt_takes_goes_out() {
        let (tap, guest) = pair(SockType::SeqPacket);
        let (stream, passt) = pair(SockType::Stream);
        let mut outgoing = Outgoing::new();
        let mut heard = Vec::new();
        // A guest's frame is as long as its TAP lets it be.
        for length in [0, 13, 14, 1514, 65535, 65536, LONGEST] {
            write(&guest, &frame(length, length as u8)).unwrap();
            outgoing.fill(&tap).unwrap();
            while !outgoing.is_empty() {
                outgoing.empty_into(&stream).unwrap();
                heard.extend(pieces(&passt).concat());
            }
        }
        // Shorter than the header that each has.
        write(&guest, &[0; 3]).unwrap();
        outgoing.fill(&tap).unwrap();
        assert!(outgoing.is_empty());
        let wanted = [14, 1514, 65535].map(|length| with_length(length, length as u8));
        assert!(heard == wanted.concat());
    }

    #[test]
    fn frames_come_in_whatever_pieces() {
        let bytes: Vec<u8> = (1..40_u8)
            .flat_map(|n| with_length(usize::from(n) * 37, n))
            .collect();
        let wanted: Vec<_> = (1..40_u8).map(|n| frame(usize::from(n) * 37, n)).collect();
        for piece in [1, 3, 4, 5, 500, 1500, bytes.len()] {
            let (tap, guest) = pair(SockType::SeqPacket);
            let (stream, passt) = pair(SockType::Stream);
            let mut incoming = Incoming::new();
            let mut heard = Vec::new();
            for part in bytes.chunks(piece) {
                assert_eq!(write(&passt, part), Ok(part.len()));
                incoming.fill(&stream).unwrap();
                incoming.empty_into(&tap).unwrap();
                heard.extend(pieces(&guest));
            }
            assert!(heard == wanted, "in pieces of {piece}");
        }
    }

    #[test]
    fn a_length_that_no_frame_has_ends_it() {
        for length in [LONGEST + 1, u32::MAX as usize] {
            let (tap, guest) = pair(SockType::SeqPacket);
            let (stream, passt) = pair(SockType::Stream);
            let mut incoming = Incoming::new();
            write(&passt, &with_length(60, 1)).unwrap();
            write(&passt, &(length as u32).to_be_bytes()).unwrap();
            incoming.fill(&stream).unwrap();
            let error = incoming.empty_into(&tap).unwrap_err().to_string();
            assert!(error.contains("too long"), "{error}");
            assert_eq!(pieces(&guest).len(), 1, "what came before it");
        }
    }

    #[test]
    fn a_guest_that_does_not_read_loses_nothing_of_a_frame() {
        let (tap, guest) = pair(SockType::SeqPacket);
        let (stream, passt) = pair(SockType::Stream);
        setsockopt(&tap, sockopt::SndBuf, &8192).unwrap();
        let mut incoming = Incoming::new();
        let bytes: Vec<u8> = (0..100_u8).flat_map(|n| with_length(1400, n)).collect();
        assert_eq!(write(&passt, &bytes), Ok(bytes.len()));
        let (mut heard, mut refused) = (Vec::new(), 0);
        for _ in 0..200 {
            incoming.fill(&stream).unwrap();
            incoming.empty_into(&tap).unwrap();
            refused += u32::from(incoming.has_frame());
            heard.extend(pieces(&guest));
        }
        let wanted: Vec<_> = (0..100).map(|n| frame(1400, n)).collect();
        assert!(heard == wanted);
        assert!(refused > 5, "the guest's end was never full: {refused}");
    }

    #[test]
    fn a_passt_that_is_gone_is_told() {
        let (stream, passt) = pair(SockType::Stream);
        drop(passt);
        let error = Incoming::new().fill(&stream).unwrap_err();
        assert!(matches!(error, Lost::Closed), "{error}");
        let mut outgoing = Outgoing::new();
        outgoing.end = 100;
        assert!(outgoing.empty_into(&stream).is_err());
    }
}
