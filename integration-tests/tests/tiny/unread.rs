//! Outputs that nobody reads, inputs that nobody writes: nothing of a VM depends on them.

use crate::run::gone;
use crate::traces::Traces;
use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    suite::{artifact, test},
    tiny::{Events, Run, launcher},
};
use libtest_mimic::Trial;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vm_spec::control::exit_code;
use vm_spec::events::EventKind;
use vm_spec::run_state::ProcessRole;

const DEADLINE: Duration = Duration::from_secs(20);
/// A signal that is heard ends a launcher that waits.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Signals this far apart are no single request.
const APART: Duration = Duration::from_millis(600);
/// Bytes of a file: more than the guest's memory and its disk, which are files too.
const LIMIT: u64 = 256 << 20;
/// Between two looks at something that has no event to wait for.
const LOOK: Duration = Duration::from_millis(5);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("unread::an_error_without_a_reader", error),
        test("unread::an_upgrade_that_fails_without_a_reader", upgrade),
        test("unread::a_spawner_killed_without_a_reader", spawner),
        test("unread::two_signals_with_a_full_pipe", two_signals),
        test("unread::a_terminal_that_is_not_read", terminal),
        test("unread::a_file_that_may_grow_no_further", limited),
        test("unread::a_key_that_does_not_come", key),
        test("unread::a_back_end_that_accepts_nobody", back_end),
        test("unread::hang_ups_that_are_ignored", ignored),
        test("unread::ends_of_children_that_are_ignored", no_children),
    ]
}

/// Standard error as a pipe.
struct Pipe {
    folder: TempDir,
    /// Held until it is to have no reader.
    reader: Option<File>,
}

impl Pipe {
    fn make() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("pipe");
        mkfifo(&path, Mode::from_bits_truncate(0o600))?;
        let reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)?;
        Ok(Self {
            folder,
            reader: Some(reader),
        })
    }

    fn redirection(&self) -> String {
        format!("2>{}", self.folder.path().join("pipe").display())
    }

    fn fill(&self) -> Result<()> {
        let mut writer = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(self.folder.path().join("pipe"))?;
        loop {
            match writer.write(b"x") {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                written => written?,
            };
        }
    }
}

fn flags(cmdline: &str, folder: &Path) -> Result<Vec<String>> {
    Host::need_kvm()?;
    let disk = folder.join("disk");
    File::create(&disk)?.set_len(16 << 20)?;
    Ok(vec![
        format!("--kernel={}", artifact(Artifact::TinyGuest)?.display()),
        "--memory=64M".to_owned(),
        format!("--cmdline={cmdline}"),
        format!("--disk=path={},format=raw", disk.display()),
    ])
}

fn start(redirection: &str, cmdline: &str, folder: &Path) -> Result<Run> {
    let mut run = Run::by(
        launcher("", redirection)?,
        tempfile::tempdir()?,
        &flags(cmdline, folder)?,
    )?;
    run.state(DEADLINE)?;
    Ok(run)
}

/// Standard output and standard error are files that are as long as the limit (RLIMIT_FSIZE) lets them be; the spawner
/// has something to say.
fn limited() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    for name in ["out", "err"] {
        File::create(path(name))?.set_len(LIMIT)?;
    }
    let redirection = format!(">>{} 2>>{}", path("out").display(), path("err").display());
    // In units of 512 bytes.
    let launcher = launcher(&format!("ulimit -f {};", LIMIT / 512), &redirection)?;
    let mut flags = flags("scenario=poweroff", folder.path())?;
    flags.push("--seccomp=log".to_owned());
    let mut run = Run::by(launcher, tempfile::tempdir()?, &flags)?;
    let status = run.wait(DEADLINE)?;
    ensure!(status.code() == Some(exit_code::POWER_OFF.into()), "{status}");
    ensure!(File::open(path("out"))?.metadata()?.len() == LIMIT);
    Ok(())
}

fn error() -> Result<()> {
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let folder = tempfile::tempdir()?;
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    command.args(["kill", "no-such-vm"]).stderr(writer);
    // Where a core file would be, too.
    command
        .env("XDG_RUNTIME_DIR", folder.path())
        .current_dir(folder.path());
    let status = command.status()?;
    ensure!(status.code() == Some(exit_code::USAGE.into()), "{status}");
    Ok(())
}

