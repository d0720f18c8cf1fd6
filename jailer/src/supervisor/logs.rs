//! The log pipes of the jailed processes: lines of bounded length, at a bounded rate, each with
//! the name of who wrote it. Stops a process that a guest controls from flooding the terminal.

use super::audience::Audience;
use super::quota::Quota;
use crate::log_line::{json_line, stamped};
use crate::tell::{CERTAIN_TO_FIT, MOST_AT_ONCE, printable, tell_bytes};
use nix::errno::Errno;
use nix::unistd::read;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use vm_spec::events::EventKind;
use vm_spec::timestamp::Timestamp;

/// Longest line passed on, in bytes; the rest of a longer one is dropped.
const LONGEST_LINE: usize = 2048;
/// Bytes of lines that someone who comes to listen hears of what was said before.
const REMEMBERED: usize = 32 << 10;
/// Lines that a process may write within [`PERIOD`].
const LINES_A_PERIOD: u32 = 200;
/// See [`LINES_A_PERIOD`].
const PERIOD: Duration = Duration::from_secs(1);

/// One process's pipe.
pub(super) struct LogPipe {
    name: String,
    pipe: Option<OwnedFd>,
    line: Vec<u8>,
    quota: Quota,
    dropped: u64,
    /// What its process told of, for whoever writes it down.
    pub(super) told: Vec<(EventKind, String)>,
}

impl LogPipe {
    pub(super) fn new(name: String, pipe: OwnedFd, now: Instant) -> Self {
        Self {
            name,
            pipe: Some(pipe),
            line: Vec::new(),
            quota: Quota::new(LINES_A_PERIOD, PERIOD, now),
            dropped: 0,
            told: Vec::new(),
        }
    }

    /// The pipe, until its process has closed it.
    pub(super) fn pipe(&self) -> Option<&OwnedFd> {
        self.pipe.as_ref()
    }

    /// Reads what is there, at most one pipe's full.
    pub(super) fn read(&mut self, log: &mut Log, now: Instant) {
        for _ in 0..16 {
            let Some(pipe) = &self.pipe else { return };
            let mut bytes = [0; 4096];
            match read(pipe, &mut bytes) {
                Ok(n) if n > 0 => self.take(&bytes[..n], log, now),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                _ => {
                    self.pipe = None;
                    self.end_line(log, now);
                    self.report_dropped(log);
                }
            }
        }
    }

    fn take(&mut self, bytes: &[u8], log: &mut Log, now: Instant) {
        for &byte in bytes {
            match byte {
                b'\n' => self.end_line(log, now),
                byte if self.line.len() < LONGEST_LINE => self.line.push(byte),
                _ => {}
            }
        }
    }

    fn end_line(&mut self, log: &mut Log, now: Instant) {
        if self.line.is_empty() {
            return;
        }
        let line = std::mem::take(&mut self.line);
        if !self.quota.take(now) {
            self.dropped += 1;
            return;
        }
        if self.quota.is_fresh() {
            self.report_dropped(log);
        }
        let text = String::from_utf8_lossy(&line);
        self.told.extend(happening(&text));
        if !log.line(&self.name, &text) {
            self.dropped += 1;
        }
    }

    fn report_dropped(&mut self, log: &mut Log) {
        if self.dropped > 0 {
            let text = format!("{} log lines dropped", self.dropped);
            if log.line(&self.name, &text) {
                self.dropped = 0;
            }
        }
    }
}

/// Where lines go: standard error, and with a time before them whoever listens; plain or as JSON objects.
pub(super) struct Log {
    /// One JSON object a line.
    json: bool,
    /// Other commands of the VM's owner.
    pub(super) audience: Audience,
}

impl Log {
    pub(super) fn new(json: bool) -> Self {
        Self {
            json,
            audience: Audience::new(REMEMBERED),
        }
    }

    /// Writes one line. A standard error that is not read (a full pipe) loses it: false.
    pub(super) fn line(&mut self, process: &str, text: &str) -> bool {
        let mut line = self.format(process, text);
        if line.len() > MOST_AT_ONCE {
            line = self.format(process, &text[..text.floor_char_boundary(CERTAIN_TO_FIT)]);
        }
        self.audience.hear(stamped(&line).as_bytes());
        tell_bytes(line.as_bytes())
    }

    fn format(&self, process: &str, text: &str) -> String {
        if self.json {
            json_line(&Timestamp::now(), process, text)
        } else {
            format!("{process}: {}\n", printable(text))
        }
    }
}

/// `event: NAME: DETAIL`, of the names that a process may tell of.
fn happening(line: &str) -> Option<(EventKind, String)> {
    let (name, detail) = line.strip_prefix("event: ")?.split_once(": ")?;
    Some((EventKind::told_as(name)?, detail.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_and_short() {
        let text = "\u{1b}".repeat(3000);
        for json in [false, true] {
            let line = Log::new(json).format("disk0", &text[..CERTAIN_TO_FIT]);
            assert!(line.len() <= MOST_AT_ONCE && line.ends_with('\n'));
        }
    }

    #[test]
    fn a_line_does_not_steer_a_terminal() {
        for (json, shown) in [(false, "x\\u{202e}y"), (true, "x\\u202ey")] {
            let line = Log::new(json).format("disk0", "x\u{202e}y");
            assert!(line.contains(shown) && !line.contains('\u{202e}'), "{line}");
        }
    }

    #[test]
    fn a_process_tells_of_what_it_may_only() {
        let told = Some((EventKind::NoSpace, "a: b".to_owned()));
        assert_eq!(happening("event: no-space: a: b"), told);
        for other in ["event: died: by itself", "no-space: x", "event: no-space", ""] {
            assert_eq!(happening(other), None, "{other}");
        }
    }
}
