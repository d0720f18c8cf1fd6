//! The processes that are not replaced: when one of them is killed the whole VM ends, nothing of it
//! is left, and every block that was flushed is in the image.

use crate::storm::{DEADLINE, Image, Storm};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    host::Host,
    process::Listed,
    suite::{full, test_within},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    thread,
    time::{Duration, Instant},
};
use vm_spec::run_state::{ProcessRole, RunState};

/// Nothing of a VM is left after this time.
const GONE: Duration = Duration::from_secs(2);
/// The guest writes this many blocks from flush to flush.
const BATCH: u64 = 8;

pub(crate) fn tests() -> Vec<Trial> {
    let rounds = if full() { 30 } else { 3 };
    let roles = [
        ("vmm", ProcessRole::Vmm),
        ("supervisor", ProcessRole::Supervisor),
        ("spawner", ProcessRole::Spawner),
    ];
    let with = |image: Image| roles.map(|(name, role)| (image, name, role));
    [Image::Raw, Image::Qcow2]
        .into_iter()
        .flat_map(with)
        .map(|(image, name, role)| {
            let limit = Duration::from_secs(60 + 5 * rounds);
            let name = format!("durable::{}_without_its_{name}", image.name());
            test_within(limit, name, move || {
                (1..=rounds).try_for_each(|round| survives(image, role, round))
            })
        })
        .collect()
}

/// Kills the process once the guest has seen a number of flushes that differs from round to round.
fn survives(image: Image, role: ProcessRole, round: u64) -> Result<()> {
    Host::need_kvm()?;
    let mut storm = Storm::of("scenario=flushed", image, "disk0", None)?;
    let wanted = BATCH * (2 + 7 * round);
    storm
        .run
        .console
        .wait_line(&format!("flushed={wanted}"), DEADLINE)
        .with_context(|| storm.run.process.stderr().unwrap_or_default())?;
    let state = storm.run.state(DEADLINE)?;
    strike(&state, role)?;
    wait_gone(&mut storm.run, &state, GONE)?;
    storm.run.console.finish(DEADLINE)?;
    let flushed = storm.run.console.number("flushed")?;
    ensure!(flushed >= wanted, "{flushed}");
    storm.check_blocks(flushed)
}

/// Kills the process of this role.
pub(crate) fn strike(state: &RunState, role: ProcessRole) -> Result<()> {
    let process = state.processes.iter().find(|process| process.role == role);
    let pid = process.context("no such process")?.pid;
    Ok(kill(Pid::from_raw(pid), Signal::SIGKILL)?)
}

/// Waits until nothing of the VM is left; how long that took.
pub(crate) fn wait_gone(run: &mut Run, state: &RunState, deadline: Duration) -> Result<Duration> {
    let began = Instant::now();
    loop {
        // Reaps the spawner: until then it is there, if only as a zombie.
        run.process.alive()?;
        let listed = state.processes.iter();
        let left: Vec<_> = listed.filter_map(|process| Listed::find(process.pid)).collect();
        if left.is_empty() && !run.run_folder().exists() {
            return Ok(began.elapsed());
        }
        ensure!(began.elapsed() < deadline, "left after {deadline:?}: {left:?}");
        thread::sleep(Duration::from_millis(2));
    }
}
