//! Back ends that are not ours, killed and started again by their owner: bulkhead connects to them
//! again, however long that takes, and tells the guest where nobody can know what was done.

use crate::{
    kills::Moments,
    storm::{DEADLINE, Image, Storm},
    victim::Victim,
};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    process::{Process, threads, wait_for},
    suite::{artifact, full, test_within},
    tiny::{Liar, Lie, Run, Tap},
};
use libtest_mimic::Trial;
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::signal::Signal,
};
use std::{
    fs::{self, File},
    os::{fd::AsRawFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};
use vm_spec::{events::EventKind, run_state::ProcessRole};

/// Asked to end, a VM that seeks a back end is gone within this time beyond the guest's own grace of
/// one second.
const PROMPT: Duration = Duration::from_millis(1500);

pub(crate) fn tests() -> Vec<Trial> {
    let (kills, absence) = if full() { (50, 70) } else { (6, 2) };
    let limit = Duration::from_secs(120 + 3 * kills + absence);
    let absence = Duration::from_secs(absence);
    vec![
        test_within(limit, "others::one_with_a_record", move || {
            again(Kind::Ours, "", kills)
        }),
        test_within(limit, "others::one_in_order_needs_no_record", move || {
            again(Kind::Reference, ",in-order=true", kills)
        }),
        test_within(limit, "others::a_nic", move || nic(kills)),
        test_within(
            limit,
            "others::one_whose_predecessors_misused_their_channel",
            heard,
        ),
        test_within(limit, "others::one_that_stays_away", move || away(absence)),
        test_within(limit, "others::one_without_a_record_needs_a_reset", || {
            [Kind::Reference, Kind::StorageDaemon]
                .into_iter()
                .try_for_each(no_record)
        }),
        test_within(limit, "others::a_guest_that_is_told_resets_its_device", told),
        test_within(limit, "others::seeking_ends_with_the_vm", || ends(|_| Ok(None))),
        test_within(limit, "others::a_handshake_ends_with_the_vm", || {
            ends(|path| Ok(Some(UnixListener::bind(path)?)))
        }),
    ]
}

/// Whose back end it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// qemu-storage-daemon, which offers no in-flight region.
    StorageDaemon,
    /// vhost-user-blk, started by hand. It offers one.
    Ours,
    /// It offers none, and completes in order.
    Reference,
}

impl Kind {
    fn image(self) -> Image {
        match self {
            Self::Reference => Image::Raw,
            _ => Image::Qcow2,
        }
    }

    fn queues(self) -> u16 {
        if self == Self::Reference { 1 } else { 4 }
    }
}

/// A back end at a socket path, and whoever starts it again.
struct Daemon {
    kind: Kind,
    disk: PathBuf,
    socket: PathBuf,
    process: Process,
}

impl Daemon {
    fn start(kind: Kind, disk: &Path) -> Result<Self> {
        let socket = disk.with_file_name("daemon.sock");
        let process = Process::start(command(kind, disk, &socket)?)?;
        wait_for(&socket, DEADLINE).with_context(|| process.stderr().unwrap_or_default())?;
        Ok(Self {
            kind,
            disk: disk.to_owned(),
            socket,
            process,
        })
    }

    fn kill(&mut self) -> Result<()> {
        self.process.signal(Signal::SIGKILL)?;
        self.process.wait(DEADLINE)?;
        Ok(())
    }

    fn start_again(&mut self) -> Result<()> {
        self.process = Process::start(command(self.kind, &self.disk, &self.socket)?)?;
        Ok(())
    }

    fn keep_alive(&mut self) -> Result<String> {
        if !self.process.alive()? {
            self.start_again()?;
        }
        self.process.stderr()
    }

    /// Ends it, and with it its lock on the image. Some end by themselves with their front end.
    fn stop(&mut self) -> Result<()> {
        if self.process.alive()? {
            self.process.signal(Signal::SIGTERM)?;
        }
        self.process.wait(DEADLINE)?;
        Ok(())
    }

    /// For `--disk`.
    fn flag(&self, more: &str) -> String {
        let queues = self.kind.queues();
        format!("vhost-user={},num-queues={queues}{more}", self.socket.display())
    }
}

