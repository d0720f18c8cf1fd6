//! Back ends that were started by hand are confined before a front end is heard.

use crate::fixture::Target;
use anyhow::{Context, Result, ensure};
use integration_tests::{
    frontend_harness::{Connection, DEADLINE, request},
    process::{Process, connect},
    suite::{need_jail, test},
};
use libtest_mimic::Trial;
use std::fs;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("confined::disk", || threads(Target::Disk)),
        test("confined::nic", || threads(Target::Nic)),
    ]
}

/// A filter on each thread, and nothing to gain by executing something.
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
