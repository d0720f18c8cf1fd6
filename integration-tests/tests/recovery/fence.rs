//! Direct writes of a disk process that is killed while its disk is slow: they land before the
//! successor's first, whatever kind of file it is. Were they not waited for, the storm would find
//! blocks of an older generation, and the successor would serve at once.

use crate::{
    on_disk::has_ring,
    storm::{DEADLINE, Image, Stalls, Storm},
};
use anyhow::{Context, Result, bail, ensure};
use integration_tests::{
    host::Host,
    loop_device::LoopDevice,
    suite::{Skip, test_within},
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use nix::unistd::Uid;
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};
use vm_spec::run_state::ProcessRole;

const LIMIT: Duration = Duration::from_secs(150);
/// Writes a second that the slow disk takes.
const SLOW: u64 = 100;
/// More than a process takes to start, and less than the writes under way need.
const NOTABLE: Duration = Duration::from_millis(300);
/// Of cgroup v1.
const BLKIO: &str = "/sys/fs/cgroup/blkio";
/// Of cgroup v2.
const UNIFIED: &str = "/sys/fs/cgroup";

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_within(LIMIT, "fence::ext4 (waits)", || fence(Place::Waits("ext4"))),
        test_within(LIMIT, "fence::xfs (waits)", || fence(Place::Waits("xfs"))),
        test_within(LIMIT, "fence::btrfs", || fence(Place::Calls("btrfs"))),
        test_within(LIMIT, "fence::block_device", || fence(Place::BlockDevice)),
    ]
}

/// Where the image is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In a file of such a file system; the successor waits, by fallocate.
    Waits(&'static str),
    /// In a file of another kind, where the process's own end waits.
    Calls(&'static str),
    /// On the device itself, where it does so too.
    BlockDevice,
}

/// What makes a device slow for some processes.
#[derive(Clone, Copy)]
enum Throttle {
    /// The controller blkio of cgroup v1.
    Blkio,
    /// The controller io of cgroup v2.
    Io,
}

impl Throttle {
    /// The one that this host has.
    fn find() -> Result<Self> {
        if !Uid::effective().is_root() {
            bail!(Skip("only root makes a disk slow".to_owned()));
        }
        if Path::new(BLKIO).join("blkio.throttle.write_iops_device").exists() {
            return Ok(Self::Blkio);
        }
        let controllers = Path::new(UNIFIED).join("cgroup.controllers");
        let controllers = fs::read_to_string(controllers).unwrap_or_default();
        if controllers.split_whitespace().any(|name| name == "io") {
            return Ok(Self::Io);
        }
        bail!(Skip(
            "neither cgroup v1's blkio nor cgroup v2's io is here to make a disk slow".to_owned()
        ))
    }

    /// Makes the group `name`.
    fn group(self, name: &str) -> Result<PathBuf> {
        let root = match self {
            Self::Blkio => Path::new(BLKIO),
            Self::Io => {
                let root = Path::new(UNIFIED);
                // It stays handed down: others may have come to use it.
                if let Err(error) = fs::write(root.join("cgroup.subtree_control"), "+io") {
                    bail!(Skip(format!("cgroup v2's io cannot be used here: {error}")));
                }
                root
            }
        };
        let group = root.join(name);
        fs::create_dir(&group).context("a group that is throttled")?;
        if !group.join(self.limit().0).exists() {
            fs::remove_dir(&group)?;
            bail!(Skip("this kernel throttles no block devices".to_owned()));
        }
        Ok(group)
    }

    /// The file that takes the limit, and what stands before the number of writes a second.
    fn limit(self) -> (&'static str, &'static str) {
        match self {
            Self::Blkio => ("blkio.throttle.write_iops_device", ""),
            Self::Io => ("io.max", "wiops="),
        }
    }
}

/// A device over a file in memory, with a group for whose processes it is slow.
struct SlowDisk {
    device: LoopDevice,
    throttle: Throttle,
    group: PathBuf,
}

impl SlowDisk {
    fn make(file: &Path, throttle: Throttle) -> Result<Self> {
        fs::File::create(file)?.set_len(640 << 20)?;
        let device = LoopDevice::over(file)?;
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let group = throttle.group(&format!("bulkhead-fence-{process}-{count}"))?;
        Ok(Self {
            device,
            throttle,
            group,
        })
    }

    /// Writes of process `pid` take their time from here on.
    fn slow(&self, pid: i32) -> Result<()> {
        let number = fs::metadata(self.device.path())?.rdev();
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        let (file, unit) = self.throttle.limit();
        fs::write(self.group.join(file), format!("{major}:{minor} {unit}{SLOW}"))?;
        Ok(fs::write(self.group.join("cgroup.procs"), pid.to_string())?)
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.group);
    }
}

fn fence(place: Place) -> Result<()> {
    Host::need_kvm()?;
    let throttle = Throttle::find()?;
    let mut slow = None;
    // A flush and a discard wait for writes, and with them the death of the process: here it is the
    // successor that is to wait.
    let scenario = "scenario=storm depth=64 queues=4 flushes=0 discards=0";
    let mut storm = Storm::on(scenario, Image::Raw, None, |path| {
        fs::remove_file(path)?;
        let file = path.with_extension("loop");
        let mut disk = SlowDisk::make(&file, throttle)?;
        let image = match place {
            Place::Waits(kind) | Place::Calls(kind) => {
                let folder = path.with_extension("mount");
                disk.device.mount(kind, &folder)?;
                let image = folder.join("disk");
                // Writes that allocate are done by threads of the process, whose end waits for them.
                Image::Raw.make_allocated(&image)?;
                image
            }
            Place::BlockDevice => disk.device.path().to_owned(),
        };
        // What the storm compares in the end.
        std::os::unix::fs::symlink(&image, path)?;
        slow = Some(disk);
        Ok(format!(
            "path={},format=raw,num-queues=4,cache=none",
            image.display()
        ))
    })?;
    let disk = slow.context("no disk")?;
    for _ in 0..3 {
        let state = storm.run.state(DEADLINE)?;
        let process = state.processes.iter().find(|p| p.role == ProcessRole::Disk);
        let pid = process.context("no disk process")?.pid;
        let rings = matches!(place, Place::Waits(_));
        ensure!(
            has_ring(pid)? == rings,
            "who moves the data? {}",
            storm.run.process.stderr()?
        );
        disk.slow(pid)?;
        // Until the queues are full of writes that wait.
        thread::sleep(NOTABLE);
        let hit = storm.victim.strike(&mut storm.run, Signal::SIGKILL, DEADLINE)?;
        ensure!(hit && storm.victim.wait_restarted(&mut storm.run, DEADLINE)?);
    }
    let calm = storm.finish()?;
    let stalls = Stalls::of(calm.events.iter());
    stalls.judge(&match place {
        Place::Waits(kind) | Place::Calls(kind) => format!("fence, {kind}"),
        Place::BlockDevice => "fence, block device".to_owned(),
    })?;
    let waited = calm.events.iter().map(|event| event.took_us).max().unwrap_or(0);
    ensure!(
        !matches!(place, Place::Waits(_)) || Duration::from_micros(waited) > NOTABLE,
        "the successor did not wait for its predecessor's writes: {waited} us"
    );
    Ok(())
}