fn command(kind: Kind, disk: &Path, socket: &Path) -> Result<Command> {
    let (disk, socket) = (disk.display(), socket.display());
    let mut command = match kind {
        Kind::StorageDaemon => Command::new("qemu-storage-daemon"),
        Kind::Ours => Command::new(artifact(Artifact::VhostUserBlk)?),
        Kind::Reference => Command::new(artifact(Artifact::ReferenceBlk)?),
    };
    match kind {
        Kind::StorageDaemon => command
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=file,filename={disk},discard=unmap"
            ))
            .args([
                "--blockdev",
                "driver=qcow2,node-name=disk,file=file,discard=unmap",
            ])
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=4,addr.type=unix,\
                 addr.path={socket}"
            )),
        Kind::Ours => command
            .arg(format!("--socket-path={socket}"))
            .arg(format!("--blk-file={disk}"))
            .args(["--format=qcow2", "--num-queues=4"]),
        Kind::Reference => command.arg(socket.to_string()).arg(disk.to_string()),
    };
    Ok(command)
}

/// A storm on another's disk, and the daemon that serves it.
fn storm(kind: Kind, more: &str) -> Result<(Storm, Daemon)> {
    let mut daemon = None;
    let queues = kind.queues();
    let scenario = format!("scenario=storm depth=64 queues={queues}");
    let storm = Storm::on(&scenario, kind.image(), None, |disk| {
        let started = Daemon::start(kind, disk)?;
        let flag = started.flag(more);
        daemon = Some(started);
        Ok(flag)
    })?;
    Ok((storm, daemon.context("no daemon")?))
}

/// Waits until the guest is served again. A daemon that does not start is started once more, as
/// whoever watches over it would: its predecessor's socket may still be held for a moment.
/// `keep_alive` does that, and tells what the daemon said.
fn back(
    victim: &mut Victim,
    run: &Run,
    times: u64,
    keep_alive: &mut dyn FnMut() -> Result<String>,
) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    let look = Duration::from_millis(100);
    while let Err(error) = victim.wait_count(run, EventKind::Reconnected, times, look) {
        let said = keep_alive()?;
        if Instant::now() > end {
            return Err(error.context(run.process.stderr()? + &said));
        }
    }
    Ok(())
}

fn again(kind: Kind, more: &str, kills: u64) -> Result<()> {
    Host::need_kvm()?;
    let (mut storm, mut daemon) = storm(kind, more)?;
    let mut moments = Moments::of(0);
    for kill in 1..=kills {
        moments.wait();
        daemon.kill()?;
        daemon.start_again()?;
        back(&mut storm.victim, &storm.run, kill, &mut || daemon.keep_alive())?;
    }
    let pid = daemon.process.pid().as_raw();
    let calm = storm.calm_then(|| daemon.stop());
    let events = calm
        .with_context(|| format!("the daemon:\n{}", threads(pid)))?
        .events;
    let busy = events.iter().filter(|event| event.outstanding >= 8).count();
    println!("{kills} kills, {busy} with 8 or more requests under way");
    let lost = events
        .iter()
        .filter(|event| event.event == EventKind::Disconnected)
        .count() as u64;
    ensure!(lost == kills && busy > 0, "{lost} lost, {busy} busy: {events:?}");
    Ok(())
}

/// A NIC's frames go both ways after each of the kills.
fn nic(kills: u64) -> Result<()> {
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x15];
    Host::need_kvm()?;
    let tap = Tap::new()?;
    fcntl(&tap.fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("nic.sock");
    let start = || {
        let mut command = Command::new(artifact(Artifact::VhostUserNet)?);
        command.arg(format!("--socket-path={}", socket.display()));
        command.arg(format!("--tap-fd={}", tap.fd.as_raw_fd()));
        Process::start(command)
    };
    let mut daemon = start()?;
    wait_for(&socket, DEADLINE).with_context(|| daemon.stderr().unwrap_or_default())?;
    let scenario = format!("scenario=net-echo packets={}", kills + 1);
    let flags = [format!(
        "--net=vhost-user={},mac=02:00:00:00:00:15",
        socket.display()
    )];
    let mut run = Run::tiny(&scenario, &flags)?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    let mut victim = Victim::new(ProcessRole::Net);
    tap.ask(MAC, 0, DEADLINE)?;
    for kill in 1..=kills {
        daemon.signal(Signal::SIGKILL)?;
        daemon.wait(DEADLINE)?;
        daemon = start()?;
        back(&mut victim, &run, kill, &mut || {
            if !daemon.alive()? {
                daemon = start()?;
            }
            daemon.stderr()
        })?;
        tap.ask(MAC, kill, DEADLINE)
            .with_context(|| run.process.stderr().unwrap_or_default())?;
    }
    run.wait(DEADLINE)?;
    run.console.expect_ok()
}

