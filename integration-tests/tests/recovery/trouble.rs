//! Trouble of the host's: no space, a disk that fails, memory that runs out. Each is an event with a
//! name, and the guest goes on when it is over.

use crate::{
    storm::{DEADLINE, Image, Storm, faulty_binaries},
    upgrade::upgrade,
    victim::Victim,
};
use anyhow::{Context, Result, bail, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    loop_device::LoopDevice,
    suite::{Skip, artifact, test_within},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use nix::unistd::Uid;
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};
use vm_spec::{events::EventKind, run_state::ProcessRole};

const LIMIT: Duration = Duration::from_secs(120);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_within(LIMIT, "trouble::no_space_raw", || no_space(Image::Raw)),
        test_within(LIMIT, "trouble::no_space_qcow2", || no_space(Image::Qcow2)),
        test_within(LIMIT, "trouble::no_space_behind_a_block_device", block_device),
        test_within(LIMIT, "trouble::a_disk_that_fails", io_error),
        test_within(
            LIMIT,
            "trouble::a_flush_that_failed_is_known_to_successors",
            lost_writes,
        ),
        test_within(LIMIT, "trouble::out_of_memory", out_of_memory),
    ]
}

/// A file system in memory that can be too small.
struct Small(PathBuf);

impl Small {
    fn mount(folder: &Path) -> Result<Self> {
        let small = Self(folder.to_owned());
        small.set("size=6m", MsFlags::empty())?;
        Ok(small)
    }

    fn grow(&self) -> Result<()> {
        self.set("size=1g", MsFlags::MS_REMOUNT)
    }

