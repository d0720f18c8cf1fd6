//! Commands that look for a VM, and find none, or one that has no time for them.

use super::listen::{start, start_verb};
use super::orders::replace_disk_process;
use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    process::Process,
    suite::{artifact, jail_flags, test},
    tiny::{Console, Run},
};
use libtest_mimic::Trial;
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    io::Write as _,
    os::fd::{AsRawFd, OwnedFd},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use vm_spec::{
    client::SOCKET_NAME,
    control::exit_code,
    events::{FILE_NAME, MAX_BYTES},
    run_state::ProcessRole,
};

const DEADLINE: Duration = Duration::from_secs(20);
/// Between two looks at a file.
const LOOK: Duration = Duration::from_millis(5);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("clients::a_full_supervisor_says_so", full),
        test("clients::a_supervisor_that_hangs_is_not_waited_for (waits)", hung),
        test("clients::events_end_with_their_vm", events_of_one_vm),
        test("clients::a_folder_that_nobody_holds_is_no_vm", left_folder),
    ]
}

/// `bulkhead events --follow`, once it has said what there is.
fn follow_events(run: &mut Run) -> Result<(Process, Console)> {
    replace_disk_process(run)?;
    let events = fs::read_to_string(run.run_folder().join(FILE_NAME))?;
    let (process, mut lines) = start_verb(run, "events", &["--follow"])?;
    lines.wait_line(events.lines().next().context("no event")?, DEADLINE)?;
    Ok((process, lines))
}

/// Whoever follows a VM does not go on to the next one of its name.
fn events_of_one_vm() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = start("scenario=hlt", &place)?;
    run.console.wait_line("ready=1", DEADLINE)?;
    let (mut process, mut lines) = follow_events(&mut run)?;
    // With so much in it the file is begun anew.
    let path = run.run_folder().join(FILE_NAME);
    let filler = "x".repeat(usize::try_from(MAX_BYTES)?) + "\n";
    File::options()
        .append(true)
        .open(&path)?
        .write_all(filler.as_bytes())?;
    kill(run.pid_of(ProcessRole::Disk, DEADLINE)?, Signal::SIGKILL)?;
    let end = Instant::now() + DEADLINE;
    let anew = loop {
        let text = fs::read_to_string(&path)?;
        if text.contains("begun-anew") && text.contains("restarted") {
            break text;
        }
        ensure!(Instant::now() < end, "{}", text.replace('x', ""));
        thread::sleep(LOOK);
    };
    for line in anew.lines() {
        lines.wait_line(line, DEADLINE)?;
    }
    process.signal(Signal::SIGSTOP)?;
    run.process.signal(Signal::SIGTERM)?;
    run.wait(DEADLINE)?;
    let kernel = format!("--kernel={}", artifact(Artifact::TinyGuest)?.display());
    let mut next = Command::new(artifact(Artifact::Bulkhead)?);
    next.args([
        "run",
        "--name=test",
        &kernel,
        "--memory=64M",
        "--cmdline=scenario=hlt",
    ])
    .args(jail_flags())
    .env("XDG_RUNTIME_DIR", run.folder())
    .stdout(Stdio::piped());
    let mut next = Process::start(next)?;
    let mut console = Console::new(next.child().stdout.take().context("no stdout")?);
    console.wait_line("ready=1", DEADLINE)?;
    process.signal(Signal::SIGCONT)?;
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    ensure!(next.alive()?, "the second VM is over");
    Ok(())
}

/// What is left of a VM whose reaper was killed too: who followed it ends, and no verb takes it for a VM.
fn left_folder() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = start("scenario=hlt", &place)?;
    run.console.wait_line("ready=1", DEADLINE)?;
    let (mut process, _lines) = follow_events(&mut run)?;
    let reaper = run.pid_of(ProcessRole::Reaper, DEADLINE)?;
    // So that it does not tidy up for its reaper.
    run.process.signal(Signal::SIGSTOP)?;
    // Root's has one that stands by.
    let second = fs::read_to_string(format!("/proc/{reaper}/task/{reaper}/children"))?;
    for one in second.split_whitespace() {
        kill(Pid::from_raw(one.parse()?), Signal::SIGKILL)?;
    }
    kill(reaper, Signal::SIGKILL)?;
    run.process.signal(Signal::SIGKILL)?;
    run.wait(DEADLINE)?;
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    ensure!(run.run_folder().exists(), "nothing is left to try it with");
    for (verb, words) in [
        ("events", [].as_slice()),
        ("events", &["--follow"]),
        ("logs", &[]),
        ("console", &[]),
        ("inspect", &[]),
        ("metrics", &[]),
        ("resize", &["disk0", "32M"]),
        ("link", &["net0", "down"]),
        ("upgrade", &["disk0", "--binary=/dev/null"]),
    ] {
        let mut process = Process::start(run.verb(verb, words)?)?;
        let status = process.wait(DEADLINE)?;
        let said = process.stderr()?;
        ensure!(
            status.code() == Some(exit_code::USAGE.into()) && said.contains("no VM 'test' runs"),
            "{verb}: {status}: {said}"
        );
    }
    Ok(())
}

/// A client that says nothing. `None`: it would have to wait to be let in.
fn silent_client(run: &Run) -> Result<Option<OwnedFd>> {
    let flags = SockFlag::SOCK_NONBLOCK;
    let client = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    let address = UnixAddr::new(&run.run_folder().join(SOCKET_NAME))?;
    match connect(client.as_raw_fd(), &address) {
        Ok(()) => Ok(Some(client)),
        Err(Errno::EAGAIN) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn refused(run: &Run, words: &str) -> Result<()> {
    let mut process = Process::start(run.verb("metrics", &[])?)?;
    let status = process.wait(DEADLINE)?;
    let said = process.stderr()?;
    ensure!(
        status.code() == Some(1) && said.contains(words),
        "{status}: {said}"
    );
    Ok(())
}

fn full() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = start("scenario=hlt", &place)?;
    run.console.wait_line("ready=1", DEADLINE)?;
    let all: Vec<_> = (0..8).map(|_| silent_client(&run)).collect::<Result<_>>()?;
    ensure!(all.iter().all(Option::is_some), "one waits");
    refused(&run, "8 others talk to it")
}

fn hung() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = start("scenario=hlt", &place)?;
    run.console.wait_line("ready=1", DEADLINE)?;
    let supervisor = run.pid_of(ProcessRole::Supervisor, DEADLINE)?;
    kill(supervisor, Signal::SIGSTOP)?;
    let mut waiting = Vec::new();
    while let Some(client) = silent_client(&run)? {
        waiting.push(client);
    }
    refused(&run, "cannot reach the supervisor of 'test'")
}
