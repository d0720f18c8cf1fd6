//! Others who look at a running VM: `bulkhead console`, `bulkhead logs`, `bulkhead inspect`.

use super::{jails::NobodysVm, orders::replace_disk_process};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    host::Host,
    process::Process,
    suite::{need_jail, test},
    terminal::Terminal,
    tiny::{Console, Run},
};
use libtest_mimic::Trial;
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::signal::Signal,
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write, pipe},
    process::{Output, Stdio},
    time::Duration,
};
use tempfile::TempDir;
use vm_spec::run_state::RunState;

const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("listen::a_console_is_joined_and_left", console),
        test("listen::a_console_without_a_terminal", console_by_pipe),
        test("listen::a_console_left_by_a_signal", console_signalled),
        test("listen::a_console_that_nobody_reads", console_unread),
        test("listen::logs", logs),
        test("listen::listeners_are_few", few),
        test("listen::inspect", inspect),
        test("listen::by_a_user_who_owns_nothing", unprivileged),
    ]
}

/// A VM with a disk, and nobody at its console.
pub(crate) fn start(cmdline: &str, place: &TempDir) -> Result<Run> {
    Host::need_kvm()?;
    let disk = place.path().join("disk");
    File::create(&disk)?.set_len(16 << 20)?;
    let flags = [
        format!("--disk=path={},format=raw", disk.display()),
        "--power-off-grace=1".to_owned(),
    ];
    let mut run = Run::tiny(cmdline, &flags)?;
    run.state(DEADLINE)?;
    Ok(run)
}

/// It waits for a key before its work and after it.
const KEYS: &str = "scenario=blk sync=1 requests=10 size=4096 depth=1";

fn text(output: &Output) -> Result<String> {
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout.clone())?)
}

/// What was printed before is shown, keys reach the guest, and whoever leaves leaves the VM as it is.
fn console() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = start(KEYS, &place)?;
    run.console.wait_line("phase=work", DEADLINE)?;
    let mut person = Terminal::start(run.verb("console", &[])?)?;
    person
        .screen
        .wait_line("console of 'test': Ctrl-A x leaves it", DEADLINE)?;
    person.screen.wait_line("phase=work", DEADLINE)?;
    ensure!(person.is_raw()?, "the terminal keeps keys back");
    person.type_keys(b"k")?;
    person.screen.wait_line("phase=done", DEADLINE)?;
    // Whoever ran it sees the same.
    run.console.wait_line("phase=done", DEADLINE)?;
    person.type_keys(b"\x01x")?;
    let status = person.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", person.screen.text());
    ensure!(person.is_as_before()?, "the terminal's settings have changed");
    ensure!(run.process.alive()?, "the VM is over");
    let mut person = Terminal::start(run.verb("console", &[])?)?;
    person.screen.wait_line("phase=done", DEADLINE)?;
    person.type_keys(b"k")?;
    person.screen.wait_line("result=ok", DEADLINE)?;
    person.screen.wait_line("the VM 'test' is over", DEADLINE)?;
    let status = person.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", person.screen.text());
    ensure!(person.is_as_before()?, "the terminal's settings have changed");
    let status = run.wait(DEADLINE)?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// A verb with pipes.
pub(crate) fn start_verb(run: &Run, verb: &str, words: &[&str]) -> Result<(Process, Console)> {
    let mut command = run.verb(verb, words)?;
    command.stdout(Stdio::piped());
    let mut process = Process::start_with_input(command, Stdio::piped())?;
    let stdout = process.child().stdout.take().context("no stdout")?;
    Ok((process, Console::new(stdout)))
}

