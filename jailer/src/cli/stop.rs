//! `bulkhead stop VM` and `bulkhead kill VM`: end a VM from elsewhere, and wait until nothing of it is left.

use super::pidfd::{PidFd, wait_for_one};
use super::ps::{self, RunningVm};
use crate::failure::Failure;
use crate::tell::say;
use nix::poll::PollTimeout;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::Signal;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use vm_spec::control::exit_code;
use vm_spec::run_state::{FILE_NAME, RunState};

/// Processes of a killed VM are gone, and its reaper is done, in 2 s.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// How many states of a VM that ends are kept: the spawner writes one or two.
const STATES: usize = 4;

/// Asks the guest to power off, as SIGTERM to `bulkhead run` does; how the VM ended.
///
/// # Errors
/// A [`Failure`] when no such VM runs, or it cannot be asked.
pub(super) fn stop(name: &str, limit: Duration) -> Result<(String, u8), Failure> {
    let mut ending = Ending::begin(name)?;
    ending.signal(Signal::SIGTERM)?;
    if !ending.wait(limit)? {
        say(format_args!(
            "error: the VM '{name}' still runs after {limit:?}\n  hint: bulkhead kill {name}"
        ));
        return Ok((String::new(), exit_code::TIMEOUT));
    }
    let how = match ending.code() {
        // It was swept up before it could be read.
        None => "is over".to_owned(),
        Some(exit_code::POWER_OFF) => "powered off".to_owned(),
        Some(exit_code::TIMEOUT) => "did not power off in its time, and was killed".to_owned(),
        Some(code) => format!("ended with exit code {code}"),
    };
    Ok((format!("{name}: {how}\n"), 0))
}

/// Kills the spawner, which nothing of a VM outlives.
///
/// # Errors
/// A [`Failure`] when no such VM runs, it may not be killed, or something of it is left.
pub(super) fn kill(name: &str) -> Result<String, Failure> {
    let mut ending = Ending::begin(name)?;
    ending.signal(Signal::SIGKILL)?;
    match ending.wait(KILL_DEADLINE)? {
        true => Ok(format!("{name}: killed\n")),
        false => Err(
            Failure::host(format!("the VM '{name}' was killed, but is not gone"))
                .cause(format!("something of it is left after {KILL_DEADLINE:?}"))
                .hint("a process may be in a system call that waits for a disk"),
        ),
    }
}

/// A VM that is about to end.
struct Ending {
    vm: RunningVm,
    spawner: PidFd,
    /// All that run, the spawner among them.
    processes: Vec<PidFd>,
    folder: Inotify,
    states: Vec<File>,
}

impl Ending {
    fn begin(name: &str) -> Result<Self, Failure> {
        let vm = ps::find(name)?;
        let failed =
            |e: &dyn std::error::Error| Failure::host(format!("cannot watch the VM '{name}'")).because(e);
        let folder = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(|e| failed(&e))?;
        let changes = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF;
        folder.add_watch(&vm.folder, changes).map_err(|e| failed(&e))?;
        let spawner = PidFd::open(vm.pid).map_err(|e| failed(&e))?;
        let pids = vm.state.processes.iter().map(|process| process.pid);
        // One that is gone needs no waiting for.
        let processes = pids.filter_map(|pid| PidFd::open(pid).ok()).collect();
        // With the process in hand: it is the one that has the lock, and no later one with its number.
        if !vm.runs() {
            return Err(Failure::usage(format!("the VM '{name}' has just ended")));
        }
        Ok(Self {
            vm,
            spawner,
            processes,
            folder,
            states: Vec::new(),
        })
    }

    fn signal(&self, signal: Signal) -> Result<(), Failure> {
        self.spawner.signal(signal).map_err(|e| {
            let (name, pid) = (self.vm.name(), self.vm.pid);
            Failure::host(format!("cannot send {signal} to the VM '{name}' (pid {pid})")).because(&e)
        })
    }

    /// Waits until its processes and its run-time folder are gone; false: they are not.
    fn wait(&mut self, limit: Duration) -> Result<bool, Failure> {
        let deadline = Instant::now() + limit;
        loop {
            self.look();
            if self.processes.is_empty() && !self.vm.runs() {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.wait_for_change(left).map_err(|e| {
                Failure::host(format!("cannot wait for the VM '{}'", self.vm.name())).because(&e)
            })?;
        }
    }

    fn wait_for_change(&mut self, limit: Duration) -> io::Result<()> {
        // Rounded up: what is left of a millisecond is no reason to go round and round.
        let timeout = PollTimeout::try_from(limit + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        wait_for_one(&mut self.processes, self.folder.as_fd(), timeout)
    }

    /// Opens the states that the spawner writes, the last of which says how it ended: it soon is removed.
    fn look(&mut self) {
        while self.folder.read_events().is_ok_and(|events| !events.is_empty()) {
            for name in ["state.json.new", FILE_NAME] {
                self.states.extend(File::open(self.vm.folder.join(name)));
            }
        }
        let old = self.states.len().saturating_sub(STATES);
        self.states.drain(..old);
    }

    /// The exit code of its `bulkhead run`, if that could be read in time.
    fn code(&self) -> Option<u8> {
        self.states.iter().rev().find_map(|file| {
            let state: RunState = serde_json::from_reader(file).ok()?;
            state.exit_code
        })
    }
}
