//! How far a command is that takes its time, on a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar on standard error, if that is a terminal; gone when it is dropped.
pub(super) struct Bar(ProgressBar);

impl Bar {
    /// `words` stand behind it: a template of indicatif's.
    pub(super) fn new(words: &str) -> Self {
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template(&format!("{{bar:40}} {words}")) {
            bar.set_style(style);
        }
        Self(bar)
    }

    pub(super) fn show(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
