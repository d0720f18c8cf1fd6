//! `bulkhead upgrade VM [DEVICE] --binary NEW`: running device processes are replaced by another
//! build, while the guest works.

use super::connection::{Connection, not_finished};
use super::{print, ps};
use crate::failure::Failure;
use std::fs::File;
use std::path::Path;
use std::time::Duration;
use vm_spec::client::{Answer, Request};
use vm_spec::run_state::{ProcessRole, RunState};

/// For one device: its drain, the new build's start, and the old one's if that fails.
const UPGRADE_DEADLINE: Duration = Duration::from_secs(120);

/// Upgrades one device, or all that the binary, by its file's name, is for; prints what happened, a line
/// for each. The exit code.
///
/// # Errors
/// A [`Failure`] when no such VM or device runs, or a new process does not serve (then the old
/// build does, and the devices behind it are left as they are).
pub(super) fn upgrade(vm: &str, device: Option<&str>, binary: &Path) -> Result<u8, Failure> {
    let running = ps::find(vm)?;
    let file = File::open(binary)
        .map_err(|e| Failure::usage(format!("--binary: cannot open {}", binary.display())).because(&e))?;
    let names = match device {
        Some(name) => vec![name.to_owned()],
        None => suitable(&running.state, binary)?,
    };
    let mut connection = Connection::open(&running)?;
    for name in names {
        let before = running
            .state
            .processes
            .iter()
            .find(|process| process.name == name);
        let before = before.map_or(0, |process| process.pid);
        match connection.ask(
            Request::Upgrade { device: name.clone() },
            Some(&file),
            UPGRADE_DEADLINE,
        )? {
            Answer::Upgraded { pid, took_us } => {
                let (ms, us) = (took_us / 1000, took_us % 1000);
                print(&format!(
                    "{name}: pid {before} -> {pid}, the guest waited {ms}.{us:03} ms\n"
                ))?;
            }
            answer => {
                let hint = "the build that served before serves on";
                return Err(not_finished(format!("{name} was not upgraded"), answer, hint));
            }
        }
    }
    Ok(0)
}

/// The devices whose processes are of the kind that the file's name says.
fn suitable(state: &RunState, binary: &Path) -> Result<Vec<String>, Failure> {
    let name = binary.file_name().unwrap_or_default().to_string_lossy();
    let role = [
        ("vhost-user-blk", ProcessRole::Disk),
        ("vhost-user-net", ProcessRole::Net),
    ]
    .into_iter()
    .find_map(|(prefix, role)| name.starts_with(prefix).then_some(role))
    .ok_or_else(|| {
        Failure::usage(format!("--binary: '{name}' does not say which devices it is for"))
            .hint("name the device: bulkhead upgrade VM DEVICE --binary FILE")
    })?;
    let names: Vec<_> = state
        .processes
        .iter()
        .filter(|process| process.role == role)
        .map(|process| process.name.clone())
        .collect();
    if names.is_empty() {
        return Err(Failure::usage("the VM has no device that this binary is for"));
    }
    Ok(names)
}
