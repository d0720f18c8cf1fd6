//! Orders of whoever started the process, by `--control-fd`, a stream socket: a line each, answered in turn
//! but for what takes its time.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vm_spec::client::LAST_LINE;

/// Longest line: nothing is read behind what comes without an end.
const MAX_LINE: usize = 64;

/// The socket, until it is over: its other end is closed, sends too long a line or takes no answers.
#[derive(Debug)]
pub struct Orders {
    socket: Option<OwnedFd>,
    over: bool,
    line: Vec<u8>,
}

impl Orders {
    /// Takes orders from `socket`; from nobody without one. Before lockdown.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn new(socket: Option<OwnedFd>) -> io::Result<Self> {
        if let Some(socket) = &socket {
            let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
            fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Self {
            over: socket.is_none(),
            socket,
            line: Vec::with_capacity(MAX_LINE),
        })
    }

    /// Readable when there may be an order.
    #[must_use]
    pub fn source(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().filter(|_| !self.over).map(AsFd::as_fd)
    }

    /// The socket that is over, for who watches it otherwise than by [`Self::source`].
    pub fn take_over(&mut self) -> Option<OwnedFd> {
        self.socket.take_if(|_| self.over)
    }

    /// The orders that have come, without their ends.
    pub fn lines(&mut self) -> Vec<String> {
        let Some(socket) = self.source() else {
            return Vec::new();
        };
        let mut bytes = [0; MAX_LINE];
        let count = match nix::unistd::read(socket, &mut bytes) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Vec::new(),
            Ok(0) | Err(_) => {
                self.over = true;
                return Vec::new();
            }
            Ok(count) => count,
        };
        let mut lines = Vec::new();
        for byte in &bytes[..count] {
            match byte {
                b'\n' => {
                    let line = std::mem::take(&mut self.line);
                    lines.push(String::from_utf8_lossy(&line).into_owned());
                }
                _ if self.line.len() < MAX_LINE => self.line.push(*byte),
                _ => {
                    tracing::warn!("--control-fd: a line does not end; nothing more is read");
                    self.over = true;
                    return lines;
                }
            }
        }
        lines
    }

    /// Answers the latest order. Whoever does not take answers is not waited for.
    pub fn answer(&mut self, text: &str) {
        let Some(socket) = self.source() else { return };
        match nix::unistd::write(socket, text.as_bytes()) {
            Ok(count) if count == text.len() => {}
            _ => {
                tracing::warn!("--control-fd: an answer was not taken; nothing more is read");
                self.over = true;
            }
        }
    }

    /// As [`Self::answer`], by several lines.
    pub fn answer_at_length(&mut self, lines: &str) {
        self.answer(&format!("{lines}{LAST_LINE}\n"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Orders, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Orders::new(Some(ours.into())).unwrap(), theirs)
    }

    #[test]
    fn orders_come_whole_or_in_parts() {
        let (mut orders, mut other) = pair();
        assert!(orders.lines().is_empty());
        other.write_all(b"metrics\nsize 10").unwrap();
        assert_eq!(orders.lines(), ["metrics"]);
        other.write_all(b"24\n\n").unwrap();
        assert_eq!(orders.lines(), ["size 1024", ""]);
        orders.answer("ok\n");
        orders.answer_at_length("a 1\n");
        let mut answer = [0; 13];
        other.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"ok\na 1\n# EOF\n");
        assert!(orders.take_over().is_none());
    }

    #[test]
    fn an_endless_line_and_the_end_are_the_end() {
        let (mut orders, mut other) = pair();
        other.write_all(&[b'x'; 2 * MAX_LINE]).unwrap();
        orders.lines();
        assert!(orders.source().is_some());
        orders.lines();
        assert!(orders.source().is_none() && orders.take_over().is_some());
        let (mut orders, other) = pair();
        drop(other);
        assert!(orders.lines().is_empty());
        assert!(orders.source().is_none());
        orders.answer("nobody hears it");
        let mut nobody = Orders::new(None).unwrap();
        assert!(nobody.source().is_none() && nobody.take_over().is_none() && nobody.lines().is_empty());
    }

    #[test]
    fn who_takes_no_answers_gets_no_more() {
        let (mut orders, mut other) = pair();
        let text = "x".repeat(1 << 20);
        orders.answer(&text);
        assert!(orders.source().is_none());
        other.write_all(b"metrics\n").unwrap();
        assert!(orders.lines().is_empty());
    }
}
