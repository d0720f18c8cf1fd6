//! What a guest prints, line by line, read all the time so that nothing is lost.

use anyhow::{Context, Result, bail};
use std::{
    io::{BufRead, BufReader, Read},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

/// Lines of a stream.
#[derive(Debug)]
pub struct Console {
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Console {
    /// Reads `stream` until it ends.
    pub fn new(stream: impl Read + Send + 'static) -> Self {
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n') {
                let Ok(line) = line else { return };
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(text).is_err() {
                    return;
                }
            }
        });
        Self {
            lines,
            seen: Vec::new(),
        }
    }

    /// Everything so far.
    #[must_use]
    pub fn text(&self) -> String {
        self.seen.join("\n")
    }

    /// Waits for the line `text`.
    ///
    /// # Errors
    /// When it does not come before `deadline` has passed; says what came instead.
    pub fn wait_line(&mut self, text: &str, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line);
                    if self.seen.last().is_some_and(|line| line == text) {
                        return Ok(());
                    }
                }
                Err(error) => bail!("no line {text:?} ({error}) in:\n{}", self.text()),
            }
        }
    }

    /// Reads to the stream's end.
    ///
    /// # Errors
    /// When it does not end before `deadline` has passed.
    pub fn finish(&mut self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            match self
                .lines
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => bail!("the console does not end:\n{}", self.text()),
            }
        }
    }

    /// The value of the last line `key=value`.
    ///
    /// # Errors
    /// When there is none.
    pub fn value(&self, key: &str) -> Result<&str> {
        let last = self.values(key).last();
        last.with_context(|| format!("no {key}= in:\n{}", self.text()))
    }

    /// The values of all lines `key=value`, in order.
    pub fn values(&self, key: &str) -> impl Iterator<Item = &str> {
        self.seen
            .iter()
            .filter_map(move |line| line.strip_prefix(key)?.strip_prefix('='))
    }

    /// The value of the last line `key=number`.
    ///
    /// # Errors
    /// When there is none, or it is no number.
    pub fn number(&self, key: &str) -> Result<u64> {
        self.value(key)?
            .parse()
            .with_context(|| format!("{key} is no number"))
    }

    /// The last word: `result=ok`.
    ///
    /// # Errors
    /// With everything the guest printed, when it is another.
    pub fn expect_ok(&self) -> Result<()> {
        match self.value("result")? {
            "ok" => Ok(()),
            _ => bail!("the guest failed:\n{}", self.text()),
        }
    }
}
