//! Orders of clients to device processes: one at a time for each, with a deadline. The process is not believed:
//! its answer is bounded, and what comes unasked is dropped.

use super::Supervisor;
use super::clients::Asker;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use vm_spec::client::{Answer, LAST_LINE, MAX_ORDER};

/// Longest wait for an answer: a file system may take its time to lengthen a file.
const DEADLINE: Duration = Duration::from_secs(10);
/// Longest answer in bytes; a message holds it.
const LONGEST: usize = 48 << 10;
/// Reads of what nobody asked for, before an order: more than the socket holds.
const MOST_STALE: usize = 256;

/// The socket to one process, and to its successors.
pub(super) struct Orders {
    socket: OwnedFd,
    waiting: Option<Waiting>,
}

struct Waiting {
    asker: Asker,
    until: Instant,
    /// The answer has several lines.
    long: bool,
    answer: Vec<u8>,
}

impl Orders {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            waiting: None,
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
        let text = format!("{line}\n");
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.socket.as_raw_fd(), text.as_bytes(), flags) {
            Ok(count) if count == text.len() => {}
            _ => return Err("its process takes no order now".to_owned()),
        }
        self.waiting = Some(Waiting {
            asker,
            until: now + DEADLINE,
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
        let whole = match waiting.long {
            true => {
                let rest = waiting.answer.strip_suffix(b"\n");
                rest.is_some_and(|rest| rest.ends_with(LAST_LINE.as_bytes()))
            }
            false => waiting.answer.ends_with(b"\n"),
        };
        let failed = if waiting.answer.len() > LONGEST {
            "its process says too much"
        } else if now >= waiting.until {
            "its process does not answer"
        } else if whole {
            let said = String::from_utf8_lossy(&waiting.answer).into_owned();
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
