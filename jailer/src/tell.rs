//! Words on standard error. Its reader may have left, or may not read: neither is an error, and no process that
//! others depend on waits for it.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;
use std::error::Error;
use std::fmt::{self, Write as _};
use std::io::stderr;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_spec::timestamp::Timestamp;

/// Longest line in bytes (PIPE_BUF): a pipe that polls writable takes it without waiting.
pub(crate) const MOST_AT_ONCE: usize = 4096;
/// Of a text that is longer as a line: even if each byte takes six as JSON.
pub(crate) const CERTAIN_TO_FIT: usize = 600;
/// How long a terminal that takes nothing keeps a command from its end, in milliseconds.
const PATIENCE_MS: u16 = 5000;

/// What every line of this process's begins with.
const OWN: &str = "bulkhead: ";

/// Whether lines are JSON objects.
static JSON: AtomicBool = AtomicBool::new(false);
/// The name that they give the VM.
static VM: OnceLock<String> = OnceLock::new();

/// From now on lines of this process, and of those that it becomes, are JSON objects.
pub fn speak_json() {
    JSON.store(true, Ordering::Relaxed);
}

/// From now on JSON objects name the VM.
pub fn name_vm(name: &str) {
    // Nobody has two.
    let _ = VM.set(name.to_owned());
}

/// Writes one line if standard error takes it now; else it is lost, as is what exceeds `MOST_AT_ONCE`.
/// Allocates nothing.
pub fn tell(line: fmt::Arguments<'_>) {
    let mut buffer = [0; MOST_AT_ONCE];
    let text = cut(&mut buffer[..MOST_AT_ONCE - 1], |text| text.write_fmt(line));
    if JSON.load(Ordering::Relaxed) {
        return tell_json(text);
    }
    let end = text.len();
    buffer[end] = b'\n';
    // A line that nobody takes is lost.
    let _ = tell_bytes(&buffer[..=end]);
}

fn tell_json(text: &str) {
    let mut buffer = [0; MOST_AT_ONCE];
    for text in [text, &text[..text.floor_char_boundary(CERTAIN_TO_FIT)]] {
        let line = cut(&mut buffer, |line| json_line(line, text));
        if line.ends_with('\n') {
            // As above.
            let _ = tell_bytes(line.as_bytes());
            return;
        }
    }
}

/// The words of this process as an object.
fn json_line(out: &mut dyn fmt::Write, text: &str) -> fmt::Result {
    let text = text.strip_prefix(OWN).unwrap_or(text);
    let error = text.strip_prefix("error: ");
    let level = if error.is_some() { "ERROR" } else { "WARN" };
    let text = error.or(text.strip_prefix("warning: ")).unwrap_or(text);
    json_head(out, "bulkhead")?;
    json_message(out, &Timestamp::now(), level, text)
}

/// The rest of an object behind [`json_head`], and the line's end.
pub(crate) fn json_message(
    out: &mut dyn fmt::Write,
    time: &dyn fmt::Display,
    level: &str,
    text: &str,
) -> fmt::Result {
    write!(
        out,
        ",\"timestamp\":\"{time}\",\"level\":\"{level}\",\"message\":\""
    )?;
    json_escaped(out, text)?;
    out.write_str("\"}\n")
}

/// The front of every object: who speaks, and of which VM.
pub(crate) fn json_head(out: &mut dyn fmt::Write, process: &str) -> fmt::Result {
    for (key, value) in [
        ("{\"process", Some(process)),
        (",\"vm", VM.get().map(String::as_str)),
    ] {
        if let Some(value) = value {
            write!(out, "{key}\":\"")?;
            json_escaped(out, value)?;
            out.write_char('"')?;
        }
    }
    Ok(())
}

/// Whether a terminal obeys `c`, or shows what is around it in another order (Unicode's Bidi_Control). A tab is plain.
pub(crate) fn steers(c: char) -> bool {
    let control = c.is_control() && c != '\t';
    control
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A text that others have written: on one line, with what would steer a terminal escaped.
pub(crate) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match steers(c) {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// The inside of a string.
fn json_escaped(out: &mut dyn fmt::Write, text: &str) -> fmt::Result {
    text.chars().try_for_each(|c| match c {
        '"' => out.write_str("\\\""),
        '\\' => out.write_str("\\\\"),
        c if steers(c) || c == '\t' => write!(out, "\\u{:04x}", u32::from(c)),
        c => out.write_char(c),
    })
}

/// What `write` writes into `buffer`, up to the first piece that does not fit whole.
fn cut(buffer: &mut [u8], write: impl FnOnce(&mut Bounded<'_>) -> fmt::Result) -> &str {
    let mut text = Bounded { buffer, length: 0 };
    let _ = write(&mut text);
    let Bounded { buffer, length } = text;
    // Only whole characters were put there.
    str::from_utf8(&buffer[..length]).unwrap_or_default()
}

struct Bounded<'a> {
    buffer: &'a mut [u8],
    length: usize,
}

impl fmt::Write for Bounded<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.buffer.len() - self.length;
        let taken = &text[..text.floor_char_boundary(room)];
        self.buffer[self.length..][..taken.len()].copy_from_slice(taken.as_bytes());
        self.length += taken.len();
        match taken.len() == text.len() {
            true => Ok(()),
            false => Err(fmt::Error),
        }
    }
}

