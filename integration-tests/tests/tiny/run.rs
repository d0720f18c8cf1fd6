//! `bulkhead run` with the tiny guest: exit codes, jails, and what is left behind.

use anyhow::{Context, Result, ensure};
use integration_tests::{
    host::Host,
    suite::{Skip, test},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{fs::File, path::Path, time::Duration};
use tempfile::TempDir;
use vm_spec::{control::exit_code, run_state::ProcessRole, spec::OnDeviceDeath};

const DEADLINE: Duration = Duration::from_secs(20);
/// Nothing is left this long after a process was killed.
const GONE: Duration = Duration::from_secs(2);

pub(crate) fn tests() -> Vec<Trial> {
    let codes = [
        ("poweroff", exit_code::POWER_OFF),
        ("panic", exit_code::PANIC),
        ("triplefault", exit_code::TRIPLE_FAULT),
        ("reset", exit_code::RESET),
        ("instant-reset", exit_code::INSTANT_RESET),
    ];
    let mut tests: Vec<_> = codes
        .into_iter()
        .map(|(scenario, code)| {
            test(format!("run::exit_code_{scenario}"), move || {
                exits_with(scenario, code)
            })
        })
        .collect();
    let roles = [
        ("spawner", ProcessRole::Spawner),
        ("reaper", ProcessRole::Reaper),
        ("supervisor", ProcessRole::Supervisor),
        ("vmm", ProcessRole::Vmm),
        ("disk", ProcessRole::Disk),
        ("net", ProcessRole::Net),
        ("net_namespace", ProcessRole::NetNamespace),
    ];
    for (name, role) in roles {
        tests.push(test(format!("run::kill_{name}"), move || killed(name, role)));
    }
    tests.push(test("run::sigterm_leaves_nothing", sigterm));
    tests.push(test("run::20_launches", launches));
    tests
}

fn exits_with(scenario: &str, code: u8) -> Result<()> {
    Host::need_kvm()?;
    let mut run = Run::tiny(&format!("scenario={scenario}"), &["--on-reboot=exit".to_owned()])?;
    let status = run.wait(DEADLINE)?;
    ensure!(
        status.code() == Some(i32::from(code)),
        "{status}, not {code}: {}\n{}",
        run.console.text(),
        run.process.stderr()?
    );
    Ok(())
}

fn disk_flag(folder: &TempDir) -> Result<String> {
    let path = folder.path().join("disk");
    File::create(&path)?.set_len(16 << 20)?;
    Ok(format!("--disk=path={},format=raw", path.display()))
}

/// A halted guest with a disk, and a NIC where the host has TAPs.
fn halted(folder: &TempDir) -> Result<Run> {
    halted_with(folder, OnDeviceDeath::Restart)
}

fn halted_with(folder: &TempDir, on_device_death: OnDeviceDeath) -> Result<Run> {
    Host::need_kvm()?;
    let mut flags = vec![disk_flag(folder)?];
    if on_device_death == OnDeviceDeath::End {
        flags.push("--on-device-death=end".to_owned());
    }
    if Path::new("/dev/net/tun").exists() {
        flags.push("--net=private=10.213.7.1/24".to_owned());
    }
    flags.push("--power-off-grace=1".to_owned());
    let mut run = Run::tiny("scenario=hlt", &flags)?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    Ok(run)
}

fn killed(name: &str, role: ProcessRole) -> Result<()> {
    let folder = tempfile::tempdir()?;
    // The tests of recovery are about what happens otherwise.
    let mut run = halted_with(&folder, OnDeviceDeath::End)?;
    let state = run.state(DEADLINE)?;
    let Some(victim) = state.processes.iter().find(|process| process.role == role) else {
        return Err(Skip(format!("this VM has no {name}")).into());
    };
    kill(Pid::from_raw(victim.pid), Signal::SIGKILL)?;
    run.wait_gone(&state, GONE)
        .with_context(|| format!("stderr: {}", run.process.stderr().unwrap_or_default()))?;
    let words = run.process.stderr()?;
    let called = match role {
        ProcessRole::NetNamespace => "network namespace",
        _ => victim.name.as_str(),
    };
    ensure!(
        words.lines().any(|line| line.contains(called)),
        "no line names the {called}: {words:?}"
    );
    let status = run.process.wait(DEADLINE)?;
    ensure!(!status.success(), "{status} after {name} was killed");
    Ok(())
}

fn sigterm() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut run = halted(&folder)?;
    let state = run.state(DEADLINE)?;
    run.process.signal(Signal::SIGTERM)?;
    run.process.wait(DEADLINE)?;
    run.wait_gone(&state, GONE)
}

fn launches() -> Result<()> {
    for round in 0..20 {
        exits_with("poweroff", exit_code::POWER_OFF).with_context(|| format!("launch {round}"))?;
    }
    Ok(())
}
