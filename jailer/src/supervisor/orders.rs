//! Orders of clients to device processes: one at a time for each, with a deadline. The process is not believed:
//! its answer is bounded, and what comes unasked is dropped, as are answers to orders that were given up: each
//! has a number.

use super::Supervisor;
use super::clients::Asker;
use super::upgrade::given_up;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use vm_spec::client::{Answer, LAST_LINE, MAX_ORDER, MAX_SAID};

/// Longest wait for an answer: a file system may take its time to lengthen a file.
const DEADLINE: Duration = Duration::from_secs(10);
/// Reads of what nobody asked for, before an order: more than the socket holds.
const MOST_STALE: usize = 256;

/// The socket to one process, and to its successors.
pub(super) struct Orders {
    socket: OwnedFd,
    waiting: Option<Waiting>,
    /// Orders that were given.
    count: u64,
}

struct Waiting {
    asker: Asker,
    until: Instant,
    /// What the answer begins with: the order's number.
    begins: String,
    /// The answer has several lines.
    long: bool,
    answer: Vec<u8>,
}

impl Waiting {
    /// Drops the lines before the answer: they answer what nobody waits for any more.
    fn forget_others(&mut self) {
        let mut at = 0;
        while !self.answer[at..].starts_with(self.begins.as_bytes()) {
            match self.answer[at..].iter().position(|byte| *byte == b'\n') {
                Some(end) => at += end + 1,
                None => break,
            }
        }
        self.answer.drain(..at);
    }

    /// The answer, once it is all there.
    fn whole(&self) -> Option<String> {
        let said = self.answer.strip_prefix(self.begins.as_bytes())?;
        let rest = said.strip_suffix(b"\n")?;
        let whole = !self.long || rest.ends_with(LAST_LINE.as_bytes());
        whole.then(|| String::from_utf8_lossy(said).into_owned())
    }
}

impl Orders {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            waiting: None,
            count: 0,
        }
    }

    /// What to wait for, while someone waits for an answer: what comes unasked must not keep us busy.
    pub(super) fn source(&self) -> Option<&OwnedFd> {
        self.waiting.as_ref().map(|_| &self.socket)
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.as_ref().map(|waiting| waiting.until)
    }

    fn give(&mut self, line: &str, asker: Asker, now: Instant) -> Result<(), String> {
        if self.waiting.is_some() {
            return Err("another order is under way".to_owned());
        }
        if line.len() > MAX_ORDER || line.contains(char::is_control) {
            return Err("it is no order".to_owned());
        }
        // What came late, or unasked.
        if (0..MOST_STALE).all(|_| self.read().is_some()) {
            return Err("its process says what nobody asked for".to_owned());
        }
        self.count += 1;
        let begins = format!("{} ", self.count);
        let text = format!("{begins}{line}\n");
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.socket.as_raw_fd(), text.as_bytes(), flags) {
            Ok(count) if count == text.len() => {}
            _ => return Err("its process takes no order now".to_owned()),
        }
        self.waiting = Some(Waiting {
            asker,
            until: now + DEADLINE,
            begins,
            long: line == "metrics",
            answer: Vec::new(),
        });
        Ok(())
    }

    /// Some bytes; `None`: none are there.
    fn read(&self) -> Option<Vec<u8>> {
        let mut bytes = [0; 4096];
        loop {
            return match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => None,
                Ok(count) => Some(bytes[..count].to_vec()),
                Err(Errno::EINTR) => continue,
                Err(_) => None,
            };
        }
    }

    /// Who asked, and what the answer is, once there is one.
    fn hear(&mut self, now: Instant) -> Option<(Asker, Answer)> {
        self.waiting.as_ref()?;
        let came = self.read().unwrap_or_default();
        let waiting = self.waiting.as_mut()?;
        waiting.answer.extend(came);
        waiting.forget_others();
        let failed = if waiting.answer.len() > MAX_SAID {
            "its process says too much"
        } else if now >= waiting.until {
            "its process does not answer"
        } else if let Some(said) = waiting.whole() {
            let asker = self.waiting.take()?.asker;
            return Some((asker, Answer::Ordered(said)));
        } else {
            return None;
        };
        let asker = self.waiting.take()?.asker;
        Some((asker, Answer::Failed(failed.to_owned())))
    }
}

impl Supervisor {
    /// Passes an order on; the answer comes later.
    pub(super) fn order(
        &mut self,
        device: &str,
        line: &str,
        asker: Asker,
        now: Instant,
    ) -> Result<(), String> {
        let process = self.processes.iter_mut().find(|p| p.about.name == device);
        if process.as_ref().is_some_and(|process| process.recovery.is_lost()) {
            return Err(given_up(device));
        }
        match process.and_then(|process| process.orders.as_mut()) {
            Some(orders) => orders.give(line, asker, now),
            None => Err(format!("the VM has no device '{device}' that takes orders")),
        }
    }

    /// Answers who waits for a device's process.
    pub(super) fn hear_orders(&mut self, now: Instant) {
        for process in &mut self.processes {
            if let Some((asker, answer)) = process.orders.as_mut().and_then(|orders| orders.hear(now)) {
                self.clients.answer(asker, answer, now);
            }
        }
    }

    pub(super) fn orders_deadline(&self) -> Option<Instant> {
        let orders = self
            .processes
            .iter()
            .filter_map(|process| process.orders.as_ref());
        orders.filter_map(Orders::deadline).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    const ASKER: Asker = Asker {
        client: 1,
        request: 1,
    };

    /// What is answered next, if anything is.
    fn heard(orders: &mut Orders, now: Instant) -> Option<Answer> {
        orders.hear(now).map(|(_, answer)| answer)
    }

    #[test]
    fn an_answer_that_comes_late_is_not_taken_for_that_to_another_order() {
        let (ours, mut process) = UnixStream::pair().unwrap();
        let mut orders = Orders::new(ours.into());
        let start = Instant::now();
        let late = start + DEADLINE;
        orders.give("size 1024", ASKER, start).unwrap();
        assert_eq!(heard(&mut orders, start), None);
        let given_up = Answer::Failed("its process does not answer".to_owned());
        assert_eq!(heard(&mut orders, late), Some(given_up));
        orders.give("size 2048", ASKER, late).unwrap();
        let mut given = [0; 24];
        process.read_exact(&mut given).unwrap();
        assert_eq!(&given, b"1 size 1024\n2 size 2048\n");
        process.write_all(b"1 ok\n").unwrap();
        assert_eq!(heard(&mut orders, late), None);
        process.write_all(b"2 error: no").unwrap();
        assert_eq!(heard(&mut orders, late), None);
        process.write_all(b"t enough\n").unwrap();
        let answer = Answer::Ordered("error: not enough\n".to_owned());
        assert_eq!(heard(&mut orders, late), Some(answer));
        // Of several lines, behind several of another.
        orders.give("metrics", ASKER, late).unwrap();
        process.write_all(b"1 a 1\nb 2\n# EOF\n3 c 3\n").unwrap();
        assert_eq!(heard(&mut orders, late), None);
        process.write_all(b"# EOF\n").unwrap();
        let answer = Answer::Ordered("c 3\n# EOF\n".to_owned());
        assert_eq!(heard(&mut orders, late), Some(answer));
    }
}