/// A script's input: Ctrl-A in it is no command, and its end is not the visit's.
fn console_by_pipe() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = start(KEYS, &place)?;
    let (mut process, mut screen) = start_verb(&run, "console", &[])?;
    screen.wait_line("phase=work", DEADLINE)?;
    let mut input = process.child().stdin.take().context("no stdin")?;
    input.write_all(b"\x01")?;
    screen.wait_line("phase=done", DEADLINE)?;
    input.write_all(b"x")?;
    drop(input);
    screen.wait_line("result=ok", DEADLINE)?;
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    ensure!(
        process.stderr()?.contains("the VM 'test' is over"),
        "{}",
        process.stderr()?
    );
    screen.finish(DEADLINE)?;
    ensure!(run.wait(DEADLINE)?.success(), "{}", run.process.stderr()?);
    ensure!(
        screen.text() == run.console.text(),
        "{}\nis not\n{}",
        screen.text(),
        run.console.text()
    );
    Ok(())
}

/// The terminal is what it was, and the VM runs on.
fn console_signalled() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = start(KEYS, &place)?;
    let mut person = Terminal::start(run.verb("console", &[])?)?;
    person.screen.wait_line("phase=work", DEADLINE)?;
    person.signal(Signal::SIGTERM)?;
    let status = person.wait(DEADLINE)?;
    ensure!(status.code() == Some(128 + Signal::SIGTERM as i32), "{status}");
    ensure!(person.is_as_before()?, "the terminal's settings have changed");
    ensure!(run.process.alive()?, "the VM is over");
    Ok(())
}

/// What the processes logged before, and with `--follow` what they log until the VM is over; the same as objects.
fn logs() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = start("scenario=hlt", &place)?;
    run.console.wait_line("ready=1", DEADLINE)?;
    let before = text(&run.verb("logs", &[])?.output()?)?;
    ensure!(!before.contains("signal 9"), "{before}");
    replace_disk_process(&mut run)?;
    let before = text(&run.verb("logs", &[])?.output()?)?;
    ensure!(
        before.contains("bulkhead: disk0") && before.contains("signal 9"),
        "{before}"
    );
    let objects = text(&run.verb("logs", &["--json"])?.output()?)?;
    ensure!(before.lines().count() == objects.lines().count(), "{objects}");
    for (plain, object) in before.lines().zip(objects.lines()) {
        let object: BTreeMap<String, String> = serde_json::from_str(object).context(objects.clone())?;
        let keys: Vec<_> = object.keys().map(String::as_str).collect();
        ensure!(
            keys == ["level", "message", "process", "timestamp", "vm"],
            "{objects}"
        );
        ensure!(
            object["vm"] == "test" && object["timestamp"].ends_with('Z'),
            "{objects}"
        );
        let named = plain.strip_prefix(&object["process"]);
        let said = named.is_some_and(|said| said.ends_with(&object["message"]));
        ensure!(said, "{object:?} is not {plain:?}");
    }
    let (mut process, mut lines) = start_verb(&run, "logs", &["--follow"])?;
    lines.wait_line(before.lines().next().context("no line")?, DEADLINE)?;
    replace_disk_process(&mut run)?;
    run.process.signal(Signal::SIGTERM)?;
    run.wait(DEADLINE)?;
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    lines.finish(DEADLINE)?;
    // All that went to the standard error of `run` since, the VM's last words among it.
    let said = run.process.stderr()?;
    ensure!(
        lines.text().contains("did not power off within 1 s"),
        "{}",
        lines.text()
    );
    for line in lines.text().lines() {
        ensure!(
            said.lines().any(|other| other == line),
            "{line:?} is not in\n{said}"
        );
    }
    ensure!(lines.text().matches("signal 9").count() == 2, "{}", lines.text());
    Ok(())
}

