//! The storm: random writes, reads, flushes and discards at depth 64 on four queues, every block
//! with its number and generation, while the disk process dies; then everything is compared.

use crate::{
    on_disk::{self, Cache},
    victim::Victim,
};
use anyhow::{Context, Result, ensure};
use guest_contract::Checksum;
use integration_tests::{
    artifacts::Artifact,
    host::NESTED,
    process::threads,
    qemu_img::{qemu_img, qemu_img_output},
    scratch::quick_folder,
    suite::{artifact, full},
    tiny::Run,
};
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use vm_spec::{
    events::{EventKind, VmEvent},
    run_state::ProcessRole,
};

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
/// Each has a cluster of its own.
const BLOCKS: u64 = 8192;
const STRIDE: u64 = 64 << 10;
const BLOCK: usize = 4096;
/// The guest's own, unless it is told another.
const SEED: u64 = 1;
const SCENARIO: &str = "scenario=storm depth=64 queues=4";

/// What the disk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Image {
    /// A sparse file.
    Raw,
    /// Empty at first; discards free clusters, so that about half of all writes allocate one.
    Qcow2,
}

impl Image {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// What `--disk` says of such a one with this id, for the guest's four queues.
    fn keys(self, id: &str, path: &Path) -> String {
        let (path, format) = (path.display(), self.name());
        format!("id={id},path={path},format={format},num-queues=4")
    }

    pub(crate) fn make(self, path: &Path) -> Result<()> {
        match self {
            Self::Raw => File::create(path)?.set_len(BLOCKS * STRIDE)?,
            Self::Qcow2 => {
                let (path, size) = (text(path)?, (BLOCKS * STRIDE).to_string());
                qemu_img(&["create", "-q", "-f", "qcow2", path, &size])?;
            }
        }
        Ok(())
    }

    /// A raw file in which every block of the storm exists.
    pub(crate) fn make_allocated(self, path: &Path) -> Result<()> {
        self.make(path)?;
        let file = File::options().write(true).open(path)?;
        for number in 0..BLOCKS {
            file.write_all_at(&[0; BLOCK], number * STRIDE)?;
        }
        Ok(file.sync_all()?)
    }

    /// `qemu-img check`.
    pub(crate) fn check(self, path: &Path) -> Result<()> {
        match self {
            Self::Raw => Ok(()),
            Self::Qcow2 => {
                let output = qemu_img_output(Path::new("."), &["check", "-f", "qcow2", text(path)?])?;
                let words = String::from_utf8_lossy(&output.stdout);
                // 3: clusters that a dead process had allocated and not yet used are lost, as
                // with any writer of qcow2; nothing else may be wrong.
                ensure!(
                    matches!(output.status.code(), Some(0 | 3)) && !words.contains("ERROR"),
                    "qemu-img check: {}: {words}{}",
                    output.status,
                    String::from_utf8_lossy(&output.stderr)
                );
                Ok(())
            }
        }
    }

    /// `qemu-img check`, then the image as QEMU reads it.
    fn examine(self, path: &Path) -> Result<File> {
        self.check(path)?;
        let raw = match self {
            Self::Raw => path.to_owned(),
            Self::Qcow2 => {
                let raw = path.with_extension("raw");
                qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text(path)?, text(&raw)?])?;
                raw
            }
        };
        Ok(File::open(raw)?)
    }
}

/// The first `count` blocks.
fn blocks(file: &File, count: u64) -> impl Iterator<Item = Result<[u8; BLOCK]>> {
    (0..count).map(|number| {
        let mut block = [0; BLOCK];
        file.read_exact_at(&mut block, number * STRIDE)?;
        Ok(block)
    })
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("temporary folder is not UTF-8")
}

/// A VM in the middle of a storm.
pub(crate) struct Storm {
    pub(crate) run: Run,
    pub(crate) victim: Victim,
    image: Image,
    folder: TempDir,
    disks: usize,
    began: Instant,
}

/// What became of one.
pub(crate) struct Calm {
    /// Every event of the disk.
    pub(crate) events: Vec<VmEvent>,
    /// The longest time for which a queue with requests under way completed none, by the guest's clock.
    pub(crate) longest_gap: Duration,
}

