//! Storms over files of a disk, as the images of VMs are: flushes wait on a thread of their own, and rings move data.
//! In memory, where the other storms are, there is neither.

use crate::{
    forced,
    kills::{Moments, SUCCESSOR},
    storm::{DEADLINE, Image, Stalls, Storm, faulty_binaries},
};
use anyhow::{Result, bail, ensure};
use integration_tests::{
    host::Host,
    suite::{Skip, full, test_within},
};
use libtest_mimic::Trial;
use nix::sys::{
    signal::Signal,
    statfs::{EXT4_SUPER_MAGIC, FsType, statfs},
};
use std::{env, fs, io, path::PathBuf, time::Duration};
use tempfile::TempDir;
use vm_spec::run_state::ProcessRole;

/// `linux/magic.h`; not every C library has it.
const XFS_SUPER_MAGIC: FsType = FsType(0x5846_5342);
/// Steps of [`crate::forced`] around which a ring's request is under way, or done and not yet told.
const STEPS: [&str; 3] = ["complete-before", "submit-after", "publish-index"];

/// How the image is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cache {
    /// Through the page cache: only reads that would wait go to a ring.
    Cached,
    /// With O_DIRECT: guest data goes through rings, qcow2's tables do not.
    Direct,
}

impl Cache {
    fn name(self) -> &'static str {
        match self {
            Self::Cached => "cached",
            Self::Direct => "direct",
        }
    }

    /// Keys of the disk's description.
    pub(crate) fn keys(self) -> &'static str {
        match self {
            Self::Cached => "",
            Self::Direct => ",cache=none",
        }
    }
}

pub(crate) fn tests() -> Vec<Trial> {
    let limit = Duration::from_secs(if full() { 600 } else { 120 });
    let mut tests = Vec::new();
    for (image, cache) in [
        (Image::Raw, Cache::Cached),
        (Image::Qcow2, Cache::Direct),
        (Image::Raw, Cache::Direct),
        (Image::Qcow2, Cache::Cached),
    ]
    .into_iter()
    .take(if full() { 4 } else { 2 })
    {
        let name = format!("kills::disk_under_load_{}_{}", image.name(), cache.name());
        tests.push(test_within(limit, name, move || under_load(image, cache)));
    }
    for step in if full() { &STEPS[..] } else { &STEPS[..1] } {
        let name = format!("forced::dies_at_{step}_with_rings");
        tests.push(test_within(limit, name, move || dies(step)));
    }
    tests
}

/// A new folder on a file system that waits for a disk, and on which rings write.
pub(crate) fn folder() -> Result<TempDir> {
    let places = [env::temp_dir(), PathBuf::from("/var/tmp")];
    let on_disk = |place: &&PathBuf| {
        let kind = statfs(place.as_path()).map(|system| system.filesystem_type());
        kind.is_ok_and(|kind| [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC].contains(&kind))
    };
    match places.iter().find(on_disk) {
        Some(place) => Ok(tempfile::tempdir_in(place)?),
        None => bail!(Skip("no folder for temporary files is on ext4 or XFS".to_owned())),
    }
}

/// Whether process `pid` has an io_uring, whose writes its end does not wait for.
///
/// # Errors
/// Where another user's process is looked at without privileges, too.
pub(crate) fn has_ring(pid: i32) -> io::Result<bool> {
    let mut rings = false;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        match fs::read_link(entry?.path()) {
            Ok(link) => rings |= link.as_os_str() == "anon_inode:[io_uring]",
            // Closed since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(rings)
}

/// The disk's process is what it is for an image on a disk: with rings, and a thread for flushes.
fn is_whole(storm: &mut Storm) -> Result<()> {
    let pid = storm.run.pid_of(ProcessRole::Disk, DEADLINE)?;
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        threads.push(fs::read_to_string(entry?.path().join("comm"))?);
    }
    ensure!(threads.iter().any(|name| name.trim() == "flushes"), "{threads:?}");
    match has_ring(pid.as_raw()) {
        Ok(true) => Ok(()),
        Ok(false) if storm.run.process.stderr()?.contains("refuses an io_uring") => {
            bail!(Skip("the host has no io_uring".to_owned()))
        }
        Ok(false) => bail!("no io_uring: {}", storm.run.process.stderr()?),
        // Only root sees that.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Kills at random moments; what was under way in a ring, beside a flush or an allocation, is done once, and in order.
fn under_load(image: Image, cache: Cache) -> Result<()> {
    Host::need_kvm()?;
    let mut moments = Moments::new();
    let mut storm = Storm::on_disk(image, "disk0", cache, None)?;
    is_whole(&mut storm)?;
    for _ in 0..if full() { 100 } else { 5 } {
        moments.wait();
        let hit = storm.victim.strike(&mut storm.run, Signal::SIGKILL, SUCCESSOR)?;
        ensure!(
            hit && storm.victim.wait_restarted(&mut storm.run, DEADLINE)?,
            "the VM ended: {}",
            storm.last_words()?
        );
    }
    is_whole(&mut storm)?;
    let stalls = Stalls::of(storm.calm()?.events.iter());
    stalls.judge(&format!("{} {} on a disk", image.name(), cache.name()))?;
    ensure!(
        stalls.busy() * 2 >= stalls.count(),
        "the guest was idle at most kills"
    );
    Ok(())
}

/// As [`crate::forced`] does it, with direct writes to a qcow2 image.
fn dies(step: &str) -> Result<()> {
    Host::need_kvm()?;
    let bins = faulty_binaries()?;
    let id = format!("bad.{step}");
    let storm = Storm::on_disk(Image::Qcow2, &id, Cache::Direct, Some(bins.path()))?;
    forced::each_dies(storm, step, if full() { 100 } else { 5 })
}
