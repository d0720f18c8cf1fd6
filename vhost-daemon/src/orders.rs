//! Orders of whoever started the process, by `--control-fd`, a stream socket: a line each, answered in turn
//! but for what takes its time. A line may begin with a number and a space: then its answer does, so that who
//! gave up waiting for one does not take it for that to the next.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vm_spec::client::LAST_LINE;

/// Longest line, with its number: nothing is read behind what comes without an end.
const MAX_LINE: usize = 96;

/// A line that has come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Order {
    /// It, without its number and its end.
    pub words: String,
    /// Whose answer is whose.
    pub number: OrderNumber,
}

/// The number that an order has, if it has one.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct OrderNumber(Option<u64>);

impl Order {
    fn parse(line: &[u8]) -> Self {
        let line = String::from_utf8_lossy(line);
        let numbered = line.split_once(' ');
        match numbered.and_then(|(number, words)| Some((number.parse().ok()?, words))) {
            Some((number, words)) => Self {
                words: words.to_owned(),
                number: OrderNumber(Some(number)),
            },
            None => Self {
                words: line.into_owned(),
                number: OrderNumber(None),
            },
        }
    }
}

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

    /// The orders that have come.
    pub fn take(&mut self) -> Vec<Order> {
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
        let mut orders = Vec::new();
        for byte in &bytes[..count] {
            match byte {
                b'\n' => {
                    orders.push(Order::parse(&self.line));
                    self.line.clear();
                }
                _ if self.line.len() < MAX_LINE => self.line.push(*byte),
                _ => {
                    tracing::warn!("--control-fd: a line does not end; nothing more is read");
                    self.over = true;
                    return orders;
                }
            }
        }
        orders
    }

    /// Answers the order `to`. Whoever does not take answers is not waited for.
    pub fn answer(&mut self, to: OrderNumber, text: &str) {
        let Some(socket) = self.source() else { return };
        let numbered = to.0.map(|number| format!("{number} {text}"));
        let text = numbered.as_deref().unwrap_or(text);
        match nix::unistd::write(socket, text.as_bytes()) {
            Ok(count) if count == text.len() => {}
            _ => {
                tracing::warn!("--control-fd: an answer was not taken; nothing more is read");
                self.over = true;
            }
        }
    }

    /// As [`Self::answer`], by several lines.
    pub fn answer_at_length(&mut self, to: OrderNumber, lines: &str) {
        self.answer(to, &format!("{lines}{LAST_LINE}\n"));
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

    fn words(orders: &mut Orders) -> Vec<String> {
        orders.take().into_iter().map(|order| order.words).collect()
    }

    #[test]
    fn orders_come_whole_or_in_parts() {
        let (mut orders, mut other) = pair();
        assert!(orders.take().is_empty());
        other.write_all(b"metrics\nsize 10").unwrap();
        assert_eq!(words(&mut orders), ["metrics"]);
        other.write_all(b"24\n\n").unwrap();
        assert_eq!(words(&mut orders), ["size 1024", ""]);
        orders.answer(OrderNumber::default(), "ok\n");
        orders.answer_at_length(OrderNumber::default(), "a 1\n");
        let mut answer = [0; 13];
        other.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"ok\na 1\n# EOF\n");
        assert!(orders.take_over().is_none());
    }

    #[test]
    fn an_answer_has_its_orders_number() {
        let (mut orders, mut other) = pair();
        let most = format!("{} {}\n", u64::MAX, "x".repeat(vm_spec::client::MAX_ORDER));
        other.write_all(most.as_bytes()).unwrap();
        assert_eq!(words(&mut orders), [&most[21..most.len() - 1]]);
        other.write_all(b"7 size 1024\n8 metrics\n").unwrap();
        let [size, metrics] = orders.take().try_into().unwrap();
        assert_eq!((&*size.words, &*metrics.words), ("size 1024", "metrics"));
        orders.answer_at_length(metrics.number, "a 1\n");
        orders.answer(size.number, "ok\n");
        let mut answer = [0; 17];
        other.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"8 a 1\n# EOF\n7 ok\n");
        for words in [
            "metrics",
            "7",
            "7x metrics",
            "18446744073709551616 metrics",
            " 7 metrics",
        ] {
            let number = OrderNumber(None);
            let words = words.to_owned();
            assert_eq!(Order::parse(words.as_bytes()), Order { words, number });
        }
    }

    #[test]
    fn an_endless_line_and_the_end_are_the_end() {
        let (mut orders, mut other) = pair();
        other.write_all(&[b'x'; 2 * MAX_LINE]).unwrap();
        orders.take();
        assert!(orders.source().is_some());
        orders.take();
        assert!(orders.source().is_none() && orders.take_over().is_some());
        let (mut orders, other) = pair();
        drop(other);
        assert!(orders.take().is_empty());
        assert!(orders.source().is_none());
        orders.answer(OrderNumber::default(), "nobody hears it");
        let mut nobody = Orders::new(None).unwrap();
        assert!(nobody.source().is_none() && nobody.take_over().is_none() && nobody.take().is_empty());
    }

    #[test]
    fn who_takes_no_answers_gets_no_more() {
        let (mut orders, mut other) = pair();
        let text = "x".repeat(1 << 20);
        orders.answer(OrderNumber::default(), &text);
        assert!(orders.source().is_none());
        other.write_all(b"metrics\n").unwrap();
        assert!(orders.take().is_empty());
    }
}
