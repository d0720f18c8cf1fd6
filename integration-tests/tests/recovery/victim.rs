//! A VM whose device process is killed: who it is now, and what was written down of it.

use anyhow::{Context, Result, ensure};
use integration_tests::tiny::Run;
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    io::{Read, Seek},
    thread,
    time::{Duration, Instant},
};
use vm_spec::{
    events::{EventKind, FILE_NAME, VmEvent},
    run_state::{self, ProcessRole, RunState},
};

/// Between two looks at the run-time folder.
const LOOK: Duration = Duration::from_millis(1);

/// The device process of one VM, and its successors.
pub(crate) struct Victim {
    role: ProcessRole,
    last: Option<i32>,
    /// Read also when the run-time folder is gone.
    events: Option<File>,
}

impl Victim {
    pub(crate) fn new(role: ProcessRole) -> Self {
        Self {
            role,
            last: None,
            events: None,
        }
    }

    fn pid(&self, run: &Run) -> Option<i32> {
        let text = fs::read(run.run_folder().join(run_state::FILE_NAME)).ok()?;
        let state: RunState = serde_json::from_slice(&text).ok()?;
        state.first_instruction_ns?;
        let process = state.processes.iter().find(|p| p.role == self.role)?;
        Some(process.pid)
    }

    /// Waits for a process that has not been killed yet, and sends it `signal`. False: the VM is
    /// over.
    pub(crate) fn strike(&mut self, run: &mut Run, signal: Signal, deadline: Duration) -> Result<bool> {
        let end = Instant::now() + deadline;
        loop {
            if !run.process.alive()? {
                return Ok(false);
            }
            if self.events.is_none() {
                self.events = File::open(run.run_folder().join(FILE_NAME)).ok();
            }
            match self.pid(run) {
                Some(pid) if self.last != Some(pid) => {
                    self.last = Some(pid);
                    return match kill(Pid::from_raw(pid), signal) {
                        Ok(()) => Ok(true),
                        // The VM ended in this moment.
                        Err(Errno::ESRCH) => Ok(false),
                        Err(error) => Err(error.into()),
                    };
                }
                _ => {}
            }
            ensure!(
                Instant::now() < end,
                "no new process within {deadline:?}: {}",
                run.process.stderr()?
            );
            thread::sleep(LOOK);
        }
    }

    /// What was written down so far.
    pub(crate) fn events(&mut self, run: &Run) -> Result<Vec<VmEvent>> {
        if self.events.is_none() {
            self.events = Some(File::open(run.run_folder().join(FILE_NAME)).context("no events")?);
        }
        let mut text = String::new();
        if let Some(file) = &mut self.events {
            file.rewind()?;
            file.read_to_string(&mut text)?;
        }
        text.lines()
            .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
            .collect()
    }

    /// Waits until the successor of the one killed last serves the guest. False: the VM is over.
    pub(crate) fn wait_restarted(&mut self, run: &mut Run, deadline: Duration) -> Result<bool> {
        let end = Instant::now() + deadline;
        while run.process.alive()? {
            // No file: nothing has happened yet.
            let seen = self.events(run).unwrap_or_default();
            let last = seen.iter().rfind(|event| event.event == EventKind::Restarted);
            if last.is_some_and(|event| Some(event.pid) != self.last && self.pid(run) == Some(event.pid)) {
                return Ok(true);
            }
            ensure!(
                Instant::now() < end,
                "not restarted within {deadline:?}: {}",
                run.process.stderr()?
            );
            thread::sleep(LOOK);
        }
        Ok(false)
    }

    /// Waits for an event of this kind.
    pub(crate) fn wait_event(&mut self, run: &Run, kind: EventKind, deadline: Duration) -> Result<VmEvent> {
        let end = Instant::now() + deadline;
        loop {
            // No file: nothing has happened yet.
            let seen = self.events(run).unwrap_or_default();
            if let Some(event) = seen.iter().find(|event| event.event == kind) {
                return Ok(event.clone());
            }
            ensure!(Instant::now() < end, "no {kind:?} within {deadline:?}: {seen:?}");
            thread::sleep(LOOK);
        }
    }
}
