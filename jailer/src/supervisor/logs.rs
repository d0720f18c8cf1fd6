//! The log pipes of the jailed processes: lines of bounded length, at a bounded rate, each with
//! the name of who wrote it. Stops a process that a guest controls from flooding the terminal.

use super::audience::Audience;
use super::quota::Quota;
use crate::tell::{CERTAIN_TO_FIT, MOST_AT_ONCE, json_head, json_message, tell_bytes};
use nix::errno::Errno;
use nix::unistd::read;
use serde::de::IgnoredAny;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use vm_spec::events::EventKind;

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

/// Where lines go: standard error and whoever listens, plain or as JSON objects.
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
        self.audience.hear(line.as_bytes());
        tell_bytes(line.as_bytes())
    }

    fn format(&self, process: &str, text: &str) -> String {
        if self.json {
            json_line(process, text)
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

/// `text` without what would steer a terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && c != '\t' { '.' } else { c })
        .collect()
}

/// What an object of a process's own may not say.
const OURS: [&str; 2] = ["process", "vm"];
/// As `tracing` writes them.
const LEVELS: [&str; 5] = ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"];

/// A process that logs JSON has its name added to its object; other text becomes a message, and so does an
/// object that names a process itself.
fn json_line(process: &str, text: &str) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = json_head(&mut out, process);
    let keys: Result<BTreeMap<String, IgnoredAny>, _> = serde_json::from_str(text);
    let sound = keys.is_ok_and(|keys| !keys.is_empty() && !OURS.iter().any(|key| keys.contains_key(*key)));
    match text.trim_ascii().strip_prefix('{') {
        Some(rest) if sound => {
            let _ = writeln!(out, ",{}", printable(rest));
        }
        _ => {
            let (level, text) = level(text).unwrap_or(("WARN", text));
            let _ = json_message(&mut out, level, text);
        }
    }
    out
}

/// The level of a line that `tracing` wrote for people (`TIME  LEVEL MESSAGE`), and its message.
fn level(text: &str) -> Option<(&str, &str)> {
    let (time, rest) = text.split_once(' ')?;
    let (level, message) = rest.trim_start().split_once(' ')?;
    (time.ends_with('Z') && LEVELS.contains(&level)).then_some((level, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The line's keys but its time.
    fn read(line: &str) -> Vec<(String, String)> {
        let mut read: BTreeMap<String, String> = serde_json::from_str(line).unwrap();
        read.remove("timestamp");
        read.into_iter().collect()
    }

    #[test]
    fn json_lines_name_the_process_and_a_level() {
        let own = json_line("disk0", "{\"level\":\"INFO\"}");
        assert_eq!(own, "{\"process\":\"disk0\",\"level\":\"INFO\"}\n");
        for (text, level, message) in [
            ("say \"x\"\u{1b}", "WARN", "say \"x\"\u{1b}"),
            ("2026-01-01T00:00:00.1Z ERROR vmm: lost", "ERROR", "vmm: lost"),
            ("2026-01-01T00:00:00.1Z  INFO vmm: up", "INFO", "vmm: up"),
            ("ERROR vmm: lost", "WARN", "ERROR vmm: lost"),
        ] {
            let wanted = [("level", level), ("message", message), ("process", "vmm")];
            let wanted = wanted.map(|(key, value)| (key.to_owned(), value.to_owned()));
            assert_eq!(read(&json_line("vmm", text)), wanted, "{text}");
        }
    }

    #[test]
    fn nobody_speaks_in_anothers_name() {
        for text in [
            "{\"process\":\"vmm\",\"level\":\"INFO\"}",
            "{\"pr\\u006fcess\":\"vmm\"}",
            "{\"vm\":\"another\"}",
            "{\"level\":\"INFO\"} {}",
            "{garbage}",
            "{}",
        ] {
            let wanted = [("level", "WARN"), ("message", text), ("process", "disk0")];
            let wanted = wanted.map(|(key, value)| (key.to_owned(), value.to_owned()));
            assert_eq!(read(&json_line("disk0", text)), wanted, "{text}");
        }
    }

    #[test]
    fn lines_are_whole_and_short() {
        let text = "\u{1b}".repeat(3000);
        for json in [false, true] {
            let line = Log::new(json).format("disk0", &text[..CERTAIN_TO_FIT]);
            assert!(line.len() <= MOST_AT_ONCE && line.ends_with('\n'));
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

    #[test]
    fn control_characters_do_not_reach_a_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb"), "a.[2Jb");
    }
}
