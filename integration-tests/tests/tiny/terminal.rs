//! `bulkhead run` on a terminal, with a person at it.

use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    suite::{artifact, jail_flags, test},
    terminal::Terminal,
};
use libtest_mimic::Trial;
use std::{fs::File, process::Command, time::Duration};
use vm_spec::control::exit_code;

const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("terminal::keys_reach_the_guest", keys),
        test("terminal::ctrl_a_x_leaves", leave),
        test("terminal::the_background_is_left_alone", background),
    ]
}

fn start(cmdline: &str, folder: &tempfile::TempDir) -> Result<Terminal> {
    start_by(Command::new(artifact(Artifact::Bulkhead)?), cmdline, folder)
}

/// By a command that ends in the launcher's path.
fn start_by(mut command: Command, cmdline: &str, folder: &tempfile::TempDir) -> Result<Terminal> {
    Host::need_kvm()?;
    let disk = folder.path().join("disk");
    File::create(&disk)?.set_len(16 << 20)?;
    command
        .args(["run", "--name=test", "--memory=64M", "--power-off-grace=1"])
        .args(jail_flags())
        .arg(format!("--kernel={}", artifact(Artifact::TinyGuest)?.display()))
        .arg(format!("--cmdline={cmdline}"))
        .arg(format!("--disk=path={},format=raw", disk.display()))
        .env("XDG_RUNTIME_DIR", folder.path());
    Terminal::start(command)
}

/// The guest waits for a key before its work and after it.
fn keys() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut terminal = start("scenario=blk sync=1 requests=10 size=4096 depth=1", &folder)?;
    for phase in ["phase=work", "phase=done"] {
        terminal.screen.wait_line(phase, DEADLINE)?;
        ensure!(terminal.is_raw()?, "the terminal keeps keys back");
        terminal.type_keys(b"k")?;
    }
    terminal.screen.wait_line("result=ok", DEADLINE)?;
    let status = terminal.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", terminal.screen.text());
    ensure!(terminal.is_as_before()?, "the terminal's settings have changed");
    Ok(())
}

/// Ctrl-C is the guest's; Ctrl-A x ends the VM, and leaves the terminal as it was.
fn leave() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut terminal = start("scenario=hlt", &folder)?;
    terminal.screen.wait_line("ready=1", DEADLINE)?;
    terminal.type_keys(b"\x03\x01")?;
    // A command that comes in two pieces.
    ensure!(terminal.is_raw()?, "the terminal keeps keys back");
    terminal.type_keys(b"x")?;
    let status = terminal.wait(DEADLINE).context("Ctrl-A x does not end the VM")?;
    ensure!(status.success(), "{status}: {}", terminal.screen.text());
    ensure!(terminal.is_as_before()?, "the terminal's settings have changed");
    ensure!(
        !folder.path().join("bulkhead").exists(),
        "the run-time folder is left"
    );
    Ok(())
}

/// A shell that keeps the terminal, with its arguments as a job in the background, and reads a line after that.
const JOB: &str = r#"set -m; "$@" & wait $!; code=$?; read -r line; echo "typed=$line"; exit $code"#;

/// As by `bulkhead run ... &`: it is not stopped for reading keys or changing settings that are the shell's.
fn background() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let bulkhead = artifact(Artifact::Bulkhead)?;
    let mut shell = Command::new("sh");
    shell.args(["-c", JOB, "sh"]).arg(bulkhead);
    let mut terminal = start_by(shell, "scenario=hlt", &folder)?;
    terminal.screen.wait_line("ready=1", DEADLINE)?;
    terminal.type_keys(b"for the shell\n")?;
    ensure!(terminal.is_as_before()?, "the terminal's settings have changed");
    let stopped = Command::new(bulkhead)
        .args(["stop", "test"])
        .env("XDG_RUNTIME_DIR", folder.path())
        .output()?;
    ensure!(stopped.status.success(), "{stopped:?}");
    terminal.screen.wait_line("typed=for the shell", DEADLINE)?;
    let status = terminal.wait(DEADLINE)?;
    let text = terminal.screen.text();
    ensure!(
        status.code() == Some(exit_code::TIMEOUT.into()),
        "{status}: {text}"
    );
    ensure!(terminal.is_as_before()?, "the terminal's settings have changed");
    Ok(())
}