/// The client is told that the build that served before serves on: it does.
fn upgrade() -> Result<()> {
    let pipe = Pipe::make()?;
    let mut run = start(&pipe.redirection(), "scenario=hlt", pipe.folder.path())?;
    drop(pipe.reader);
    let words = ["disk0", "--binary", "/bin/ls"];
    let output = run.verb("upgrade", &words)?.output()?;
    ensure!(!output.status.success(), "{output:?}");
    // Whoever is to make successors still does. The one before may still stand in the state.
    let end = Instant::now() + DEADLINE;
    while let Err(error) = kill(run.pid_of(ProcessRole::Disk, DEADLINE)?, Signal::SIGKILL) {
        ensure!(Instant::now() < end, "no disk's process: {error}");
        thread::sleep(LOOK);
    }
    let mut events = Events::default();
    events.wait(&run, DEADLINE, |event| event.event == EventKind::Restarted)?;
    let output = run.verb("kill", &[])?.output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

/// The reaper says that it died, to nobody, and cleans up all the same.
fn spawner() -> Result<()> {
    for fill in [false, true] {
        let mut pipe = Pipe::make()?;
        let mut run = start(&pipe.redirection(), "scenario=hlt", pipe.folder.path())?;
        let traces = Traces::of(run.process.pid().as_raw(), run.folder())?;
        if fill {
            pipe.fill()?;
        } else {
            pipe.reader = None;
        }
        kill(run.process.pid(), Signal::SIGKILL)?;
        gone(&mut run, &traces).with_context(|| format!("a full pipe: {fill}"))?;
    }
    Ok(())
}

fn two_signals() -> Result<()> {
    let pipe = Pipe::make()?;
    let mut run = start(&pipe.redirection(), "scenario=hlt", pipe.folder.path())?;
    let traces = Traces::of(run.process.pid().as_raw(), run.folder())?;
    pipe.fill()?;
    run.process.signal(Signal::SIGTERM)?;
    let status = run.insist(Signal::SIGINT, DEADLINE)?;
    ensure!(status.code() == Some(128 + Signal::SIGINT as i32), "{status}");
    gone(&mut run, &traces)
}

/// A terminal that takes no more, as one whose connection stalls: whoever printed on it goes on.
fn terminal() -> Result<()> {
    let place = tempfile::tempdir()?;
    let master = unread_terminal()?;
    let name = ptsname_r(&master)?;
    // Each boot prints.
    let mut run = start(&format!(">{name} 2>{name}"), "scenario=reset", place.path())?;
    wait_until_full(&name)?;
    kill(run.pid_of(ProcessRole::Disk, DEADLINE)?, Signal::SIGKILL)?;
    let mut events = Events::default();
    events.wait(&run, DEADLINE, |event| event.event == EventKind::Restarted)?;
    let output = run.verb("metrics", &[])?.output()?;
    ensure!(output.status.success(), "{output:?}");
    let output = run.verb("kill", &[])?.output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

fn unread_terminal() -> Result<PtyMaster> {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    Ok(master)
}

/// Until nothing more fits.
fn wait_until_full(name: &str) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let program_side = OpenOptions::new().write(true).custom_flags(flags).open(name)?;
    loop {
        let mut room = [PollFd::new(program_side.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut room, PollTimeout::ZERO)? == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the terminal takes everything");
        thread::sleep(LOOK);
    }
}

/// A signal ends a launcher that waits for something, as it is, and nothing is left.
fn interrupted(mut run: Run, signal: Signal) -> Result<()> {
    let traces = Traces::of(run.process.pid().as_raw(), run.folder())?;
    run.process.signal(signal)?;
    let status = run.process.wait(AT_ONCE)?;
    ensure!(status.signal() == Some(signal as i32), "{status}");
    gone(&mut run, &traces)
}

/// Waits until the launcher sleeps in one of these system calls.
fn wait_in_call(run: &mut Run, numbers: &[libc::c_long]) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    let path = format!("/proc/{}/syscall", run.process.pid());
    loop {
        let text = fs::read_to_string(&path)?;
        let number = text.split(' ').next().and_then(|number| number.parse().ok());
        if number.is_some_and(|number| numbers.contains(&number)) {
            return Ok(());
        }
        ensure!(Instant::now() < end && run.process.alive()?, "it is in {text}");
        thread::sleep(LOOK);
    }
}

fn key() -> Result<()> {
    let place = tempfile::tempdir()?;
    let pipe = place.path().join("key");
    mkfifo(&pipe, Mode::from_bits_truncate(0o600))?;
    let mut flags = flags("scenario=hlt", place.path())?;
    let disk = place.path().join("disk.qcow2");
    let mut create = Command::new(artifact(Artifact::Bulkhead)?);
    create
        .args(["image", "create", "--format=qcow2"])
        .arg(&disk)
        .arg("16M");
    ensure!(create.status()?.success(), "no image");
    // crypt_method: LUKS, or nobody would want its passphrase.
    File::options()
        .write(true)
        .open(&disk)?
        .write_all_at(&[0, 0, 0, 2], 32)?;
    flags.pop();
    flags.push(format!("--disk=path={},format=qcow2,key-fd=5", disk.display()));
    // Open for writing too: it has no end.
    let launcher = launcher("", &format!("5<>{}", pipe.display()))?;
    let mut run = Run::by(launcher, tempfile::tempdir()?, &flags)?;
    wait_in_call(&mut run, &[libc::SYS_read, libc::SYS_splice])?;
    interrupted(run, Signal::SIGINT)
}

fn back_end() -> Result<()> {
    let place = tempfile::tempdir()?;
    let path = place.path().join("socket");
    let _listener = UnixListener::bind(&path)?;
    // As many as wait to be accepted by a listener of std.
    let mut waiting = Vec::new();
    while let Some(stream) = connect_at_once(&path)? {
        waiting.push(stream);
    }
    let mut flags = flags("scenario=hlt", place.path())?;
    flags.pop();
    flags.push(format!("--disk=vhost-user={}", path.display()));
    let mut run = Run::by(launcher("", "")?, tempfile::tempdir()?, &flags)?;
    wait_in_call(&mut run, &[libc::SYS_connect])?;
    interrupted(run, Signal::SIGTERM)
}

/// `None` when its backlog is full.
fn connect_at_once(path: &Path) -> Result<Option<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
        Err(Errno::EAGAIN) => Ok(None),
        connected => Ok(Some(connected.map(|()| fd)?)),
    }
}

