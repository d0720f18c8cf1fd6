//! How long a guest's writes stand still when its disk's process is killed: ours, which bulkhead starts
//! again, and beside it QEMU with qemu-storage-daemon, which this test starts again at once.

use crate::boots::BOOT;
use crate::default_kernel;
use crate::storm::strike;
use anyhow::{Context, Result, ensure};
use integration_tests::bench::median;
use integration_tests::host::Host;
use integration_tests::linux::{KernelImages, Work};
use integration_tests::process::Process;
use integration_tests::suite::{full, test_within};
use integration_tests::tiny::{Console, Run};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use vm_spec::run_state::ProcessRole;

/// VMs of each kind, in turn, and kills in each.
const TURNS: usize = 2;
const KILLS: usize = 5;
/// The guest writes on between two kills; it has begun again when it has written for so long.
const BETWEEN: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(60);
const CMDLINE: &str = "console=ttyS0 quiet mitigations=off panic=-1 guest.writes=1";

pub(crate) fn tests() -> Vec<Trial> {
    if !full() {
        return Vec::new();
    }
    vec![test_within(
        2 * TURNS as u32 * (BOOT + PATIENCE),
        "a killed disk beside QEMU's with qemu-storage-daemon (full)",
        beside,
    )]
}

fn beside() -> Result<()> {
    Host::need_linux_kvm()?;
    let work = Work::new(default_kernel()?)?;
    let disk = work.path().join("disk.raw");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        File::create(&disk)?.set_len(64 << 20)?;
        theirs.extend(qemu(work.kernel(), &disk)?);
        File::create(&disk)?.set_len(64 << 20)?;
        ours.extend(bulkhead(work.kernel(), &disk)?);
    }
    println!("stalls of bulkhead's guest: {ours:.1?}");
    println!("stalls of QEMU's guest: {theirs:.1?}");
    let (ours, theirs) = (median(ours), median(theirs));
    let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
    println!("medians: {ours:.1?} / {theirs:.1?} = {ratio:.2}");
    Ok(())
}

fn bulkhead(kernel: &KernelImages, disk: &Path) -> Result<Vec<Duration>> {
    let flags = [
        format!("--kernel={}", kernel.elf.display()),
        format!("--initrd={}", kernel.initrd.display()),
        format!("--cmdline={CMDLINE}"),
        "--memory=192M".to_owned(),
        format!("--disk=path={},format=raw", disk.display()),
    ];
    let mut run = Run::with_flags(&flags)?;
    run.console.wait_line("guest: writes", BOOT)?;
    let mut stalls = Vec::new();
    for _ in 0..KILLS {
        stalls.push(stall(disk, || strike(&mut run, ProcessRole::Disk))?);
    }
    run.press(b'\n')?;
    let status = run.wait(PATIENCE)?;
    let text = run.process.stderr()? + &run.console.text();
    ensure!(
        status.success() && !text.contains("guest: cannot"),
        "{status}: {text}"
    );
    Ok(stalls)
}

fn qemu(kernel: &KernelImages, disk: &Path) -> Result<Vec<Duration>> {
    let socket = disk.with_extension("sock");
    let mut daemon = storage_daemon(disk, &socket)?;
    let end = Instant::now() + PATIENCE;
    while !socket.exists() {
        ensure!(Instant::now() < end, "no socket: {}", daemon.stderr()?);
        thread::sleep(Duration::from_millis(10));
    }
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-M",
            "q35,memory-backend=ram",
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-m",
            "192M",
        ])
        .args(["-object", "memory-backend-memfd,id=ram,size=192M,share=on"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .arg("-chardev")
        .arg(format!("socket,id=blk,path={},reconnect-ms=10", socket.display()))
        .args(["-device", "vhost-user-blk-pci,chardev=blk,num-queues=1"])
        .arg("-kernel")
        .arg(&kernel.bzimage)
        .arg("-initrd")
        .arg(&kernel.initrd)
        .args(["-append", CMDLINE])
        .stdout(Stdio::piped());
    let mut qemu = Process::start_with_input(command, Stdio::piped())?;
    let mut console = Console::new(qemu.child().stdout.take().context("no stdout")?);
    console
        .wait_line("guest: writes", BOOT)
        .with_context(|| qemu.stderr().unwrap_or_default() + &console.text())?;
    let mut stalls = Vec::new();
    for _ in 0..KILLS {
        stalls.push(stall(disk, || {
            daemon.signal(Signal::SIGKILL)?;
            daemon.wait(PATIENCE)?;
            daemon = storage_daemon(disk, &socket)?;
            Ok(())
        })?);
    }
    qemu.child()
        .stdin
        .as_mut()
        .context("no stdin")?
        .write_all(b"\n")?;
    let status = qemu.wait(PATIENCE)?;
    console.finish(PATIENCE)?;
    let text = console.text();
    ensure!(
        status.success() && !text.contains("guest: cannot"),
        "{status}: {text}"
    );
    Ok(stalls)
}

fn storage_daemon(disk: &Path, socket: &Path) -> Result<Process> {
    let mut command = Command::new("qemu-storage-daemon");
    command
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=disk,filename={}", disk.display()))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        ));
    Process::start(command)
}

/// Kills, and finds the longest time in which the image was not written, until it has been written for
/// a while again. The host's clock for files ticks every 4 ms.
fn stall(disk: &Path, kill: impl FnOnce() -> Result<()>) -> Result<Duration> {
    thread::sleep(BETWEEN);
    let written = || std::fs::metadata(disk).map(|metadata| (metadata.mtime(), metadata.mtime_nsec()));
    let (mut before, mut since) = (written()?, Instant::now());
    kill()?;
    let end = Instant::now() + PATIENCE;
    let (mut longest, mut again) = (Duration::ZERO, Instant::now());
    // Written again: since `again`, with no gap as long as the longest.
    while again.elapsed() < BETWEEN || longest < Duration::from_millis(10) {
        ensure!(Instant::now() < end, "no writes any more");
        let now = written()?;
        if now != before {
            if since.elapsed() > longest {
                (longest, again) = (since.elapsed(), Instant::now());
            }
            (before, since) = (now, Instant::now());
        } else if since.elapsed() > longest {
            again = Instant::now();
        }
        thread::sleep(Duration::from_micros(500));
    }
    Ok(longest)
}
