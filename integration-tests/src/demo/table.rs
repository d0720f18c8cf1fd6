//! What the kernel says about each process of a running VM.

use anyhow::Context;
use serde_json::Value;
use std::fmt::Write;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use vm_spec::run_state::{ProcessState, RunState};

/// The namespaces that a jailed process has of its own.
const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];
/// Seccomp mode "filter" in /proc/PID/status.
const FILTER: u8 = 2;

/// One process, as seen from outside.
#[derive(Debug)]
pub(super) struct Row {
    name: String,
    pid: i32,
    jailed: bool,
    uid_out: u32,
    uid_in: Option<u32>,
    /// Names of the namespaces that differ from the demo's own.
    namespaces: Vec<&'static str>,
    /// The least of all threads' modes.
    seccomp: u8,
    /// System calls that its filter allows, where it has one.
    allowed: Option<usize>,
    fds: Option<u64>,
    /// KiB, without the guest's RAM.
    pss: u64,
}

/// Looks at every process of the VM.
///
/// # Errors
/// A process is gone, or its `/proc` cannot be read.
pub(super) fn look(state: &RunState, bulkhead: &Path) -> anyhow::Result<Vec<Row>> {
    let row = |process: &ProcessState| {
        look_at(process, bulkhead)
            .with_context(|| format!("looking at process {} ({})", process.name, process.pid))
    };
    state.processes.iter().map(row).collect()
}

/// The first jailed process that is not confined as it should be, in words.
pub(super) fn flaw(rows: &[Row]) -> Option<String> {
    let jailed = rows.iter().filter(|row| row.jailed);
    let flaws = jailed.filter_map(|row| {
        let missing: Vec<_> = NAMESPACES
            .into_iter()
            .filter(|name| !row.namespaces.contains(name))
            .collect();
        match (row.seccomp, missing.is_empty()) {
            (FILTER, true) => None,
            (FILTER, false) => Some(format!(
                "{} shares the host's {} namespace",
                row.name,
                missing.join(", ")
            )),
            (mode, _) => Some(format!("{} has a thread in seccomp mode {mode}", row.name)),
        }
    });
    flaws.into_iter().next()
}

/// The table, one line a process and a sum.
pub(super) fn render(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<12} {:>7} {:>7} {:>6}  {:<32} {:>7} {:>6} {:>4} {:>9}\n",
        "process", "pid", "uid out", "uid in", "own namespaces", "seccomp", "calls", "fds", "PSS KiB"
    );
    let dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    for row in rows {
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "{:<12} {:>7} {:>7} {:>6}  {:<32} {:>7} {:>6} {:>4} {:>9}",
            row.name,
            row.pid,
            row.uid_out,
            dash(row.uid_in.map(|uid| uid.to_string())),
            if row.namespaces.is_empty() {
                "-".to_owned()
            } else {
                row.namespaces.join(" ")
            },
            row.seccomp,
            dash(row.allowed.map(|count| count.to_string())),
            dash(row.fds.map(|count| count.to_string())),
            row.pss
        );
    }
    let sum: u64 = rows.iter().map(|row| row.pss).sum();
    let _ = writeln!(
        text,
        "PSS without guest RAM, all processes: {:.2} MiB",
        sum as f64 / 1024.0
    );
    text
}

fn look_at(process: &ProcessState, bulkhead: &Path) -> anyhow::Result<Row> {
    let proc = PathBuf::from(format!("/proc/{}", process.pid));
    let status = read(&proc.join("status"))?;
    let uid_out = field(&status, "Uid")
        .and_then(|uid| uid.parse().ok())
        .context("no uid in status")?;
    let differs = |name: &&'static str| {
        let link = |process: &Path| std::fs::read_link(process.join("ns").join(name)).ok();
        let theirs = link(&proc);
        theirs.is_some() && theirs != link(Path::new("/proc/self"))
    };
    let seccomp = least_seccomp(&proc)?;
    let role = process.role.policy().filter(|_| seccomp == FILTER);
    Ok(Row {
        name: process.name.clone(),
        pid: process.pid,
        jailed: process.jailed,
        uid_out,
        uid_in: uid_inside(&read(&proc.join("uid_map"))?, uid_out),
        namespaces: NAMESPACES.into_iter().filter(differs).collect(),
        seccomp,
        allowed: role.and_then(|role| allowed_calls(bulkhead, role)),
        fds: open_files(&proc.join("fd")).context("fd")?,
        pss: pss_without_ram(&read(&proc.join("smaps"))?),
    })
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// The first word of a field of `/proc/PID/status`.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()
}

