//! `bulkhead run` as a service of systemd's: what it tells its manager.

use anyhow::{Context, Result, bail, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    suite::{Skip, artifact, test},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use std::{
    ffi::OsString,
    fs,
    io::ErrorKind,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
    path::Path,
    process::Command,
    time::Duration,
};
use vm_spec::control::exit_code;

const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("service::a_guest_that_powers_off_by_itself", by_itself),
        test("service::a_guest_that_is_asked_to", asked),
        test("service::a_guest_that_never_ran", never_ran),
        test("service::a_manager_that_is_gone", gone),
        test("service::units_are_sound", units),
        test("service::who_ends_a_vm_wants_it_over", no_restart),
    ]
}

/// `bulkhead run` of the tiny guest, whose manager listens where `manager` says.
fn start(manager: impl Into<OsString>, cmdline: &str) -> Result<Run> {
    run(manager, artifact(Artifact::TinyGuest)?, cmdline)
}

fn run(manager: impl Into<OsString>, kernel: &Path, cmdline: &str) -> Result<Run> {
    Host::need_kvm()?;
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    command.env("NOTIFY_SOCKET", manager.into());
    let flags = [
        format!("--kernel={}", kernel.display()),
        format!("--cmdline={cmdline}"),
        "--memory=64M".to_owned(),
        "--power-off-grace=1".to_owned(),
    ];
    Run::by(command, tempfile::tempdir()?, &flags)
}

/// systemd has nothing to say against the units in docs/systemd, with the programs where they look for them.
fn units() -> Result<()> {
    let home = tempfile::tempdir()?;
    let bin = home.path().join(".local/bin");
    fs::create_dir_all(&bin)?;
    for program in [Artifact::Bulkhead, Artifact::VhostUserBlk] {
        fs::copy(artifact(program)?, bin.join(program.name()))?;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/systemd");
    let mut verify = Command::new("systemd-analyze");
    verify
        .args(["--user", "--man=no", "verify"])
        .env("HOME", home.path())
        .env("XDG_RUNTIME_DIR", home.path());
    for unit in fs::read_dir(folder)? {
        verify.arg(unit?.path());
    }
    let output = match verify.output() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!(Skip("systemd-analyze is not installed".to_owned()))
        }
        output => output?,
    };
    let words = String::from_utf8_lossy(&output.stderr);
    // Of keys that it does not know it has words, and no failure.
    let of_ours = |line: &str| {
        ["bulkhead", "vhost-user-blk"]
            .iter()
            .any(|name| line.contains(name))
    };
    ensure!(
        output.status.success() && !words.lines().any(of_ours),
        "{}: {words}",
        output.status
    );
    Ok(())
}

/// Neither what stays wrong nor an end that someone asked for has the unit start the VM again.
fn no_restart() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/systemd/bulkhead@.service");
    let unit = fs::read_to_string(path)?;
    let line = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key));
    let last = line("RestartPreventExitStatus=").context("all are restarted")?;
    let asked_twice = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM].map(|signal| 128 + signal as u8);
    let codes = [exit_code::USAGE, exit_code::TIMEOUT]
        .into_iter()
        .chain(asked_twice)
        .map(|code| code.to_string());
    let wanted: Vec<_> = codes.chain([Signal::SIGKILL.to_string()]).collect();
    ensure!(last.split(' ').eq(wanted.iter()), "{last}: not {wanted:?}");
    Ok(())
}

/// The manager hears it next: `what` is a line of it.
fn hears(manager: &UnixDatagram, what: &str) -> Result<()> {
    let mut message = [0; 200];
    let length = manager.recv(&mut message).with_context(|| format!("no {what}"))?;
    let message = String::from_utf8_lossy(&message[..length]);
    ensure!(message.lines().any(|line| line == what), "not {what}: {message}");
    Ok(())
}

/// And nothing else.
fn hears_no_more(manager: &UnixDatagram) -> Result<()> {
    manager.set_nonblocking(true)?;
    let more = manager.recv(&mut [0]);
    let nothing = more
        .as_ref()
        .is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
    ensure!(nothing, "{more:?}");
    Ok(())
}

fn by_itself() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("manager");
    let manager = UnixDatagram::bind(&path)?;
    manager.set_read_timeout(Some(DEADLINE))?;
    let mut run = start(path, "scenario=poweroff")?;
    hears(&manager, "READY=1")?;
    hears(&manager, "STOPPING=1")?;
    let status = run.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", run.process.stderr()?);
    hears_no_more(&manager)
}

/// Also by a name that is no path.
fn asked() -> Result<()> {
    let name = format!("bulkhead-test-{}", std::process::id());
    let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    manager.set_read_timeout(Some(DEADLINE))?;
    let mut run = start(format!("@{name}"), "scenario=hlt")?;
    hears(&manager, "READY=1")?;
    run.console.wait_line("ready=1", DEADLINE)?;
    run.process.signal(Signal::SIGTERM)?;
    // At once, and not when its time is over.
    hears(&manager, "STOPPING=1")?;
    ensure!(run.process.alive()?, "it was told too late");
    let status = run.wait(DEADLINE)?;
    ensure!(status.code() == Some(exit_code::TIMEOUT.into()), "{status}");
    hears_no_more(&manager)
}

fn never_ran() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("manager");
    let manager = UnixDatagram::bind(&path)?;
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, [0; 4096])?;
    let mut run = run(path, &kernel, "")?;
    let status = run.wait(DEADLINE)?;
    let said = run.process.stderr()?;
    ensure!(
        status.code() == Some(exit_code::ERROR.into()) && said.contains("boot.kernel"),
        "{status}: {said}"
    );
    manager.set_nonblocking(true)?;
    let mut message = [0; 200];
    while let Ok(length) = manager.recv(&mut message) {
        let message = String::from_utf8_lossy(&message[..length]);
        ensure!(!message.contains("READY"), "{message}");
    }
    Ok(())
}

fn gone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut run = start(folder.path().join("manager"), "scenario=poweroff")?;
    let status = run.wait(DEADLINE)?;
    let said = run.process.stderr()?;
    ensure!(status.success(), "{status}: {said}");
    ensure!(said.contains("warning: NOTIFY_SOCKET: cannot reach"), "{said}");
    Ok(())
}