/// As [`tell`], at most [`MOST_AT_ONCE`] bytes with the line's end; false: it is lost.
pub(crate) fn tell_bytes(line: &[u8]) -> bool {
    let stderr = stderr();
    writable(&stderr, PollTimeout::ZERO) && write(&stderr, line).is_ok()
}

/// A command's own words to whoever typed it, who may be slow to read them.
pub fn say(line: fmt::Arguments<'_>) {
    let mut text = format!("{line}\n");
    if JSON.load(Ordering::Relaxed) {
        let plain = std::mem::take(&mut text);
        // Writing to a String cannot fail.
        let _ = json_line(&mut text, plain.trim_end());
    }
    let mut rest = text.as_bytes();
    let stderr = stderr();
    while !rest.is_empty() {
        match write(&stderr, rest) {
            Ok(0) => return,
            Ok(written) => rest = &rest[written..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if writable(&stderr, PATIENCE_MS.into()) => {}
            Err(_) => return,
        }
    }
}

/// An error and the causes behind it, on one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        next = cause.source();
    }
    line
}

fn writable(fd: &impl AsFd, timeout: PollTimeout) -> bool {
    let mut ready = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    poll(&mut ready, timeout) == Ok(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn words_are_objects_with_a_level() {
        for (text, level, message) in [
            ("error: a\n  cause: \"b\"", "ERROR", "a\n  cause: \"b\""),
            ("bulkhead: warning: c\\", "WARN", "c\\"),
            ("bulkhead: d", "WARN", "d"),
        ] {
            let mut line = String::new();
            json_line(&mut line, text).unwrap();
            let mut read: BTreeMap<String, String> = serde_json::from_str(&line).unwrap();
            assert!(read.remove("timestamp").unwrap().ends_with('Z'), "{line}");
            let wanted = [("process", "bulkhead"), ("level", level), ("message", message)];
            let wanted = wanted.map(|(key, value)| (key.to_owned(), value.to_owned()));
            assert_eq!(read, wanted.into(), "{line}");
            assert!(line.ends_with("}\n") && line.lines().count() == 1, "{line}");
        }
    }

    #[test]
    fn nothing_steers_a_terminal() {
        for (text, plain, json) in [
            ("a\x1b[2Jb\nc", "a\\u{1b}[2Jb\\nc", "a\\u001b[2Jb\\u000ac"),
            ("x\u{202e}y", "x\\u{202e}y", "x\\u202ey"),
            ("x\u{61c}\u{9b}", "x\\u{61c}\\u{9b}", "x\\u061c\\u009b"),
            ("a\tb", "a\tb", "a\\u0009b"),
            ("bäckup 1", "bäckup 1", "bäckup 1"),
        ] {
            assert_eq!(printable(text), plain);
            let mut escaped = String::new();
            json_escaped(&mut escaped, text).unwrap();
            assert_eq!(escaped, json);
        }
    }

    #[test]
    fn causes_follow_on_the_same_line() {
        #[derive(Debug, thiserror::Error)]
        #[error("c")]
        struct Alone;
        #[derive(Debug, thiserror::Error)]
        #[error("b")]
        struct Caused(#[from] Alone);
        #[derive(Debug, thiserror::Error)]
        #[error("a")]
        struct Twice(#[source] Caused);
        assert_eq!(chain(&Twice(Alone.into())), "a: b: c");
        assert_eq!(chain(&Alone), "c");
    }

    #[test]
    fn what_does_not_fit_is_cut_between_characters() {
        let (mut buffer, umlauts) = ([0; 5], "\u{e4}".repeat(3));
        assert_eq!(
            cut(&mut buffer, |text| write!(text, "a{umlauts}")),
            "a\u{e4}\u{e4}"
        );
        let longest = "\u{1}".repeat(CERTAIN_TO_FIT);
        let mut buffer = [0; MOST_AT_ONCE - 200];
        assert!(cut(&mut buffer, |line| json_line(line, &longest)).ends_with("}\n"));
    }
}
