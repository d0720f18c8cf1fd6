//! A process that dies again and again, and one that stops: what the supervisor does about them.

use crate::victim::Victim;
use anyhow::{Context, Result, ensure};
use integration_tests::{
    host::Host,
    suite::{Skip, test},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use std::{
    fs::File,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use vm_spec::{events::EventKind, run_state::ProcessRole};

const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("limits::gives_up_and_the_vm_lives (waits)", gives_up),
        test("limits::the_net_process_is_replaced", net),
        test("limits::events_tell_what_happened", events),
    ]
}

fn halted(folder: &TempDir) -> Result<Run> {
    Host::need_kvm()?;
    let path = folder.path().join("disk");
    File::create(&path)?.set_len(16 << 20)?;
    let flags = [
        format!("--disk=path={},format=raw", path.display()),
        "--power-off-grace=1".to_owned(),
    ];
    let mut run = Run::tiny("scenario=hlt", &flags)?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    Ok(run)
}

fn gives_up() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut run = halted(&folder)?;
    let mut victim = Victim::new(ProcessRole::Disk);
    let mut kills = 0;
    let fault = loop {
        ensure!(kills < 100, "{kills} kills, and never given up");
        ensure!(
            victim.strike(&mut run, Signal::SIGKILL, DEADLINE)?,
            "the VM ended: {}",
            run.process.stderr()?
        );
        kills += 1;
        // The next process, which is to serve as little as can be, or the end of all of them.
        let end = Instant::now() + DEADLINE;
        let fault = loop {
            let events = victim.events(&run).unwrap_or_default();
            let lost = events
                .into_iter()
                .find(|event| event.event == EventKind::NeedsReset);
            if lost.is_some() || victim.is_replaced(&run) {
                break lost;
            }
            ensure!(
                Instant::now() < end,
                "neither replaced nor given up: {}",
                run.process.stderr()?
            );
            thread::sleep(Duration::from_millis(1));
        };
        if let Some(fault) = fault {
            break fault;
        }
    };
    ensure!(fault.detail.contains("in a row"), "{fault:?}");
    ensure!(run.process.alive()?, "the VM ended: {}", run.process.stderr()?);
    let words = run.process.stderr()?;
    let lines = words
        .lines()
        .filter(|line| line.starts_with("bulkhead: disk0: the device needs a reset"));
    ensure!(lines.count() == 1, "not one line says why: {words}");
    Ok(())
}

/// The TAP is the spawner's: each successor works on the same one.
fn net() -> Result<()> {
    Host::need_kvm()?;
    if !Path::new("/dev/net/tun").exists() {
        return Err(Skip("this host has no TAPs".into()).into());
    }
    let flags = [
        "--net=private=10.213.8.1/24".to_owned(),
        "--power-off-grace=1".to_owned(),
    ];
    let mut run = Run::tiny("scenario=hlt", &flags)?;
    run.console.wait_line("ready=1", DEADLINE)?;
    let mut victim = Victim::new(ProcessRole::Net);
    for kill in 1..=5 {
        ensure!(
            victim.strike(&mut run, Signal::SIGKILL, DEADLINE)?,
            "the VM ended"
        );
        ensure!(victim.wait_restarted(&mut run, DEADLINE)?, "the VM ended");
        let events = victim.events(&run).unwrap_or_default();
        let restarts = events.iter().filter(|e| e.event == EventKind::Restarted);
        ensure!(restarts.count() == kill, "{events:?}");
    }
    Ok(())
}

fn events() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut run = halted(&folder)?;
    let mut victim = Victim::new(ProcessRole::Disk);
    ensure!(victim.strike(&mut run, Signal::SIGKILL, DEADLINE)?);
    let restarted = victim.wait_event(&run, EventKind::Restarted, DEADLINE)?;
    let events = victim.events(&run).unwrap_or_default();
    let died = &events[0];
    ensure!(
        died.event == EventKind::Died && died.device == "disk0" && died.detail.contains("signal 9"),
        "{events:?}"
    );
    ensure!(
        restarted.pid != died.pid && restarted.took_us > 0 && restarted.time_ns > died.time_ns,
        "{events:?}"
    );
    ensure!(restarted.count == 1 && died.count == 1, "{events:?}");
    printed(&run, &["died", "restarted"])
}

/// `bulkhead events` prints these, in this order.
fn printed(run: &Run, kinds: &[&str]) -> Result<()> {
    let output = run.verb("events", &[])?.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && text.lines().count() == kinds.len(),
        "{output:?}"
    );
    for (line, kind) in text.lines().zip(kinds) {
        let event: serde_json::Value = serde_json::from_str(line)?;
        ensure!(event["event"] == *kind && event["device"] == "disk0", "{line}");
    }
    Ok(())
}