impl Storm {
    /// Starts one on the disk `id`, served by the binaries in `bins` (ours without).
    pub(crate) fn start(image: Image, id: &str, bins: Option<&Path>) -> Result<Self> {
        Self::of(SCENARIO, image, id, bins)
    }

    /// As [`Storm::start`], with the image where a disk of the host's is waited for.
    pub(crate) fn on_disk(image: Image, id: &str, cache: Cache, bins: Option<&Path>) -> Result<Self> {
        let disk = |path: &Path| Ok(image.keys(id, path) + cache.keys());
        Self::within(on_disk::folder()?, SCENARIO, image, bins, disk)
    }

    /// Starts another scenario on such a disk.
    pub(crate) fn of(scenario: &str, image: Image, id: &str, bins: Option<&Path>) -> Result<Self> {
        Self::on(scenario, image, bins, |path| Ok(image.keys(id, path)))
    }

    /// Starts a scenario on the disk that `disk` describes, for the image at a path.
    pub(crate) fn on(
        scenario: &str,
        image: Image,
        bins: Option<&Path>,
        disk: impl FnOnce(&Path) -> Result<String>,
    ) -> Result<Self> {
        Self::within(quick_folder()?, scenario, image, bins, disk)
    }

    fn within(
        folder: TempDir,
        scenario: &str,
        image: Image,
        bins: Option<&Path>,
        disk: impl FnOnce(&Path) -> Result<String>,
    ) -> Result<Self> {
        let path = path_of(&folder, 0);
        image.make(&path)?;
        Self::launch(
            scenario,
            image,
            bins,
            folder,
            &[format!("--disk={}", disk(&path)?)],
        )
    }

    /// Starts one on two disks, `disk0` and `disk1`.
    pub(crate) fn two(image: Image) -> Result<Self> {
        let folder = quick_folder()?;
        let disks = [0, 1].map(|number| {
            let path = path_of(&folder, number);
            image.make(&path)?;
            Ok(format!("--disk={}", image.keys(&format!("disk{number}"), &path)))
        });
        let disks = disks.into_iter().collect::<Result<Vec<_>>>()?;
        Self::launch(&format!("{SCENARIO} disks=2"), image, None, folder, &disks)
    }

    /// Starts one on the disk `disk0`, of a VM that has the NIC `net0`, too.
    pub(crate) fn beside_a_nic(image: Image) -> Result<Self> {
        let folder = quick_folder()?;
        let path = path_of(&folder, 0);
        image.make(&path)?;
        let devices = [
            format!("--disk={}", image.keys("disk0", &path)),
            "--net=private=10.213.8.1/24,id=net0".to_owned(),
        ];
        Self::launch(SCENARIO, image, None, folder, &devices)
    }

    fn launch(
        scenario: &str,
        image: Image,
        bins: Option<&Path>,
        folder: TempDir,
        devices: &[String],
    ) -> Result<Self> {
        let kernel = artifact(Artifact::TinyGuest)?;
        let mut flags = vec![
            format!("--kernel={}", kernel.display()),
            "--memory=64M".to_owned(),
            format!("--cmdline={scenario} blocks={BLOCKS}"),
            "--cpus=2".to_owned(),
        ];
        flags.extend_from_slice(devices);
        let mut command = Command::new(artifact(Artifact::Bulkhead)?);
        if let Some(bins) = bins {
            command.env("BULKHEAD_BIN_DIR", bins);
        }
        let mut run = Run::by(command, tempfile::tempdir()?, &flags)?;
        run.console
            .wait_line("phase=work", DEADLINE)
            .with_context(|| run.process.stderr().unwrap_or_default())?;
        Ok(Self {
            run,
            victim: Victim::new(ProcessRole::Disk),
            image,
            folder,
            began: Instant::now(),
            disks: devices.iter().filter(|flag| flag.starts_with("--disk=")).count(),
        })
    }

    /// Blocks that the image takes on the host.
    pub(crate) fn image_blocks(&self) -> Result<u64> {
        Ok(fs::metadata(self.path())?.blocks())
    }

