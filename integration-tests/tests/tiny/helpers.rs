//! `kill -9` of what stands outside the jails: the connector, the second reaper, the relay to passt.

use super::{run::gone, traces::Traces};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    frontend_harness::DEADLINE as OF_SOCKET,
    host::Host,
    process::{Process, connect},
    suite::{Skip, artifact, test},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    process::Command,
    thread,
    time::{Duration, Instant},
};
use vm_spec::{control::exit_code, run_state::ProcessRole};

const DEADLINE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(10);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("run::kill_connector", connector),
        test("run::kill_second_reaper", second_reaper),
        test("run::kill_relay", relay),
    ]
}

/// A halted guest with this device, and what there is of its VM.
fn halted(device: &str) -> Result<(Run, Traces)> {
    let flags = ["--power-off-grace=1".to_owned(), device.to_owned()];
    let mut run = Run::tiny("scenario=hlt", &flags)?;
    let ready = run.console.wait_line("ready=1", DEADLINE);
    ready.with_context(|| run.process.stderr().unwrap_or_default())?;
    run.state(DEADLINE)?;
    let traces = Traces::of(run.process.pid().as_raw(), run.folder())?;
    Ok((run, traces))
}

/// Someone else's back end is served as before, by a connection that nobody would make again.
fn connector() -> Result<()> {
    Host::need_kvm()?;
    let place = tempfile::tempdir()?;
    let (disk, socket) = (place.path().join("disk"), place.path().join("socket"));
    File::create(&disk)?.set_len(16 << 20)?;
    let mut command = Command::new(artifact(Artifact::VhostUserBlk)?);
    command
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--blk-file={}", disk.display()))
        .arg("--format=raw");
    let _daemon = Process::start(command)?;
    drop(connect(&socket, OF_SOCKET)?);
    let (mut run, traces) = halted(&format!("--disk=vhost-user={}", socket.display()))?;
    kill(run.pid_of(ProcessRole::Connector, DEADLINE)?, Signal::SIGKILL)?;
    let said = "the connector has ended";
    let end = Instant::now() + DEADLINE;
    while !run.process.stderr()?.contains(said) {
        ensure!(Instant::now() < end, "nobody says so: {}", run.process.stderr()?);
        thread::sleep(LOOK);
    }
    lives_on(&mut run, &traces)?;
    let words = run.process.stderr()?;
    ensure!(words.matches("connector").count() == 1, "{words}");
    Ok(())
}

/// The one that stays in root's namespaces where the VM has ids of its own: the first cleans up alone.
fn second_reaper() -> Result<()> {
    Host::need_kvm()?;
    let place = tempfile::tempdir()?;
    let disk = place.path().join("disk");
    File::create(&disk)?.set_len(16 << 20)?;
    let (mut run, traces) = halted(&format!("--disk=path={},format=raw", disk.display()))?;
    let first = run.pid_of(ProcessRole::Reaper, DEADLINE)?;
    let children = fs::read_to_string(format!("/proc/{first}/task/{first}/children"))?;
    let Some(second) = children.split_whitespace().next() else {
        return Err(Skip("this VM has one reaper".to_owned()).into());
    };
    kill(Pid::from_raw(second.parse()?), Signal::SIGKILL)?;
    lives_on(&mut run, &traces)
}

/// A VM without it goes on until it is asked to end, and leaves nothing.
fn lives_on(run: &mut Run, traces: &Traces) -> Result<()> {
    run.process.signal(Signal::SIGTERM)?;
    let status = run.process.wait(DEADLINE)?;
    let words = run.process.stderr()?;
    // Its guest was there for all of its grace.
    ensure!(
        status.code() == Some(exit_code::TIMEOUT.into()),
        "{status}: {words}"
    );
    gone(run, traces)
}

/// It holds the network namespace of its NIC: without it the VM ends, and passt with that.
fn relay() -> Result<()> {
    Host::need_kvm()?;
    Host::need_tun()?;
    Host::need_passt()?;
    let (mut run, traces) = halted("--net=user")?;
    let state = run.state(DEADLINE)?;
    let relay = state
        .processes
        .iter()
        .find(|p| p.role == ProcessRole::NetNamespace);
    let Some(relay) = relay else {
        return Err(Skip("this passt serves the guest's queues itself".to_owned()).into());
    };
    kill(Pid::from_raw(relay.pid), Signal::SIGKILL)?;
    gone(&mut run, &traces)?;
    let status = run.process.wait(DEADLINE)?;
    let words = run.process.stderr()?;
    let told = words.matches("network namespace").count();
    ensure!(told == 1 && !status.success(), "{status}: {words}");
    Ok(())
}
