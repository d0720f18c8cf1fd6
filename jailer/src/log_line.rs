//! How log lines look: plain or as JSON objects, each with the name of who wrote it; and with a time before it, as
//! the supervisor gives them to whoever listens.

use crate::tell::{json_head, json_message, steers};
use serde::de::IgnoredAny;
use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use vm_spec::timestamp::Timestamp;

/// What an object of a process's own may not say.
const OURS: [&str; 2] = ["process", "vm"];
/// As `tracing` writes them.
const LEVELS: [&str; 5] = ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"];

/// A process that logs JSON has its name added to its object; other text becomes a message, and so does an
/// object that names a process itself, or would steer a terminal. `time` is that of a message.
pub(crate) fn json_line(time: &dyn Display, process: &str, text: &str) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = json_head(&mut out, process);
    let keys: Result<BTreeMap<String, IgnoredAny>, _> = serde_json::from_str(text);
    let sound = keys.is_ok_and(|keys| !keys.is_empty() && !OURS.iter().any(|key| keys.contains_key(*key)))
        && !text.contains(steers);
    match text.trim_ascii().strip_prefix('{') {
        Some(rest) if sound => {
            let _ = writeln!(out, ",{rest}");
        }
        _ => {
            let (level, text) = level(text).unwrap_or(("WARN", text));
            let _ = json_message(&mut out, time, level, text);
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

/// A line as listeners have it.
pub(crate) fn stamped(line: &str) -> String {
    format!("{} {line}", Timestamp::now())
}

/// A line as listeners have it, without its end: its time, and what was written. None where nobody wrote it: it tells
/// of lines that were lost.
#[cfg(feature = "launcher")]
pub(crate) fn of_stamped(line: &str) -> Option<(&str, &str)> {
    line.split_once(' ').filter(|(time, _)| time.ends_with('Z'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: &str = "2026-01-01T00:00:00.000001Z";

    /// The line's keys but its time.
    fn read(line: &str) -> Vec<(String, String)> {
        let mut read: BTreeMap<String, String> = serde_json::from_str(line).unwrap();
        assert_eq!(read.remove("timestamp").unwrap(), TIME);
        read.into_iter().collect()
    }

    #[test]
    fn json_lines_name_the_process_and_a_level() {
        let own = json_line(&TIME, "disk0", "{\"level\":\"INFO\"}");
        assert_eq!(own, "{\"process\":\"disk0\",\"level\":\"INFO\"}\n");
        for (text, level, message) in [
            ("say \"x\"\u{1b}", "WARN", "say \"x\"\u{1b}"),
            ("2026-01-01T00:00:00.1Z ERROR vmm: lost", "ERROR", "vmm: lost"),
            ("2026-01-01T00:00:00.1Z  INFO vmm: up", "INFO", "vmm: up"),
            ("ERROR vmm: lost", "WARN", "ERROR vmm: lost"),
        ] {
            let wanted = [("level", level), ("message", message), ("process", "vmm")];
            let wanted = wanted.map(|(key, value)| (key.to_owned(), value.to_owned()));
            assert_eq!(read(&json_line(&TIME, "vmm", text)), wanted, "{text}");
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
            "{\"message\":\"x\u{202e}y\"}",
            "{\r\"level\":\"INFO\"}",
        ] {
            let wanted = [("level", "WARN"), ("message", text), ("process", "disk0")];
            let wanted = wanted.map(|(key, value)| (key.to_owned(), value.to_owned()));
            let line = json_line(&TIME, "disk0", text);
            assert_eq!(read(&line), wanted, "{text}");
            assert!(!line.trim_end().contains(steers), "{text}");
        }
    }
}
