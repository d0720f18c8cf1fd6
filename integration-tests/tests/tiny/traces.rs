//! What a running VM has on the host, and what of it is left.

use anyhow::Result;
use integration_tests::process::Listed;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Namespaces in which something of the host could stay behind: mounts, TAPs, sockets.
const NAMESPACES: [&str; 4] = ["mnt", "net", "pid", "cgroup"];

/// Everything that a VM's processes have of their own.
#[derive(Debug)]
pub(crate) struct Traces {
    processes: BTreeSet<Listed>,
    /// What `/proc/PID/ns/*` links to, where it is not our own.
    namespaces: BTreeSet<PathBuf>,
    cgroups: BTreeSet<PathBuf>,
    /// Run-time folder and place of temporary files.
    folder: PathBuf,
}

impl Traces {
    /// Of `spawner` and all below it.
    pub(crate) fn of(spawner: i32, folder: &Path) -> Result<Self> {
        let all = processes()?;
        let mut tree: BTreeSet<Listed> = all.iter().filter(|one| one.pid == spawner).cloned().collect();
        loop {
            let below: Vec<_> = all
                .iter()
                .filter(|one| !tree.contains(*one) && tree.iter().any(|up| up.pid == one.parent))
                .cloned()
                .collect();
            if below.is_empty() {
                break;
            }
            tree.extend(below);
        }
        let pids = || tree.iter().map(|one| one.pid.to_string());
        let own = namespaces("self");
        Ok(Self {
            namespaces: pids()
                .flat_map(|pid| namespaces(&pid))
                .filter(|link| !own.contains(link))
                .collect(),
            cgroups: pids()
                .flat_map(|pid| cgroups(&pid))
                .filter(|path| !cgroups("self").contains(path))
                .collect(),
            processes: tree,
            folder: folder.to_owned(),
        })
    }

    /// How many processes there are.
    pub(crate) fn processes(&self) -> usize {
        self.processes.len()
    }

    /// What is still there, in words.
    pub(crate) fn left(&self) -> Result<Vec<String>> {
        let running = processes()?;
        let mut left: Vec<String> = running
            .iter()
            .filter(|one| {
                self.processes
                    .iter()
                    .any(|was| was.pid == one.pid && was.started == one.started)
            })
            .map(|one| format!("process {}", one.pid))
            .collect();
        for one in &running {
            // A TAP, a mount or a bound socket in a namespace lasts as long as someone is in there.
            let held = namespaces(&one.pid.to_string());
            left.extend(
                held.intersection(&self.namespaces)
                    .map(|link| format!("{} of process {}", link.display(), one.pid)),
            );
        }
        let cgroups = self.cgroups.iter().filter(|path| path.exists());
        left.extend(cgroups.map(|path| format!("cgroup {}", path.display())));
        let files = fs::read_dir(&self.folder)?.flatten();
        left.extend(files.map(|entry| format!("file {}", entry.path().display())));
        for table in ["/proc/self/mountinfo", "/proc/net/unix"] {
            let text = fs::read_to_string(table)?;
            let ours = text
                .lines()
                .filter(|line| line.contains(&*self.folder.to_string_lossy()));
            left.extend(ours.map(|line| format!("{table}: {line}")));
        }
        Ok(left)
    }
}

/// Every process that runs.
fn processes() -> Result<Vec<Listed>> {
    let entries = fs::read_dir("/proc")?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok());
    // Those that end meanwhile are left out.
    Ok(pids.filter_map(Listed::find).collect())
}

fn namespaces(pid: &str) -> BTreeSet<PathBuf> {
    let link = |name: &&str| fs::read_link(format!("/proc/{pid}/ns/{name}")).ok();
    NAMESPACES.iter().filter_map(link).collect()
}

/// The folders of a process's cgroups.
fn cgroups(pid: &str) -> BTreeSet<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let folder = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        Some(
            Path::new("/sys/fs/cgroup")
                .join(controllers)
                .join(path.trim_start_matches('/')),
        )
    };
    text.lines().filter_map(folder).collect()
}