/// What a back end does to the channel for its own requests is not its successors' concern: they are heard.
fn heard() -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("liar.sock");
    let listener = UnixListener::bind(&path)?;
    let flags = [format!("--disk=vhost-user={}", path.display())];
    let mut run = Run::tiny("scenario=hlt", &flags)?;
    for lie in [Lie::ShutChannel, Lie::HalfRequest, Lie::Change] {
        let (socket, _) = listener.accept()?;
        let done = Liar::on(socket, lie)?.finish();
        done.with_context(|| format!("{lie:?}: {}", run.process.stderr().unwrap_or_default()))?;
    }
    run.verb("kill", &[])?.output()?;
    run.wait(DEADLINE).map(drop)
}

/// There is no limit of time.
fn away(absence: Duration) -> Result<()> {
    Host::need_kvm()?;
    let (mut storm, mut daemon) = storm(Kind::Ours, "")?;
    daemon.kill()?;
    thread::sleep(absence);
    daemon.start_again()?;
    back(&mut storm.victim, &storm.run, 1, &mut || daemon.keep_alive())?;
    let back = storm
        .victim
        .wait_event(&storm.run, EventKind::Reconnected, DEADLINE)?;
    ensure!(Duration::from_micros(back.took_us) >= absence, "{back:?}");
    storm.calm_then(|| daemon.stop()).map(drop)
}

/// What was in flight can be neither completed nor repeated: the guest is told, and the VM lives.
fn no_record(kind: Kind) -> Result<()> {
    Host::need_kvm()?;
    let (mut storm, mut daemon) = storm(kind, "")?;
    daemon.kill()?;
    daemon.start_again()?;
    let told = storm
        .victim
        .wait_event(&storm.run, EventKind::NeedsReset, DEADLINE)?;
    ensure!(told.detail.contains("no record"), "{told:?}");
    ensure!(storm.run.process.alive()?, "{}", storm.last_words()?);
    let words = storm.run.process.stderr()?;
    ensure!(words.contains("no record"), "it does not say why: {words}");
    Ok(())
}

/// The guest, told that its device needs a reset, resets it and is served as before: as a device of a type that
/// the VM knows by its number alone.
fn told() -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk");
    File::create(&path)?.set_len(16 << 20)?;
    let mut daemon = Daemon::start(Kind::Reference, &path)?;
    let flag = format!("--vhost-user=type=block,socket={}", daemon.socket.display());
    let mut run = Run::tiny("scenario=needs-reset", &[flag])?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    daemon.kill()?;
    daemon.start_again()?;
    let end = Instant::now() + DEADLINE;
    while run.process.alive()? && Instant::now() < end {
        // Its predecessor's socket may still be held for a moment.
        daemon.keep_alive()?;
        thread::sleep(Duration::from_millis(20));
    }
    run.wait(DEADLINE)?;
    run.console
        .expect_ok()
        .with_context(|| run.process.stderr().unwrap_or_default())
}

/// A VM whose back end is gone is asked to end; `stand_in` may take the back end's place, and never
/// answers.
fn ends(stand_in: fn(&Path) -> Result<Option<UnixListener>>) -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk");
    File::create(&path)?.set_len(16 << 20)?;
    let mut daemon = Daemon::start(Kind::Reference, &path)?;
    let flags = [
        format!("--disk={}", daemon.flag("")),
        "--power-off-grace=1".to_owned(),
    ];
    let mut run = Run::tiny("scenario=hlt", &flags)?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    fs::remove_file(&daemon.socket)?;
    let silent = stand_in(&daemon.socket)?;
    daemon.kill()?;
    let mut victim = Victim::new(ProcessRole::Disk);
    victim.wait_event(&run, EventKind::Disconnected, DEADLINE)?;
    run.process.signal(Signal::SIGTERM)?;
    let asked = Instant::now();
    run.wait(DEADLINE)?;
    let took = asked.elapsed();
    let words = run.process.stderr()?;
    ensure!(
        took < Duration::from_secs(1) + PROMPT && !words.contains("did not exit in time"),
        "{took:?}: {words}"
    );
    drop(silent);
    Ok(())
}
