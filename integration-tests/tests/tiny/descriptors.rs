//! What a process of a VM holds open, against what `--dry-run` printed: nothing more, nothing less.

use anyhow::{Context, Result, ensure};
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use vm_spec::run_state::{FdLink, Kept, MadeFds, ProcessState, RunState};

/// Messages that are under way have been dealt with by then.
const SETTLED: Duration = Duration::from_secs(2);
/// Between two looks at what a process has open.
const LOOK: Duration = Duration::from_millis(10);

/// `/proc/PID/fd`: what each number links to.
pub(crate) fn open(pid: i32) -> Result<BTreeMap<i32, String>> {
    let folder = Path::new("/proc").join(pid.to_string()).join("fd");
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let number = entry.file_name().to_string_lossy().parse()?;
        let link = fs::read_link(entry.path())?;
        all.insert(number, link.to_string_lossy().into_owned());
    }
    Ok(all)
}

/// The descriptors of `process` are those of the table that `printed` ends up in: given ones under
/// their numbers, then those that it makes or is sent, each kind within its bounds.
///
/// # Errors
/// Naming what is missing, or too much.
pub(crate) fn exact(process: &ProcessState, state: &RunState, printed: &str) -> Result<()> {
    is_printed(process, printed)?;
    let end = Instant::now() + SETTLED;
    loop {
        match look(process, state) {
            // A message's descriptor is open for as long as the message is dealt with.
            Err(_) if Instant::now() < end => thread::sleep(LOOK),
            looked => return looked,
        }
    }
}

fn look(process: &ProcessState, state: &RunState) -> Result<()> {
    let mut rest = open(process.pid)?;
    for fd in &process.fds {
        match fd.kept {
            Kept::Always => drop(
                rest.remove(&fd.number)
                    .with_context(|| format!("fd {} ({}) is not open", fd.number, fd.what))?,
            ),
            Kept::UntilEndOfFile => drop(rest.remove(&fd.number)),
            // Its number may be that of another by now, which has to be one of `made`.
            Kept::UntilLockdown => {}
        }
    }
    for kind in &process.made {
        let found = take(&mut rest, kind, state)?;
        ensure!(
            found >= kind.least,
            "{found} of at least {} {} ({:?})",
            kind.least,
            kind.what,
            kind.link
        );
    }
    ensure!(rest.is_empty(), "--dry-run does not print {rest:?}");
    Ok(())
}

/// Takes what is of this kind, at most as many as there may be, and says how many.
fn take(rest: &mut BTreeMap<i32, String>, kind: &MadeFds, state: &RunState) -> Result<u32> {
    let target = match &kind.link {
        FdLink::Named(_) => None,
        FdLink::SameAs { process, number } => {
            let other = state.processes.iter().find(|one| one.name == *process);
            let other = other.with_context(|| format!("no process {process}"))?;
            open(other.pid)?.remove(number)
        }
    };
    let is_one = |link: &String| match &kind.link {
        FdLink::Named(start) => link.starts_with(start),
        FdLink::SameAs { .. } => Some(link) == target.as_ref(),
    };
    let most = kind.most.map_or(usize::MAX, |most| most as usize);
    let numbers: Vec<i32> = rest
        .iter()
        .filter(|(_, link)| is_one(link))
        .map(|(number, _)| *number)
        .take(most)
        .collect();
    for number in &numbers {
        rest.remove(number);
    }
    Ok(u32::try_from(numbers.len())?)
}

/// `--dry-run` has a line for each, below the process's name.
fn is_printed(process: &ProcessState, printed: &str) -> Result<()> {
    let mut lines = printed
        .lines()
        .skip_while(|line| *line != format!("process {}", process.name))
        .skip(1)
        .take_while(|line| line.starts_with(' '));
    let fds: Vec<&str> = lines
        .by_ref()
        .filter(|line| line.starts_with("  fd ") || line.starts_with("  makes "))
        .collect();
    ensure!(
        fds.len() == process.fds.len() + process.made.len(),
        "--dry-run prints {fds:?}"
    );
    for fd in &process.fds {
        let line = format!("  fd {} {}", fd.number, fd.what);
        ensure!(
            fds.iter().any(|have| have.starts_with(&line)),
            "--dry-run does not print {line:?}"
        );
    }
    for kind in &process.made {
        ensure!(
            fds.iter().any(|have| have.ends_with(&kind.what)),
            "--dry-run does not print {:?}",
            kind.what
        );
    }
    Ok(())
}