    fn set(&self, size: &str, flags: MsFlags) -> Result<()> {
        let kind = Some("tmpfs");
        mount(kind, &self.0, kind, flags, Some(size)).context("mount")
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

pub(crate) fn need_root() -> Result<()> {
    Host::need_kvm()?;
    if !Uid::effective().is_root() {
        bail!(Skip("only root can mount, and change interfaces".to_owned()));
    }
    Ok(())
}

/// The disk process dies in the middle of it, too.
fn no_space(image: Image) -> Result<()> {
    need_root()?;
    let mut small = None;
    let mut storm = Storm::on("scenario=storm depth=64 queues=4", image, None, |path| {
        small = Some(Small::mount(path.parent().context("no folder")?)?);
        image.make(path)?;
        Ok(format!(
            "path={},format={},num-queues=4,on-error=stop",
            path.display(),
            image.name()
        ))
    })?;
    let small = small.context("no file system")?;
    passes(&mut storm, EventKind::NoSpace, || small.grow())
}

/// Waits for the trouble, has the disk's process die and then make room for another in it, and ends it.
fn passes(storm: &mut Storm, kind: EventKind, end: impl FnOnce() -> Result<()>) -> Result<()> {
    let told = storm
        .victim
        .wait_event(&storm.run, kind, DEADLINE)
        .with_context(|| storm.run.process.stderr().unwrap_or_default())?;
    ensure!(told.count == 1 && !told.detail.is_empty(), "{told:?}");
    let hit = storm.victim.strike(&mut storm.run, Signal::SIGKILL, DEADLINE)?;
    ensure!(hit && storm.victim.wait_restarted(&mut storm.run, DEADLINE)?);
    // The successor meets it as well.
    storm.victim.wait_count(&storm.run, kind, 2, DEADLINE)?;
    // And so does the successor of one that stops its rings properly.
    let output = upgrade(storm, &[], artifact(Artifact::VhostUserBlk)?)?;
    ensure!(output.status.success(), "{output:?}");
    storm.victim.wait_count(&storm.run, kind, 3, DEADLINE)?;
    end()?;
    storm
        .victim
        .wait_event(&storm.run, EventKind::Recovered, DEADLINE)?;
    let events = storm.finish()?.events;
    let needs_reset = events.iter().find(|event| event.event == EventKind::NeedsReset);
    ensure!(needs_reset.is_none(), "{needs_reset:?}");
    Ok(())
}

/// Past the page cache, and by calls: nothing would wait for a ring's writes there.
fn block_device() -> Result<()> {
    need_root()?;
    let (mut small, mut device) = (None, None);
    let mut storm = Storm::on("scenario=storm depth=16 queues=1", Image::Raw, None, |path| {
        small = Some(Small::mount(path.parent().context("no folder")?)?);
        Image::Raw.make(path)?;
        let made = LoopDevice::over(path)?;
        let flag = format!(
            "path={},format=raw,num-queues=1,cache=none,on-error=stop",
            made.path().display()
        );
        device = Some(made);
        Ok(flag)
    })?;
    let small = small.context("no file system")?;
    passes(&mut storm, EventKind::NoSpace, || small.grow())
}

/// The kernel tells of a write-back that failed once, and the process that it told dies: what was written is
/// lost, and no flush of its successors may say that it is safe, though the host could write it now.
fn lost_writes() -> Result<()> {
    need_root()?;
    let folder = tempfile::tempdir()?;
    let small = Small::mount(folder.path())?;
    let disk = folder.path().join("disk");
    File::create(&disk)?.set_len(600 << 20)?;
    let device = LoopDevice::over(&disk)?;
    let flag = format!("--disk=path={},format=raw", device.path().display());
    let mut run = Run::tiny("scenario=flushed lost=1", &[flag])?;
    run.console
        .wait_line("lost=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    small.grow()?;
    let mut victim = Victim::new(ProcessRole::Disk);
    for count in 1..=2 {
        ensure!(victim.strike(&mut run, Signal::SIGKILL, DEADLINE)?);
        victim.wait_count(&run, EventKind::Restarted, count, DEADLINE)?;
    }
    run.press(b'x')?;
    run.console
        .wait_line("result=ok", DEADLINE)
        .with_context(|| run.console.text())?;
    run.wait(DEADLINE)?;
    Ok(())
}

/// For two seconds every write fails; the guest sees nothing of it.
fn io_error() -> Result<()> {
    Host::need_kvm()?;
    let bins = faulty_binaries()?;
    let scenario = "scenario=storm depth=64 queues=4";
    let mut storm = Storm::on(scenario, Image::Qcow2, Some(bins.path()), |path| {
        Ok(format!(
            "id=bad.io-error,path={},format=qcow2,num-queues=4,on-error=stop",
            path.display()
        ))
    })?;
    for kind in [EventKind::IoError, EventKind::Recovered] {
        storm
            .victim
            .wait_event(&storm.run, kind, DEADLINE)
            .with_context(|| storm.run.process.stderr().unwrap_or_default())?;
    }
    storm.calm().map(drop)
}

/// The disk process's own group has too little, and then enough.
fn out_of_memory() -> Result<()> {
    need_root()?;
    let top = Path::new("/sys/fs/cgroup");
    let controllers = fs::read_to_string(top.join("cgroup.controllers")).unwrap_or_default();
    if !controllers.split_whitespace().any(|one| one == "memory") {
        bail!(Skip("no cgroup v2 with memory".to_owned()));
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk");
    File::create(&path)?.set_len(64 << 20)?;
    let flags = [
        format!("--disk=path={},format=raw", path.display()),
        "--limits=memory=256M".to_owned(),
    ];
    let mut run = Run::tiny("scenario=blk requests=20000 size=4096 depth=64", &flags)?;
    let state = run.state(DEADLINE)?;
    let disk = state.processes.iter().find(|p| p.role == ProcessRole::Disk);
    let pid = disk.context("no disk")?.pid;
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let limit = top.join(own.context("in no group")?).join("memory.max");
    let mut victim = Victim::new(ProcessRole::Disk);
    fs::write(&limit, "4096").with_context(|| limit.display().to_string())?;
    let words = |run: &Run| run.process.stderr().unwrap_or_default();
    victim
        .wait_event(&run, EventKind::OutOfMemory, DEADLINE)
        .with_context(|| words(&run))?;
    fs::write(&limit, "max")?;
    victim
        .wait_event(&run, EventKind::Restarted, DEADLINE)
        .with_context(|| words(&run))?;
    run.wait(DEADLINE)?;
    run.console.expect_ok().with_context(|| words(&run))
}
