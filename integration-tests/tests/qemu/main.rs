//! Our device processes with QEMU as their front end, under Debian's kernel. The emulator runs on
//! any host: no KVM is needed.

mod killed;

use anyhow::{Result, ensure};
use integration_tests::artifacts::Artifact;
use integration_tests::demo::peer::Peer;
use integration_tests::linux::words::expect;
use integration_tests::linux::{Images, KernelImages, pattern};
use integration_tests::nested::agent::run_here;
use integration_tests::nested::{Job, Stream};
use integration_tests::process::{Process, inherit_at, wait_for};
use integration_tests::suite::{self, artifact, seccomp_flag, test_within};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

/// For one boot on an emulated processor that others use too.
const BOOT: Duration = Duration::from_secs(150);
/// How long QEMU may take to find a new process in a dead one's place.
const RETURN: Duration = Duration::from_secs(20);
/// How long a device process may take until it listens.
const LISTEN: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    integration_tests::nested::agent::intercept();
    integration_tests::demo::peer::intercept();
    let kills = if suite::full() { 20 } else { 3 };
    suite::run(vec![
        test_within(BOOT, "QEMU's guest uses our disk and our NIC", disk_and_nic),
        test_within(2 * BOOT, "one disk process serves QEMU twice", twice),
        test_within(
            2 * BOOT + kills * RETURN,
            "QEMU goes on when our processes are killed",
            move || killed::killed(kills),
        ),
    ])
}

fn disk_and_nic() -> Result<()> {
    let kernel = Images::get()?.default;
    let work = tempfile::tempdir()?;
    let page = "the page for QEMU's guest";
    let (disk, sum) = pattern::make_disk(work.path())?;
    let (blk, net) = (work.path().join("blk.sock"), work.path().join("net.sock"));
    let blk_process = start_blk(&disk, &blk)?;
    let mut peer = Peer::start(page)?;
    peer.answer_at_once()?;
    let mut command = Command::new(artifact(Artifact::VhostUserNet)?);
    command.arg(seccomp_flag());
    command
        .arg(format!("--socket-path={}", net.display()))
        .arg("--tap-fd=4");
    inherit_at(&mut command, peer.tap.try_clone()?, 4)?;
    let _net = Process::start(command)?;
    wait_for(&net, LISTEN)?;
    let console = run_qemu(&kernel, &blk, Some(&net))?;
    expect(&console, &format!("disk {sum}"))?;
    expect(&console, &format!("page {page}"))?;
    stop(blk_process)?;
    pattern::check_disk(work.path(), &disk)
}

fn twice() -> Result<()> {
    let kernel = Images::get()?.default;
    let work = tempfile::tempdir()?;
    let (disk, sum) = pattern::make_disk(work.path())?;
    let socket = work.path().join("blk.sock");
    let blk = start_blk(&disk, &socket)?;
    for _ in 0..2 {
        let console = run_qemu(&kernel, &socket, None)?;
        expect(&console, &format!("disk {sum}"))?;
    }
    stop(blk)?;
    pattern::check_disk(work.path(), &disk)
}

/// Ends a disk process, and with it its lock on the image.
fn stop(mut blk: Process) -> Result<()> {
    blk.signal(nix::sys::signal::Signal::SIGTERM)?;
    let status = blk.wait(LISTEN)?;
    ensure!(
        status.success(),
        "after SIGTERM it ended with {status}: {}",
        blk.stderr()?
    );
    Ok(())
}

fn start_blk(disk: &Path, socket: &Path) -> Result<Process> {
    let mut command = Command::new(artifact(Artifact::VhostUserBlk)?);
    command.arg(seccomp_flag());
    command.arg(format!("--socket-path={}", socket.display()));
    command
        .arg(format!("--blk-file={}", disk.display()))
        .arg("--format=qcow2");
    let base = disk.with_file_name("base.qcow2");
    command
        .arg(format!("--backing=qcow2:{}", base.display()))
        .arg("--num-queues=2")
        .args(["--on-error=stop", "--poll-us=50", "--limit=ops=50K,bytes=1G"]);
    let mut process = Process::start(command)?;
    match wait_for(socket, LISTEN) {
        Ok(()) => Ok(process),
        Err(error) => Err(error.context(format!("alive: {}; {}", process.alive()?, process.stderr()?))),
    }
}

/// Runs a guest under QEMU to its end and returns its console.
fn run_qemu(kernel: &KernelImages, blk: &Path, net: Option<&Path>) -> Result<String> {
    let argv = qemu_argv(kernel, blk, net, Front::ONCE);
    let words: Vec<&str> = argv.iter().map(String::as_str).collect();
    let (mut console, mut stderr) = (Vec::new(), Vec::new());
    let ended = run_here(&Job::new(&words, BOOT), &mut |stream, bytes| match stream {
        Stream::Out => console.extend_from_slice(bytes),
        Stream::Err => stderr.extend_from_slice(bytes),
    });
    let console = String::from_utf8_lossy(&console).into_owned();
    ensure!(
        ended.success() && console.contains("guest: end"),
        "QEMU ended with {ended:?}: {}\n{console}",
        String::from_utf8_lossy(&stderr)
    );
    Ok(console)
}

/// How QEMU is to be a front end.
#[derive(Clone, Copy)]
struct Front {
    /// Further options of its sockets.
    socket: &'static str,
    /// Further words of the kernel's command line.
    words: &'static str,
}

impl Front {
    /// With back ends that stay.
    const ONCE: Self = Self {
        socket: "",
        words: "",
    };
}

fn qemu_argv(kernel: &KernelImages, blk: &Path, net: Option<&Path>, front: Front) -> Vec<String> {
    let mut argv: Vec<String> =
        "qemu-system-x86_64 -M q35,memory-backend=ram -accel tcg,thread=single -cpu max -smp 2 -m 256 \
         -nodefaults -no-user-config -display none -no-reboot -serial stdio \
         -object memory-backend-memfd,id=ram,size=256M,share=on"
            .split_whitespace()
            .map(str::to_owned)
            .collect();
    let mut add = |words: &[&str]| argv.extend(words.iter().map(|word| (*word).to_owned()));
    let text = |path: &Path| path.to_string_lossy().into_owned();
    add(&[
        "-chardev",
        &format!("socket,id=blk,path={}{}", text(blk), front.socket),
    ]);
    add(&["-device", "vhost-user-blk-pci,chardev=blk,num-queues=2"]);
    if let Some(net) = net {
        add(&[
            "-chardev",
            &format!("socket,id=net,path={}{}", text(net), front.socket),
        ]);
        add(&["-netdev", "vhost-user,id=net,chardev=net"]);
        add(&["-device", "virtio-net-pci,netdev=net,romfile="]);
    }
    add(&[
        "-kernel",
        &text(&kernel.bzimage),
        "-initrd",
        &text(&kernel.initrd),
    ]);
    let line = "console=ttyS0 quiet mitigations=off no_timer_check panic=-1";
    add(&["-append", &format!("{line} {}", front.words)]);
    argv
}
