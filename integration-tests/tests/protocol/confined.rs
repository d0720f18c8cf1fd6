//! Back ends that were started by hand are confined before a front end is heard.

use crate::fixture::{Target, traced};
use anyhow::{Context, Result, bail, ensure};
use integration_tests::{
    frontend_harness::{Connection, DEADLINE, request},
    process::{Process, connect},
    suite::{Skip, need_jail, test},
};
use libtest_mimic::Trial;
use nix::unistd::Uid;
use std::fs;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("confined::disk", || threads(Target::Disk)),
        test("confined::nic", || threads(Target::Nic)),
        test("confined::disk_has_no_paths", paths),
    ]
}

/// A filter on each thread, no capability, and none to gain by executing something.
fn threads(target: Target) -> Result<()> {
    need_jail()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("sock");
    let (mut command, _served) = target.command()?;
    command.arg(format!("--socket-path={}", path.display()));
    let process = Process::start(command)?;
    let mut connection = Connection::new(connect(&path, DEADLINE)?, DEADLINE);
    connection.ask(request::GET_FEATURES, &[], &[])?;
    let mut filters = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", process.pid()))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let value = |field| -> Result<&str> {
            let value = status.lines().find_map(|line| line.strip_prefix(field));
            Ok(value.with_context(|| format!("no {field} in {status}"))?.trim())
        };
        ensure!(value("NoNewPrivs:")? == "1", "{status}");
        ensure!(value("Seccomp:")? == "2", "{status}");
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            ensure!(u64::from_str_radix(value(set)?, 16)? == 0, "{status}");
        }
        // Who had none at the start cannot empty this set, and gains nothing by it.
        if Uid::effective().is_root() {
            ensure!(u64::from_str_radix(value("CapBnd:")?, 16)? == 0, "{status}");
        }
        filters.push(value("Seccomp_filters:")?.parse::<u32>()?);
    }
    ensure!(filters.len() > 1, "a queue has no thread");
    // What the first thread had before there were others is theirs, too: each has its own besides.
    ensure!(
        filters.iter().all(|count| *count == filters[0]),
        "{filters:?} filters"
    );
    Ok(())
}

/// Landlock on each thread, which nothing but the calls themselves shows from outside.
fn paths() -> Result<()> {
    need_jail()?;
    let folder = tempfile::tempdir()?;
    let (socket, calls) = (folder.path().join("sock"), folder.path().join("calls"));
    let (command, _served) = Target::Disk.command()?;
    let mut traced = traced(&command, "/^landlock_", &calls)?;
    traced.arg(format!("--socket-path={}", socket.display()));
    let process = Process::start(traced)?;
    let mut connection = Connection::new(connect(&socket, DEADLINE)?, DEADLINE);
    connection.ask(request::GET_FEATURES, &[], &[])?;
    let calls = fs::read_to_string(&calls)?;
    let successes = |call: &str| {
        let of_it = calls.lines().filter(|line| line.contains(call));
        of_it.filter(|line| !line.contains(" = -1 ")).count()
    };
    // Whoever asks the kernel for it learns that there is none.
    ensure!(
        calls.contains("landlock_create_ruleset("),
        "nobody asks for Landlock"
    );
    if successes("landlock_create_ruleset(") == 0 {
        bail!(Skip("no Landlock on this host".to_owned()));
    }
    let threads = fs::read_dir(format!("/proc/{}/task", process.pid()))?.count();
    let restricted = successes("landlock_restrict_self(");
    ensure!(
        restricted == threads,
        "{restricted} of {threads} threads: {calls}"
    );
    Ok(())
}