/// So that orders still get through.
fn few() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = start("scenario=hlt", &place)?;
    run.console.wait_line("ready=1", DEADLINE)?;
    // By this each listener is known to have come.
    replace_disk_process(&mut run)?;
    let logged = text(&run.verb("logs", &[])?.output()?)?;
    let logged = logged.lines().next().context("nothing is logged")?;
    let mut all = Vec::new();
    for (verb, words, line) in [
        ("logs", ["--follow"].as_slice(), logged),
        ("console", &[], "ready=1"),
    ] {
        for _ in 0..3 {
            let (process, mut screen) = start_verb(&run, verb, words)?;
            screen
                .wait_line(line, DEADLINE)
                .with_context(|| process.stderr().unwrap_or_default())?;
            all.push((process, screen));
        }
    }
    for verb in ["logs", "console"] {
        let refused = run.verb(verb, &[])?.output()?;
        let words = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(refused.status.code() == Some(1), "{refused:?}");
        ensure!(words.contains("3 others listen already"), "{words}");
    }
    text(&run.verb("metrics", &["disk0"])?.output()?)?;
    // One that goes makes room.
    all.pop();
    let (process, mut screen) = start_verb(&run, "console", &[])?;
    screen
        .wait_line("ready=1", DEADLINE)
        .with_context(|| process.stderr().unwrap_or_default())?;
    Ok(())
}

/// As text what `--dry-run` said with the processes' ids, as JSON what is in the run-time folder.
fn inspect() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = start("scenario=hlt", &place)?;
    let state = run.state(DEADLINE)?;
    let json = text(&run.verb("inspect", &["--json"])?.output()?)?;
    let told: Value = serde_json::from_str(&json)?;
    ensure!(told["state"] == "running" && told["name"] == "test", "{json}");
    ensure!(told["folder"] == *run.run_folder().to_string_lossy(), "{json}");
    let told: RunState = serde_json::from_value(told)?;
    ensure!(told.processes.len() >= state.processes.len(), "{json}");
    let said = text(&run.verb("inspect", &[])?.output()?)?;
    for process in &told.processes {
        let (_, part) = said
            .split_once(&format!("process {}\n", process.name))
            .with_context(|| format!("no {} in {said}", process.name))?;
        let part = part.split("\nprocess ").next().unwrap_or_default();
        ensure!(part.starts_with(&format!("  pid {}", process.pid)), "{part}");
        for fd in &process.fds {
            ensure!(
                part.contains(&format!("  fd {} {}", fd.number, fd.what)),
                "{part}"
            );
        }
    }
    Ok(())
}

/// All three need no privilege.
fn unprivileged() -> Result<()> {
    need_jail()?;
    let mut vm = NobodysVm::start()?;
    vm.run.console.wait_line("ready=1", DEADLINE)?;
    text(&vm.verb("logs", &[]).output()?)?;
    let said = text(&vm.verb("inspect", &[]).output()?)?;
    ensure!(said.contains("\nprocess vmm\n"), "{said}");
    let mut person = Terminal::start(vm.verb("console", &[]))?;
    person.screen.wait_line("ready=1", DEADLINE)?;
    person.type_keys(b"\x01x")?;
    ensure!(person.wait(DEADLINE)?.success(), "{}", person.screen.text());
    Ok(())
}

/// A signal ends it also where its output is a pipe that is full.
fn console_unread() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut run = start(KEYS, &place)?;
    let (mut reader, writer) = pipe()?;
    let mut command = run.verb("console", &[])?;
    command.stdout(writer.try_clone()?);
    let mut process = Process::start(command)?;
    let mut said = String::new();
    while !said.contains("phase=work") {
        let mut bytes = [0; 512];
        let count = reader.read(&mut bytes)?;
        said += std::str::from_utf8(&bytes[..count])?;
    }
    // The console's own writes wait.
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    while (&writer).write(&[b'x'; 4096]).is_ok() {}
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty()))?;
    run.press(b'k')?;
    run.console.wait_line("phase=done", DEADLINE)?;
    process.signal(Signal::SIGTERM)?;
    let status = process.wait(DEADLINE)?;
    ensure!(status.code() == Some(128 + Signal::SIGTERM as i32), "{status}");
    ensure!(run.process.alive()?, "the VM is over");
    Ok(())
}
