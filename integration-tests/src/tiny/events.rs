//! What was written down of a VM.

use super::Run;
use anyhow::{Context, Result, ensure};
use std::{
    fs::File,
    io::{Read, Seek},
    thread,
    time::{Duration, Instant},
};
use vm_spec::events::{FILE_NAME, VmEvent};

/// Between two looks at the file.
const LOOK: Duration = Duration::from_millis(1);

/// One VM's events; once the file was open they can be read when the run-time folder is gone, too.
#[derive(Default, Debug)]
pub struct Events(Option<File>);

impl Events {
    /// Opens the file, if it is there by now.
    pub fn open(&mut self, run: &Run) {
        if self.0.is_none() {
            self.0 = File::open(run.run_folder().join(FILE_NAME)).ok();
        }
    }

    /// What was written down so far.
    ///
    /// # Errors
    /// When there is no file, which is before the first event, or a line that is none.
    pub fn read(&mut self, run: &Run) -> Result<Vec<VmEvent>> {
        self.open(run);
        let file = self.0.as_mut().context("no events")?;
        let mut text = String::new();
        file.rewind()?;
        file.read_to_string(&mut text)?;
        text.lines()
            .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
            .collect()
    }

    /// Waits for the first event that is `wanted`.
    ///
    /// # Errors
    /// When there is none before `deadline` has passed.
    pub fn wait(
        &mut self,
        run: &Run,
        deadline: Duration,
        wanted: impl Fn(&VmEvent) -> bool,
    ) -> Result<VmEvent> {
        let end = Instant::now() + deadline;
        loop {
            let seen = self.read(run).unwrap_or_default();
            if let Some(event) = seen.iter().find(|event| wanted(event)) {
                return Ok(event.clone());
            }
            ensure!(
                Instant::now() < end,
                "no such event within {deadline:?}: {seen:?}"
            );
            thread::sleep(LOOK);
        }
    }
}
