//! Orders of whoever started the process, by `--control-fd`, a stream socket: a line each, answered in
//! turn.
//!
//! ```text
//! size BYTES    the disk is to be this long; answered "ok\n" or "error: REASON\n"
//! metrics       answered by Prometheus' text format and a line "# EOF\n"
//! ```

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Longest line: what comes without an end is dropped with the socket.
const MAX_LINE: usize = 64;

/// What was ordered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Order {
    /// The disk's new length in bytes.
    Size(u64),
    Metrics,
    /// A line that is none of these.
    Unknown(String),
}

/// The socket, until its other end is closed.
#[derive(Debug)]
pub(crate) struct Control {
    socket: Option<OwnedFd>,
    line: Vec<u8>,
}

impl Control {
    /// Takes orders from `socket`; from nobody without one. Before lockdown.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub(crate) fn new(socket: Option<OwnedFd>) -> io::Result<Self> {
        if let Some(socket) = &socket {
            let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
            fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        let line = Vec::with_capacity(MAX_LINE);
        Ok(Self { socket, line })
    }

    /// Readable when there may be an order.
    pub(crate) fn source(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// The orders that have come.
    pub(crate) fn orders(&mut self) -> Vec<Order> {
        let Some(socket) = &self.socket else {
            return Vec::new();
        };
        let mut bytes = [0; MAX_LINE];
        let count = match nix::unistd::read(socket, &mut bytes) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Vec::new(),
            Ok(0) | Err(_) => {
                self.socket = None;
                return Vec::new();
            }
            Ok(count) => count,
        };
        let mut orders = Vec::new();
        for byte in &bytes[..count] {
            match byte {
                b'\n' => orders.push(parse(&std::mem::take(&mut self.line))),
                _ if self.line.len() < MAX_LINE => self.line.push(*byte),
                _ => {
                    tracing::warn!("--control-fd: a line does not end; nothing more is read");
                    self.socket = None;
                    return orders;
                }
            }
        }
        orders
    }

    /// Answers the latest order. Whoever does not take answers is not waited for.
    pub(crate) fn answer(&mut self, text: &str) {
        let Some(socket) = &self.socket else { return };
        match nix::unistd::write(socket, text.as_bytes()) {
            Ok(count) if count == text.len() => {}
            _ => {
                tracing::warn!("--control-fd: an answer was not taken; nothing more is read");
                self.socket = None;
            }
        }
    }
}

fn parse(line: &[u8]) -> Order {
    let text = String::from_utf8_lossy(line);
    let mut words = text.split_ascii_whitespace();
    match (words.next(), words.next(), words.next()) {
        (Some("metrics"), None, None) => Order::Metrics,
        (Some("size"), Some(bytes), None) => match bytes.parse() {
            Ok(bytes) => Order::Size(bytes),
            Err(_) => Order::Unknown(text.into_owned()),
        },
        _ => Order::Unknown(text.into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Control, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Control::new(Some(ours.into())).unwrap(), theirs)
    }

    #[test]
    fn orders_come_whole_or_in_parts() {
        let (mut control, mut other) = pair();
        assert_eq!(control.orders(), []);
        other.write_all(b"metrics\nsize 10").unwrap();
        assert_eq!(control.orders(), [Order::Metrics]);
        other
            .write_all(b"24\nsize 1G\nsize 18446744073709551616\n\n")
            .unwrap();
        let unknown = |text: &str| Order::Unknown(text.to_owned());
        let expected = [
            Order::Size(1024),
            unknown("size 1G"),
            unknown("size 18446744073709551616"),
            unknown(""),
        ];
        assert_eq!(control.orders(), expected);
        control.answer("ok\n");
        let mut answer = [0; 3];
        other.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"ok\n");
    }

    #[test]
    fn an_endless_line_and_the_end_close_the_socket() {
        let (mut control, mut other) = pair();
        other.write_all(&[b'x'; 2 * MAX_LINE]).unwrap();
        control.orders();
        assert!(control.source().is_some());
        control.orders();
        assert!(control.source().is_none());
        let (mut control, other) = pair();
        drop(other);
        assert_eq!(control.orders(), []);
        assert!(control.source().is_none());
        control.answer("nobody hears it");
    }
}
