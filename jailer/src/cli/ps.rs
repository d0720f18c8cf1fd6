//! `bulkhead ps`: this user's VMs.

use crate::clock::monotonic_ns;
use crate::failure::Failure;
use crate::launch;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vm_spec::run_state::{FILE_NAME, ProcessRole, RunState};

/// How often the kernel's list of locks is looked at before a VM is taken for over. It is read piece by piece,
/// and a lock that someone else lets go meanwhile hides another one.
const LOOKS: usize = 8;

/// A VM that runs.
pub(super) struct RunningVm {
    pub(super) folder: PathBuf,
    pub(super) state: RunState,
    /// Its spawner.
    pub(super) pid: i32,
}

/// Those that run; one that is about to has no state yet.
fn running() -> Result<Vec<RunningVm>, Failure> {
    let folders = launch::run_folders()?;
    Ok(folders.into_iter().filter_map(RunningVm::of).collect())
}

/// The one called `name`.
///
/// # Errors
/// A [`Failure`] when there is none.
pub(super) fn find(name: &str) -> Result<RunningVm, Failure> {
    let mut all = running()?.into_iter();
    all.find(|vm| vm.name() == name).ok_or_else(|| {
        let [first, second] = launch::run_places();
        Failure::usage(format!("no VM '{name}' runs"))
            .cause(format!("none in {} or {}", first.display(), second.display()))
            .hint("bulkhead ps names those that run")
    })
}

impl RunningVm {
    fn of(folder: PathBuf) -> Option<Self> {
        let state: RunState = serde_json::from_slice(&read(&folder)?).ok()?;
        let spawner = state.processes.iter().find(|p| p.role == ProcessRole::Spawner)?;
        let vm = Self {
            pid: spawner.pid,
            folder,
            state,
        };
        vm.runs().then_some(vm)
    }

    /// The folder's, since that is what other verbs know it by.
    pub(super) fn name(&self) -> &str {
        self.folder
            .file_name()
            .unwrap_or_default()
            .to_str()
            .unwrap_or_default()
    }

    /// Whether it is not over yet.
    pub(super) fn runs(&self) -> bool {
        (0..LOOKS).any(|_| launch::is_run_by(&self.folder, self.pid).unwrap_or(false))
    }

    pub(super) fn phase(&self) -> &'static str {
        match (self.state.first_instruction_ns, self.state.ended_ns) {
            (_, Some(_)) => "ending",
            (Some(_), None) => "running",
            (None, None) => "starting",
        }
    }

    pub(super) fn up(&self) -> Duration {
        Duration::from_nanos(monotonic_ns().saturating_sub(self.state.launched_ns))
    }

    /// The role of the process of ours that serves `device`.
    ///
    /// # Errors
    /// A [`Failure`] when there is none.
    pub(super) fn role_of(&self, device: &str) -> Result<ProcessRole, Failure> {
        let mut devices = self.state.processes.iter().filter(|p| p.role.is_device());
        let process = devices.find(|process| process.name == device);
        process.map(|process| process.role).ok_or_else(|| {
            let name = self.name();
            let what = format!("the VM '{name}' has no device '{device}' that a process of ours serves");
            self.naming(Failure::usage(what))
        })
    }

    /// With a hint at what is there.
    pub(super) fn naming(&self, failure: Failure) -> Failure {
        failure.hint(format!("bulkhead inspect {} names its devices", self.name()))
    }

    /// Those with a process of ours.
    pub(super) fn devices(&self) -> impl Iterator<Item = &str> {
        let devices = self.state.processes.iter().filter(|p| p.role.is_device());
        devices.map(|process| process.name.as_str())
    }
}

fn read(folder: &Path) -> Option<Vec<u8>> {
    fs::read(folder.join(FILE_NAME)).ok()
}

/// All of them, a line or an object each.
///
/// # Errors
/// A [`Failure`] when the run-time folder is not this user's.
pub(super) fn show(json: bool) -> Result<String, Failure> {
    let all = running()?;
    Ok(if json { to_json(&all) } else { to_text(&all) })
}

fn to_text(all: &[RunningVm]) -> String {
    let mut out = String::new();
    let wide = all.iter().map(|vm| vm.name().len()).max().unwrap_or(0).max(4);
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{:wide$}  {:>7}  {:8}  {:>9}  DEVICES",
        "NAME", "PID", "STATE", "UP"
    );
    for vm in all {
        let devices: Vec<_> = vm.devices().collect();
        let line = format!(
            "{:wide$}  {:>7}  {:8}  {:>9}  {}",
            vm.name(),
            vm.pid,
            vm.phase(),
            in_words(vm.up()),
            devices.join(",")
        );
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

/// The two largest units.
pub(super) fn in_words(time: Duration) -> String {
    let seconds = time.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, ..) => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

fn to_json(all: &[RunningVm]) -> String {
    let all: Vec<_> = all
        .iter()
        .map(|vm| {
            serde_json::json!({
                "name": vm.name(),
                "pid": vm.pid,
                "state": vm.phase(),
                "since": vm.state.launched_unix,
                "devices": vm.devices().collect::<Vec<_>>(),
            })
        })
        .collect();
    format!("{:#}\n", serde_json::Value::Array(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short_to_read() {
        let words = |seconds| in_words(Duration::from_secs(seconds));
        assert_eq!(words(59), "59s");
        assert_eq!(words(61), "1m 1s");
        assert_eq!(words(3600 + 120), "1h 2m");
        assert_eq!(words(86400 * 9 + 7200), "9d 2h");
    }
}