/// As under `nohup`, and in the background of a script: the VM runs on, and SIGTERM still ends it.
fn ignored() -> Result<()> {
    let place = tempfile::tempdir()?;
    let launcher = launcher("trap '' HUP INT;", "")?;
    let mut flags = flags("scenario=hlt", place.path())?;
    flags.push("--power-off-grace=1".to_owned());
    let mut run = Run::by(launcher, tempfile::tempdir()?, &flags)?;
    run.state(DEADLINE)?;
    for signal in [Signal::SIGHUP, Signal::SIGINT] {
        run.process.signal(signal)?;
    }
    // Each of them would have been the first request, and what follows the second.
    thread::sleep(APART);
    run.process.signal(Signal::SIGTERM)?;
    let status = run.wait(DEADLINE)?;
    ensure!(status.code() == Some(exit_code::TIMEOUT.into()), "{status}");
    Ok(())
}

/// As under a parent that does not wait for what it starts.
#[expect(unsafe_code, reason = "runs code between fork and exec")]
fn no_children() -> Result<()> {
    let place = tempfile::tempdir()?;
    let mut launcher = Command::new(artifact(Artifact::Bulkhead)?);
    let ignore = || {
        // SAFETY: ignoring runs no code of ours.
        unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
        Ok(())
    };
    // SAFETY: the closure makes one call, which is async-signal-safe.
    unsafe { launcher.pre_exec(ignore) };
    let flags = flags("scenario=poweroff", place.path())?;
    let mut run = Run::by(launcher, tempfile::tempdir()?, &flags)?;
    let status = run.wait(DEADLINE)?;
    let said = run.process.stderr()?;
    ensure!(status.success() && !said.contains("in time"), "{status}: {said}");
    Ok(())
}
