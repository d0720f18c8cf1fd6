//! Deaths at each step of a request, and hangs that are no death, forced by a build of the disk
//! process that exists for tests only.

use crate::storm::{Image, Stalls, Storm, faulty_binaries};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    host::Host,
    suite::{full, test_within},
};
use libtest_mimic::Trial;
use std::time::{Duration, Instant};
use vm_spec::events::{EventKind, VmEvent};

/// The steps by the names that `vhost_daemon::faults` gives them.
const STEPS: [&str; 13] = [
    "take-before",
    "take-after",
    "submit-before",
    "submit-after",
    "complete-before",
    "complete-after",
    "publish-before",
    "publish-linked",
    "publish-elements",
    "publish-index",
    "publish-after",
    "notify-before",
    "notify-after",
];

pub(crate) fn tests() -> Vec<Trial> {
    let (kills, limit) = if full() { (100, 300) } else { (10, 120) };
    let limit = Duration::from_secs(limit);
    let mut tests: Vec<_> = STEPS
        .into_iter()
        .map(|step| {
            test_within(limit, format!("forced::dies_at_{step}"), move || {
                dies(step, kills)
            })
        })
        .collect();
    tests.push(test_within(
        limit,
        "forced::a_queue_that_spins_is_replaced",
        spins,
    ));
    tests.push(test_within(limit, "forced::a_slow_disk_is_no_hang (waits)", slow));
    tests
}

/// Every process dies at `step`, from 150 ms of life on.
fn dies(step: &str, kills: u64) -> Result<()> {
    Host::need_kvm()?;
    let bins = faulty_binaries()?;
    let storm = Storm::start(Image::Qcow2, &format!("bad.{step}"), Some(bins.path()))?;
    each_dies(storm, step, kills)
}

/// Lets the storm's processes die so often at `step`, and then compares everything.
pub(crate) fn each_dies(mut storm: Storm, step: &str, kills: u64) -> Result<()> {
    let limit = Duration::from_secs(30 + kills);
    let reached = storm
        .victim
        .wait_count(&storm.run, EventKind::Died, kills, limit)
        .with_context(|| storm.run.process.stderr().unwrap_or_default())?;
    ensure!(
        reached.detail.contains("signal 4"),
        "not the death that was wanted: {reached:?}"
    );
    let calm = storm.calm()?;
    let stalls = Stalls::of(calm.events.iter());
    stalls.judge(step)?;
    // On a busy host some die before they are joined.
    ensure!(stalls.count() as u64 * 2 >= kills, "{:?}", calm.events);
    Ok(())
}

/// The session's thread answers, the queue's does not: the process finds that itself.
fn spins() -> Result<()> {
    Host::need_kvm()?;
    let bins = faulty_binaries()?;
    let mut storm = Storm::start(Image::Raw, "bad.spin", Some(bins.path()))?;
    let limit = Duration::from_secs(60);
    // On a busy host one may be given no CPU for so long that it is missed as silent first.
    let spins = |event: &VmEvent| event.event == EventKind::Hung && event.detail.contains("spins");
    let hung = storm.victim.wait_for(&storm.run, limit, spins)?;
    let next = |event: &VmEvent| event.event == EventKind::Restarted && event.count >= hung.count;
    let restarted = storm.victim.wait_for(&storm.run, limit, next)?;
    ensure!(restarted.pid != hung.pid, "{hung:?} {restarted:?}");
    // Each successor spins in its turn, so that this guest is not let finish.
    let events = storm.victim.events(&storm.run)?;
    let died = events.iter().find(|event| event.event == EventKind::Died);
    ensure!(died.is_none(), "a hung process is not one that died: {died:?}");
    Ok(())
}

/// Flushes of 10 s: the guest waits for them, and nothing else happens.
fn slow() -> Result<()> {
    Host::need_kvm()?;
    let bins = faulty_binaries()?;
    let mut storm = Storm::start(Image::Raw, "bad.slow-flush", Some(bins.path()))?;
    // The first flush comes within a moment.
    let end = Instant::now() + Duration::from_secs(60);
    while !storm.run.process.stderr()?.contains("a flush was 10s slower") {
        ensure!(
            Instant::now() < end,
            "no flush was slow: {}",
            storm.run.process.stderr()?
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    let events = storm.victim.events(&storm.run).unwrap_or_default();
    ensure!(events.is_empty(), "{events:?}");
    let calm = storm.calm()?;
    ensure!(calm.events.is_empty(), "{:?}", calm.events);
    Ok(())
}