    fn path(&self) -> PathBuf {
        path_of(&self.folder, 0)
    }

    /// Nobody else may write to the image.
    pub(crate) fn check_lock(&self) -> Result<()> {
        let path = self.path();
        let write = ["bench", "-w", "-c", "1", "-f", self.image.name(), text(&path)?];
        let output = qemu_img_output(Path::new("."), &write)?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.status.success() && words.contains("lock"),
            "nobody locks the image: {}: {words}",
            output.status
        );
        Ok(())
    }

    /// Looks at the image of a VM that was ended: as after a power failure, nothing is known of
    /// what it holds, but it is sound.
    pub(crate) fn check_image(&self) -> Result<()> {
        self.image.check(&self.path())
    }

    /// Looks at the image of a VM that was ended, which holds at least the first `count` blocks of
    /// the scenario `flushed`.
    pub(crate) fn check_blocks(&self, count: u64) -> Result<()> {
        let file = self.image.examine(&self.path())?;
        for (block, number) in blocks(&file, count).zip(0..) {
            ensure!(
                guest_contract::holds(&block?, SEED, number),
                "block {number} of {count} was lost"
            );
        }
        Ok(())
    }

    /// How a VM ended that should not have.
    pub(crate) fn last_words(&mut self) -> Result<String> {
        let status = self.run.wait(DEADLINE)?;
        let words = self.run.process.stderr()?;
        Ok(format!("{status}: {words}\n{}", self.run.console.text()))
    }

    /// Lets the guest finish and compares everything.
    pub(crate) fn calm(self) -> Result<Calm> {
        self.calm_then(|| Ok(()))
    }

    /// As [`Storm::calm`]; `release` lets go of the image between the two.
    pub(crate) fn calm_then(mut self, release: impl FnOnce() -> Result<()>) -> Result<Calm> {
        self.finish_then(release)
    }

    /// As [`Storm::calm`]; the image stays.
    pub(crate) fn finish(&mut self) -> Result<Calm> {
        self.finish_then(|| Ok(()))
    }

    fn finish_then(&mut self, release: impl FnOnce() -> Result<()>) -> Result<Calm> {
        let events = self.victim.events(&self.run).unwrap_or_default();
        self.run.press(b'.')?;
        let calm = self.run.console.wait_line("phase=calm", DEADLINE);
        if let Err(error) = calm {
            return Err(error.context(self.standstill()));
        }
        let time = self.began.elapsed();
        let status = self.run.wait(DEADLINE)?;
        let words = self.run.process.stderr()?;
        ensure!(status.success(), "{status}: {words}\n{}", self.run.console.text());
        self.run.console.expect_ok().with_context(|| words.clone())?;
        let sums: Vec<_> = self.run.console.values("checksum").collect();
        let writes: Vec<_> = self.run.console.values("writes").collect();
        ensure!(
            sums.len() == self.disks && !writes.contains(&"0"),
            "{}",
            self.run.console.text()
        );
        release()?;
        for (number, sum) in (0..).zip(sums) {
            let file = self.image.examine(&path_of(&self.folder, number))?;
            let mut found = 0_u64;
            for block in blocks(&file, BLOCKS) {
                let mut checksum = Checksum::default();
                checksum.update(&block?);
                found = found.wrapping_add(checksum.0);
            }
            ensure!(
                u64::from_str_radix(sum, 16)? == found,
                "the image of disk {number} differs"
            );
        }
        Ok(Calm {
            events,
            longest_gap: self.longest_gap(time)?,
        })
    }

    /// How it stands with a guest that does not calm down: what the VM's processes did and do, and whether it hears
    /// another byte.
    fn standstill(&mut self) -> String {
        let mut words = self.run.process.stderr().unwrap_or_default();
        let metrics = self
            .run
            .verb("metrics", &[])
            .and_then(|mut verb| Ok(verb.output()?));
        let metrics = metrics.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let own = |line: &&str| !line.starts_with('#');
        let lines: Vec<_> = metrics.iter().flat_map(|text| text.lines()).filter(own).collect();
        words += &lines.join("\n");
        let state = self.run.state(Duration::ZERO);
        for process in state.into_iter().flat_map(|state| state.processes) {
            words += &format!("\n{:?} {}:\n{}", process.role, process.name, threads(process.pid));
        }
        let heard = self.run.press(b'.');
        let heard = heard.and_then(|()| self.run.console.wait_line("phase=calm", Duration::from_secs(5)));
        words += &format!("a second byte is heard: {}\n", heard.is_ok());
        words
    }

    /// Of a storm that took `time`.
    fn longest_gap(&self, time: Duration) -> Result<Duration> {
        let console = &self.run.console;
        let cycles = console.number("storm_cycles")? as f64;
        let gaps = console.values("longest_gap").map(str::parse::<u64>);
        let longest = gaps.collect::<Result<Vec<_>, _>>()?.into_iter().max();
        Ok(time.mul_f64(longest.context("no gaps")? as f64 / cycles))
    }
}

