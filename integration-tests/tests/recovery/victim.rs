//! A VM whose device process is killed: who it is now, and what was written down of it.

use anyhow::{Result, ensure};
use integration_tests::tiny::{Events, Run};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs, thread,
    time::{Duration, Instant},
};
use vm_spec::{
    events::{EventKind, VmEvent},
    run_state::{self, ProcessRole, ProcessState, RunState},
};

/// Between two looks at the run-time folder.
const LOOK: Duration = Duration::from_millis(1);

/// The device process of one VM, and its successors.
pub(crate) struct Victim {
    role: ProcessRole,
    /// Where there are several of the role.
    name: Option<&'static str>,
    last: Option<i32>,
    events: Events,
}

impl Victim {
    pub(crate) fn new(role: ProcessRole) -> Self {
        Self {
            role,
            name: None,
            last: None,
            events: Events::default(),
        }
    }

    /// The process of the device `name`.
    pub(crate) fn named(role: ProcessRole, name: &'static str) -> Self {
        Self {
            name: Some(name),
            ..Self::new(role)
        }
    }

    fn pid(&self, run: &Run) -> Option<i32> {
        self.pid_in(&state(run).filter(|state| state.first_instruction_ns.is_some())?)
    }

    fn pid_in(&self, state: &RunState) -> Option<i32> {
        let ours = |p: &&ProcessState| p.role == self.role && self.name.is_none_or(|name| p.name == name);
        Some(state.processes.iter().find(ours)?.pid)
    }

    /// Kills the process `delay` after it is known, whether the guest runs by then or not.
    pub(crate) fn strike_early(&mut self, run: &mut Run, delay: Duration) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(10);
        let pid = loop {
            if let Some(pid) = state(run).and_then(|state| self.pid_in(&state)) {
                break pid;
            }
            ensure!(run.process.alive()?, "the VM ended: {}", run.process.stderr()?);
            ensure!(Instant::now() < end, "no process");
            thread::sleep(LOOK / 10);
        };
        thread::sleep(delay);
        self.last = Some(pid);
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the guest has begun to run.
    pub(crate) fn guest_runs(&self, run: &Run) -> bool {
        self.pid(run).is_some()
    }

    /// The process that serves now may be one that [`Victim::strike`] has not seen.
    pub(crate) fn forget(&mut self) {
        self.last = None;
    }

    /// Whether there is a process that [`Victim::strike`] has not seen.
    pub(crate) fn is_replaced(&self, run: &Run) -> bool {
        self.pid(run).is_some_and(|pid| self.last != Some(pid))
    }

    /// Waits for a process that has not been killed yet, and sends it `signal`. False: the VM is
    /// over.
    pub(crate) fn strike(&mut self, run: &mut Run, signal: Signal, deadline: Duration) -> Result<bool> {
        let end = Instant::now() + deadline;
        loop {
            if !run.process.alive()? {
                return Ok(false);
            }
            self.events.open(run);
            match self.pid(run) {
                Some(pid) if self.last != Some(pid) => {
                    self.last = Some(pid);
                    match kill(Pid::from_raw(pid), signal) {
                        Ok(()) => return Ok(true),
                        // The VM ended in this moment, or what was written down is out of date.
                        Err(Errno::ESRCH) => {}
                        Err(error) => return Err(error.into()),
                    }
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
        self.events.read(run)
    }

    /// Waits until the successor of the one killed last serves the guest. False: the VM is over.
    pub(crate) fn wait_restarted(&mut self, run: &mut Run, deadline: Duration) -> Result<bool> {
        let end = Instant::now() + deadline;
        while run.process.alive()? {
            // No file: nothing has happened yet.
            let seen = self.events(run).unwrap_or_default();
            let ours = |event: &&VmEvent| {
                event.event == EventKind::Restarted && self.name.is_none_or(|name| event.device == name)
            };
            let last = seen.iter().rfind(ours);
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

    /// Waits until there were `count` events of this kind; the last one.
    pub(crate) fn wait_count(
        &mut self,
        run: &Run,
        kind: EventKind,
        count: u64,
        deadline: Duration,
    ) -> Result<VmEvent> {
        let end = Instant::now() + deadline;
        loop {
            let seen = self.events(run).unwrap_or_default();
            let last = seen.iter().rfind(|event| event.event == kind);
            if let Some(event) = last.filter(|event| event.count >= count) {
                return Ok(event.clone());
            }
            ensure!(
                Instant::now() < end,
                "{:?} of {count} {kind:?} within {deadline:?}",
                last.map(|event| event.count)
            );
            thread::sleep(10 * LOOK);
        }
    }

    /// Waits for an event of this kind.
    pub(crate) fn wait_event(&mut self, run: &Run, kind: EventKind, deadline: Duration) -> Result<VmEvent> {
        self.wait_for(run, deadline, |event| event.event == kind)
    }

    /// Waits for an event that is `wanted`.
    pub(crate) fn wait_for(
        &mut self,
        run: &Run,
        deadline: Duration,
        wanted: impl Fn(&VmEvent) -> bool,
    ) -> Result<VmEvent> {
        self.events.wait(run, deadline, wanted)
    }
}

fn state(run: &Run) -> Option<RunState> {
    let text = fs::read(run.run_folder().join(run_state::FILE_NAME)).ok()?;
    serde_json::from_slice(&text).ok()
}
