//! QEMU as the front end of our processes, with `reconnect-ms`, while these are killed: what was in
//! flight is taken over from the in-flight region that QEMU keeps, and TCP sessions live on.

use crate::{BOOT, Front, LISTEN, RETURN, qemu_argv, stop};
use anyhow::{Context, Result, bail, ensure};
use integration_tests::artifacts::Artifact;
use integration_tests::demo::peer::Peer;
use integration_tests::linux::{Images, pattern, words};
use integration_tests::process::{Process, inherit_at, wait_for};
use integration_tests::suite::artifact;
use integration_tests::tiny::Console;
use nix::sys::signal::Signal;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The guest works on between two kills.
const BETWEEN: Duration = Duration::from_millis(300);
/// QEMU's name for the guest's memory.
const GUEST_MEMORY: &str = "memory-backend-memfd";
/// QEMU tries again so often, and the guest works with files and two TCP sessions.
const FRONT: Front = Front {
    socket: ",reconnect-ms=20",
    words: "guest.storm=1",
};

pub(crate) fn killed(kills: u32) -> Result<()> {
    let kernel = Images::get()?.default;
    let work = tempfile::tempdir()?;
    let image = pattern::make_ext4(work.path())?;
    let (blk, net) = (work.path().join("blk.sock"), work.path().join("net.sock"));
    let peer = Peer::start("")?;
    let mut disk = start(&|| blk_command(&image, &blk))?;
    let mut nic = start(&|| net_command(&peer, &net))?;
    wait_for(&blk, LISTEN)?;
    wait_for(&net, LISTEN)?;
    let argv = qemu_argv(&kernel, &blk, Some(&net), FRONT);
    let (program, arguments) = argv.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(arguments).stdout(Stdio::piped());
    let mut qemu = Process::start_with_input(command, Stdio::piped())?;
    let mut console = Console::new(qemu.child().stdout.take().context("no stdout")?);
    console
        .wait_line("guest: storm", BOOT)
        .with_context(|| qemu.stderr().unwrap_or_default() + &console.text())?;
    for _ in 0..kills {
        thread::sleep(BETWEEN);
        disk = replace(disk, &|| blk_command(&image, &blk))?;
        nic = replace(nic, &|| net_command(&peer, &net))?;
    }
    thread::sleep(BETWEEN);
    let input = qemu.child().stdin.as_mut().context("no stdin")?;
    input.write_all(b"\n")?;
    let status = qemu.wait(BOOT).with_context(|| console.text())?;
    console.finish(LISTEN)?;
    let text = console.text() + &qemu.stderr()?;
    ensure!(status.success(), "{status}: {text}");
    // QEMU takes the link down while it has no back end, so that flaps say nothing here.
    words::expect_storm(&text, &[])?;
    stop(disk)?;
    pattern::check_ext4(work.path(), &image)
}

fn blk_command(image: &Path, socket: &Path) -> Result<Command> {
    let mut command = Command::new(artifact(Artifact::VhostUserBlk)?);
    command
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--blk-file={}", image.display()))
        .args(["--format=qcow2", "--num-queues=2"]);
    Ok(command)
}

fn net_command(peer: &Peer, socket: &Path) -> Result<Command> {
    let mut command = Command::new(artifact(Artifact::VhostUserNet)?);
    command
        .arg(format!("--socket-path={}", socket.display()))
        .arg("--tap-fd=4");
    inherit_at(&mut command, peer.tap.try_clone()?, 4)?;
    Ok(command)
}

fn start(command: &dyn Fn() -> Result<Command>) -> Result<Process> {
    Process::start(command()?)
}

/// Kills `process` and starts another, until one has QEMU's guest memory. The dead one's socket may
/// be held for a moment: then the next one ends at once, and is started again.
fn replace(mut process: Process, command: &dyn Fn() -> Result<Command>) -> Result<Process> {
    process.signal(Signal::SIGKILL)?;
    process.wait(LISTEN)?;
    let end = Instant::now() + RETURN / 2;
    let mut next = start(command)?;
    while Instant::now() < end {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", next.pid())).unwrap_or_default();
        if maps.contains(GUEST_MEMORY) {
            return Ok(next);
        }
        if !next.alive()? {
            next = start(command)?;
        }
        thread::sleep(Duration::from_millis(10));
    }
    bail!(
        "QEMU did not come back within {:?}: {}",
        RETURN / 2,
        next.stderr()?
    )
}