/// Where the image of disk `number` is.
fn path_of(folder: &TempDir, number: u64) -> PathBuf {
    folder.path().join(match number {
        0 => "disk".to_owned(),
        other => format!("disk{other}"),
    })
}

/// A folder of our binaries in which the disk process is the one with faults.
pub(crate) fn faulty_binaries() -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    for each in [Artifact::Supervisor, Artifact::Vmm, Artifact::VhostUserNet] {
        symlink(artifact(each)?, folder.path().join(each.name()))?;
    }
    let name = Artifact::VhostUserBlk.name();
    symlink(artifact(Artifact::FaultyBlk)?, folder.path().join(name))?;
    Ok(folder)
}

/// Stalls of the guest in microseconds, and how many requests waited at each.
pub(crate) struct Stalls {
    stalls: Vec<u64>,
    outstanding: Vec<u32>,
}

/// Whether the limits of stalls are the product's. Else, beside other tests and on hosts of all kinds, they say no more
/// than that nothing waited for a deadline; so they do on emulated processors.
pub(crate) fn strict() -> bool {
    full() && std::env::var_os(NESTED).is_none()
}

impl Stalls {
    pub(crate) fn of<'e>(events: impl Iterator<Item = &'e VmEvent>) -> Self {
        let restarted = |event: &&VmEvent| event.event == EventKind::Restarted;
        let (mut stalls, mut outstanding): (Vec<_>, Vec<_>) = events
            .filter(restarted)
            .map(|event| (event.took_us, event.outstanding))
            .unzip();
        stalls.sort_unstable();
        outstanding.sort_unstable();
        Self { stalls, outstanding }
    }

    pub(crate) fn count(&self) -> usize {
        self.stalls.len()
    }

    /// Prints the distribution.
    pub(crate) fn judge(&self, name: &str) -> Result<()> {
        ensure!(!self.stalls.is_empty(), "{name}: nothing was restarted");
        let at = |percent| self.at(percent);
        let enough = self.outstanding.iter().filter(|count| **count >= 8).count();
        println!(
            "{name}: {} restarts; stall in us: median {}, 90 % {}, 99 % {}, longest {}; requests \
             under way: least {}, median {}; {enough} restarts with 8 or more",
            self.count(),
            at(50),
            at(90),
            at(99),
            at(100),
            self.outstanding[0],
            self.outstanding[self.outstanding.len() / 2],
        );
        Ok(())
    }

    /// The guest only blinks: half of the stalls, and 99 of 100, are no longer than they may be.
    pub(crate) fn within_limits(&self) -> Result<()> {
        let (median, most) = if strict() {
            (50_000, 250_000)
        } else {
            (500_000, 5_000_000)
        };
        ensure!(
            self.at(50) < median && self.at(99) < most,
            "the guest waited too long: median {} us, 99 % {} us",
            self.at(50),
            self.at(99)
        );
        Ok(())
    }

    /// What `percent` of the stalls, at least one, are no longer than.
    fn at(&self, percent: usize) -> u64 {
        let last = self.stalls.len().saturating_sub(1);
        self.stalls.get(last * percent / 100).copied().unwrap_or_default()
    }

    /// Restarts with at least 8 requests under way.
    pub(crate) fn busy(&self) -> usize {
        self.outstanding.iter().filter(|count| **count >= 8).count()
    }
}