/// How many files are open, by their folder in `/proc`. Where a VM's processes are users of their own, only those may
/// list it; its size says as much to all, from Linux 6.2 on.
fn open_files(folder: &Path) -> std::io::Result<Option<u64>> {
    match std::fs::read_dir(folder) {
        Ok(files) => Ok(Some(files.count() as u64)),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Ok(Some(folder.metadata()?.len()).filter(|size| *size > 0))
        }
        Err(error) => Err(error),
    }
}

fn least_seccomp(proc: &Path) -> anyhow::Result<u8> {
    let mut least = FILTER;
    for task in std::fs::read_dir(proc.join("task"))? {
        let status = read(&task?.path().join("status"))?;
        let mode = field(&status, "Seccomp")
            .and_then(|mode| mode.parse().ok())
            .context("no seccomp mode")?;
        least = least.min(mode);
    }
    Ok(least)
}

/// The user id inside the process's namespace: lines of `uid_map` are inside, outside, length.
fn uid_inside(map: &str, outside: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let (inner, outer, length) = (
            numbers.next()?.ok()?,
            numbers.next()?.ok()?,
            numbers.next()?.ok()?,
        );
        let offset = outside.checked_sub(outer).filter(|offset| *offset < length)?;
        inner.checked_add(offset)
    })
}

/// Sum of the mappings' proportional set sizes, without those of a memfd: the guest's RAM.
fn pss_without_ram(smaps: &str) -> u64 {
    let mut sum = 0;
    let mut ram = false;
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            ram = line.contains("/memfd:") && line.contains("ram");
        } else if first == "Pss:" && !ram {
            sum += line
                .split_whitespace()
                .nth(1)
                .and_then(|size| size.parse::<u64>().ok())
                .unwrap_or(0);
        }
    }
    sum
}

/// How many system calls a role's policy allows, as the launcher itself tells.
fn allowed_calls(bulkhead: &Path, role: &str) -> Option<usize> {
    let output = Command::new(bulkhead)
        .args(["policy", "show", role, "--json"])
        .output()
        .ok()?;
    let policy: Value = serde_json::from_slice(&output.stdout).ok()?;
    let rules = policy
        .get("rules")
        .or_else(|| policy.get("syscalls"))
        .unwrap_or(&policy)
        .as_array()?;
    let name = |rule: &Value| {
        rule.as_str()
            .or_else(|| rule.get("syscall")?.as_str())
            .map(str::to_owned)
    };
    let names: std::collections::BTreeSet<String> = rules.iter().filter_map(name).collect();
    (!names.is_empty()).then_some(names.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_are_looked_up_in_the_map() {
        assert_eq!(uid_inside("         0       1000          1\n", 1000), Some(0));
        assert_eq!(uid_inside("0 0 4294967295\n", 7), Some(7));
        assert_eq!(uid_inside("0 100 10\n", 110), None);
    }

    #[test]
    fn guest_ram_is_left_out_of_the_sum() {
        let smaps = "7f00-7f01 rw-s 0 00:01 5 /memfd:guest-ram (deleted)\nRss: 9 kB\nPss:  900 kB\n\
                     7f02-7f03 r-xp 0 08:01 5 /usr/bin/x\nPss:   7 kB\nPss_Dirty: 5 kB\n";
        assert_eq!(pss_without_ram(smaps), 7);
    }

    #[test]
    fn a_process_of_another_user_is_no_failure() {
        // This thread alone becomes somebody who may not list the files of process 1.
        let nobody = nix::unistd::Uid::from_raw(crate::lent::NOBODY);
        nix::unistd::setfsuid(nobody);
        let folder = Path::new("/proc/1/fd");
        assert!(std::fs::read_dir(folder).is_err());
        assert!(open_files(folder).is_ok());
        assert!(open_files(Path::new("/proc/1/no-such-folder")).is_err());
    }

    #[test]
    fn a_shared_namespace_is_a_flaw() {
        let mut row = Row {
            name: "disk0".into(),
            pid: 1,
            jailed: true,
            uid_out: 1,
            uid_in: Some(0),
            namespaces: NAMESPACES.to_vec(),
            seccomp: FILTER,
            allowed: None,
            fds: Some(4),
            pss: 1,
        };
        assert_eq!(flaw(std::slice::from_ref(&row)), None);
        row.namespaces.retain(|name| *name != "net");
        assert!(flaw(&[row]).unwrap().contains("net namespace"));
    }
}
