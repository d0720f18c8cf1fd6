//! Linux at work, with files on ext4 and with TCP sessions, while its disk's and its NIC's processes
//! are killed: no file differs, no byte of a stream is lost, the link stays up, fsck finds nothing.

use crate::boots::BOOT;
use crate::default_kernel;
use anyhow::{Context, Result, ensure};
use integration_tests::artifacts::Artifact;
use integration_tests::demo::peer::Peer;
use integration_tests::host::Host;
use integration_tests::linux::words;
use integration_tests::linux::{Work, pattern};
use integration_tests::suite::{artifact, full, test_within};
use integration_tests::tiny::Run;
use libtest_mimic::Trial;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use vm_spec::events::{self, EventKind, VmEvent};
use vm_spec::run_state::{ProcessRole, ProcessState};

/// Everything is slow on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(60);
/// The guest works on between two kills.
const BETWEEN: Duration = Duration::from_millis(500);

pub(crate) fn tests() -> Vec<Trial> {
    let (disk, net) = if full() { (50, 20) } else { (5, 3) };
    vec![test_within(
        2 * BOOT + 3 * disk * PATIENCE / 20,
        "ext4 and TCP while their processes are killed",
        move || storm(disk, net),
    )]
}

fn storm(disk_kills: u32, net_kills: u32) -> Result<()> {
    Host::need_linux_kvm()?;
    let work = Work::new(default_kernel()?)?;
    let image = pattern::make_ext4(work.path())?;
    let peer = Peer::start("")?;
    fcntl(&peer.tap, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let flags = [
        format!("--kernel={}", work.kernel().elf.display()),
        format!("--initrd={}", work.kernel().initrd.display()),
        "--cmdline=console=ttyS0 quiet mitigations=off panic=-1 guest.storm=1".to_owned(),
        "--memory=192M".to_owned(),
        "--cpus=2".to_owned(),
        format!("--disk=path={},format=qcow2", image.display()),
        format!("--net=tap-fd={}", peer.tap.as_raw_fd()),
    ];
    let command = Command::new(artifact(Artifact::Bulkhead)?);
    let mut run = Run::by(command, tempfile::tempdir()?, &flags)?;
    let words = |run: &Run| run.process.stderr().unwrap_or_default() + &run.console.text();
    run.console
        .wait_line("guest: storm", BOOT)
        .with_context(|| words(&run))?;
    for round in 0..disk_kills.max(net_kills) {
        thread::sleep(BETWEEN);
        let roles = [(ProcessRole::Disk, disk_kills), (ProcessRole::Net, net_kills)];
        for (role, _) in roles.into_iter().filter(|(_, kills)| round < *kills) {
            strike(&mut run, role)?;
        }
        served_again(&mut run, "disk0", disk_kills.min(round + 1)).with_context(|| words(&run))?;
        served_again(&mut run, "net0", net_kills.min(round + 1)).with_context(|| words(&run))?;
    }
    run.press(b'\n')?;
    let status = run.wait(PATIENCE).with_context(|| words(&run))?;
    let text = words(&run);
    ensure!(status.success(), "{status}: {text}");
    words::expect_storm(&text, &["flaps 0"])?;
    pattern::check_ext4(work.path(), &image)
}

/// Kills the process that serves now.
pub(crate) fn strike(run: &mut Run, role: ProcessRole) -> Result<()> {
    strike_one(run, |process| process.role == role)
}

/// The same, of one device.
pub(crate) fn strike_named(run: &mut Run, device: &str) -> Result<()> {
    strike_one(run, |process| process.name == device)
}

fn strike_one(run: &mut Run, which: impl Fn(&ProcessState) -> bool) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let state = run.state(PATIENCE)?;
        let process = state.processes.iter().find(|process| which(process));
        let pid = process.context("no such process")?.pid;
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            // The last one has been struck, and its successor is on its way.
            Err(Errno::ESRCH) if Instant::now() < end => thread::sleep(Duration::from_millis(10)),
            struck => return Ok(struck?),
        }
    }
}

/// Waits until the device has been restarted so many times, and that is written down.
fn served_again(run: &mut Run, device: &str, times: u32) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    let path = run.run_folder().join(events::FILE_NAME);
    loop {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let seen: Vec<VmEvent> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let of = |event: &&VmEvent| event.event == EventKind::Restarted && event.device == device;
        let last = seen.iter().rfind(of);
        // Which process serves is written down a moment later.
        let state = run.state(PATIENCE)?;
        let known = |event: &VmEvent| state.processes.iter().any(|process| process.pid == event.pid);
        if last.is_some_and(|event| event.count >= u64::from(times) && known(event)) {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "{device}: not restarted {times} times: {text}"
        );
        thread::sleep(Duration::from_millis(10));
    }
}
