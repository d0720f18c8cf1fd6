//! Kills at random moments under load: nothing is lost, doubled or reordered.

use crate::{
    storm::{Calm, Image, Stalls, Storm, strict},
    victim::Victim,
};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    host::Host,
    process::Listed,
    suite::{full, test_within},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use std::{
    env,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use vm_spec::{events::EventKind, run_state::ProcessRole};

const DEADLINE: Duration = Duration::from_secs(30);
/// A successor is there within this time.
pub(crate) const SUCCESSOR: Duration = Duration::from_secs(10);
/// The seed of the moments; printed, so that a run can be repeated as far as time can.
const SEED: &str = "BULKHEAD_SEED";

pub(crate) fn tests() -> Vec<Trial> {
    let (kills, limit) = if full() { (500, 3600) } else { (50, 170) };
    let limit = Duration::from_secs(limit);
    type Test = fn(Image) -> Result<()>;
    let each: [(&str, Test); 5] = [
        ("disk_stopped_under_load", stopped),
        ("disk_while_the_guest_reboots", reboots),
        ("disk_before_the_guest_runs", early),
        ("disk_as_the_guest_powers_off", late),
        ("two_disks_at_once", two),
    ];
    let mut tests = Vec::new();
    for (image, kills) in [(Image::Raw, kills / 2), (Image::Qcow2, kills)] {
        let name = |test: &str| format!("kills::{test}_{}", image.name());
        tests.push(test_within(limit, name("disk_under_load"), move || {
            under_load(image, kills)
        }));
        tests.extend(each.map(|(test, body)| test_within(limit, name(test), move || body(image))));
        if image == Image::Raw || full() {
            let name = name("disk_while_the_spawner_is_stopped");
            tests.push(test_within(limit, name, move || spawner_stopped(image)));
        }
    }
    tests
}

/// Moments (a SplitMix64 sequence).
pub(crate) struct Moments(u64);

impl Moments {
    pub(crate) fn new() -> Self {
        let given = env::var(SEED).ok().and_then(|text| text.parse().ok());
        let seed = given.unwrap_or_else(|| u64::from(std::process::id()));
        println!("{SEED}={seed}");
        Self(seed)
    }

    /// A sequence of its own for each `number`.
    pub(crate) fn of(number: u64) -> Self {
        let Self(seed) = Self::new();
        Self(seed.wrapping_add(number << 32))
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        guest_contract::pattern_word(self.0, 0, 0) % limit
    }

    /// From 10 to 190 ms.
    pub(crate) fn wait(&mut self) {
        let micros = self.below(180_000);
        thread::sleep(Duration::from_micros(10_000 + micros));
    }
}

/// How many VMs a number of kills is spread over.
const ROUNDS: usize = 5;

/// Kills at random moments, each with at least 8 requests under way (where the guest had not
/// refilled its queues yet, the kill does not count).
fn under_load(image: Image, kills: usize) -> Result<()> {
    Host::need_kvm()?;
    let mut moments = Moments::new();
    let (mut events, mut allocating, mut struck) = (Vec::new(), 0, 0);
    let mut rounds = 0;
    loop {
        rounds += 1;
        ensure!(rounds <= 4 * ROUNDS, "{struck} kills in {rounds} VMs are too few");
        let mut storm = Storm::start(image, "disk0", None)?;
        for _ in 0..kills.div_ceil(ROUNDS) {
            moments.wait();
            let before = storm.image_blocks()?;
            let hit = storm.victim.strike(&mut storm.run, Signal::SIGKILL, SUCCESSOR)?;
            ensure!(hit, "the VM ended: {}", storm.last_words()?);
            struck += 1;
            // Every fifth successor is killed as soon as it is there, most often as it negotiates.
            if struck % 5 == 0 {
                storm.victim.strike(&mut storm.run, Signal::SIGKILL, SUCCESSOR)?;
                struck += 1;
            }
            storm.victim.wait_restarted(&mut storm.run, SUCCESSOR)?;
            // The image grows, or lost clusters come back: both sides of the kill allocate.
            allocating += usize::from(storm.image_blocks()? != before);
        }
        let calm = storm.calm()?;
        no_longer_gap(&calm)?;
        events.extend(calm.events);
        if Stalls::of(events.iter()).busy() >= kills {
            break;
        }
    }
    let stalls = Stalls::of(events.iter());
    println!("{struck} kills in {rounds} VMs, {allocating} of them while the image's blocks changed");
    stalls.judge(image.name())?;
    stalls.within_limits()?;
    ensure!(
        image == Image::Raw || allocating * 2 >= stalls.count(),
        "{allocating} of {} kills with allocating writes",
        stalls.count()
    );
    Ok(())
}

/// The guest stands still no longer than the supervisor says: what was under way goes on as soon as a process serves
/// again. Two that die in turn may make one gap.
fn no_longer_gap(calm: &Calm) -> Result<()> {
    let took = calm.events.iter().map(|event| event.took_us).max();
    let took = Duration::from_micros(took.unwrap_or(0));
    // A kick that was lost is given again after a second or two.
    let margin = Duration::from_millis(if strict() { 500 } else { 900 });
    println!(
        "the longest gap {:.1?}, the longest restart {took:.1?}",
        calm.longest_gap
    );
    ensure!(
        calm.longest_gap < 2 * took + margin,
        "a queue stood still for {:?}, and the longest restart took {took:?}",
        calm.longest_gap
    );
    Ok(())
}

/// A disk process that is stopped is found, killed and replaced; its work goes on.
fn stopped(image: Image) -> Result<()> {
    Host::need_kvm()?;
    let mut storm = Storm::start(image, "disk0", None)?;
    for _ in 0..if full() { 20 } else { 1 } {
        storm.victim.forget();
        let hit = storm.victim.strike(&mut storm.run, Signal::SIGSTOP, SUCCESSOR)?;
        ensure!(
            hit && storm.victim.wait_restarted(&mut storm.run, DEADLINE)?,
            "the VM ended: {}",
            storm.last_words()?
        );
    }
    let events = storm.calm()?.events;
    let hung = events.iter().find(|event| event.event == EventKind::Hung);
    let restarted = events.iter().find(|event| event.event == EventKind::Restarted);
    ensure!(
        hung.is_some() && hung.map(|event| event.pid) != restarted.map(|event| event.pid),
        "{events:?}"
    );
    ensure!(
        events.iter().all(|event| event.event != EventKind::Died),
        "a hung process is not one that died: {events:?}"
    );
    Ok(())
}

/// Longer than a process that was killed has to end.
const SPAWNER_STOPS: Duration = Duration::from_secs(12);

/// As Ctrl-Z stops it: what it is asked meanwhile it does when it goes on. Until then the disk has no process, but is
/// the VM's, and nobody else's.
fn spawner_stopped(image: Image) -> Result<()> {
    Host::need_kvm()?;
    let mut storm = Storm::start(image, "disk0", None)?;
    let disk = storm.run.pid_of(ProcessRole::Disk, DEADLINE)?.as_raw();
    storm.run.process.signal(Signal::SIGSTOP)?;
    let hit = storm.victim.strike(&mut storm.run, Signal::SIGKILL, SUCCESSOR)?;
    let end = Instant::now() + SUCCESSOR;
    while Listed::find(disk).is_some() {
        ensure!(Instant::now() < end, "the disk's process lives");
        thread::sleep(Duration::from_millis(1));
    }
    storm.check_lock()?;
    if full() {
        thread::sleep(SPAWNER_STOPS);
    }
    storm.run.process.signal(Signal::SIGCONT)?;
    ensure!(
        hit && storm.victim.wait_restarted(&mut storm.run, DEADLINE)?,
        "the VM ended: {}",
        storm.last_words()?
    );
    let events = storm.calm()?.events;
    ensure!(
        events.iter().all(|event| event.event != EventKind::NeedsReset),
        "the device was given up: {events:?}"
    );
    Ok(())
}

/// A disk that holds nothing, and the flag for it.
struct Empty {
    image: Image,
    path: PathBuf,
    flag: String,
    _folder: TempDir,
}

impl Empty {
    fn new(image: Image) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("disk");
        image.make(&path)?;
        Ok(Self {
            image,
            flag: format!("--disk=path={},format={}", path.display(), image.name()),
            path,
            _folder: folder,
        })
    }

    fn run(&self, cmdline: &str) -> Result<Run> {
        Run::tiny(cmdline, std::slice::from_ref(&self.flag))
    }

    /// The guest has ended as it should, and its disk is sound.
    fn ends(&self, run: &mut Run) -> Result<()> {
        let status = run.wait(DEADLINE)?;
        let words = run.process.stderr()?;
        ensure!(status.success(), "{status}: {words}");
        run.console.expect_ok().with_context(|| words)?;
        self.image.check(&self.path)
    }
}

/// Kills during boots, negotiations and resets: a guest that reboots does little else.
fn reboots(image: Image) -> Result<()> {
    Host::need_kvm()?;
    let mut moments = Moments::new();
    let disk = Empty::new(image)?;
    let reboots = if full() { 200 } else { 50 };
    let mut run = disk.run(&format!("scenario=reboot reboots={reboots}"))?;
    let mut victim = Victim::new(ProcessRole::Disk);
    let mut struck = 0;
    while victim.strike(&mut run, Signal::SIGKILL, SUCCESSOR)? {
        struck += 1;
        if victim.wait_restarted(&mut run, SUCCESSOR)? {
            moments.wait();
        }
    }
    disk.ends(&mut run)?;
    let boots = run.console.values("boots").count();
    ensure!(boots == reboots + 1, "{boots} boots with {struck} kills");
    println!("{struck} kills in {boots} boots");
    ensure!(struck > 0, "the guest was done before the first kill");
    Ok(())
}

/// Delays of the kills around a guest's start and end: half of them for a quick run.
fn delays() -> Vec<u32> {
    (0..30).step_by(if full() { 1 } else { 2 }).collect()
}

/// Kills from the first moment at which the process is known: as it starts, as the vmm negotiates
/// with it, as the machine is built.
fn early(image: Image) -> Result<()> {
    Host::need_kvm()?;
    let disk = Empty::new(image)?;
    let delays = delays();
    let mut before = 0;
    for delay in &delays {
        let mut run = disk.run("scenario=blk requests=200 size=4096")?;
        let mut victim = Victim::new(ProcessRole::Disk);
        victim.strike_early(&mut run, Duration::from_micros(100) * *delay)?;
        before += usize::from(!victim.guest_runs(&run));
        disk.ends(&mut run).with_context(|| format!("delay {delay}"))?;
    }
    println!("{before} of {} kills before the guest ran", delays.len());
    ensure!(
        before * 6 >= delays.len(),
        "only {before} kills before the guest ran"
    );
    Ok(())
}

/// Kills around the end of a guest that is asked for nothing more: the VM ends as it should.
fn late(image: Image) -> Result<()> {
    Host::need_kvm()?;
    let disk = Empty::new(image)?;
    let delays = delays();
    let mut struck = 0;
    for delay in &delays {
        let mut run = disk.run("scenario=blk requests=200 size=4096")?;
        run.console.wait_line("requests=200", DEADLINE)?;
        thread::sleep(Duration::from_micros(200) * *delay);
        let mut victim = Victim::new(ProcessRole::Disk);
        struck += usize::from(victim.strike(&mut run, Signal::SIGKILL, SUCCESSOR)?);
        disk.ends(&mut run).with_context(|| format!("delay {delay}"))?;
    }
    println!("{struck} of {} kills hit", delays.len());
    ensure!(struck * 6 >= delays.len(), "only {struck} kills hit");
    Ok(())
}

/// Both disks of a VM die in the same moment, again and again, with a storm on each.
fn two(image: Image) -> Result<()> {
    Host::need_kvm()?;
    let mut moments = Moments::new();
    let mut storm = Storm::two(image)?;
    let mut victims = ["disk0", "disk1"].map(|name| Victim::named(ProcessRole::Disk, name));
    for _ in 0..if full() { 100 } else { 5 } {
        moments.wait();
        for victim in &mut victims {
            let hit = victim.strike(&mut storm.run, Signal::SIGKILL, SUCCESSOR)?;
            ensure!(hit, "the VM ended: {}", storm.last_words()?);
        }
        for victim in &mut victims {
            let lives = victim.wait_restarted(&mut storm.run, SUCCESSOR)?;
            ensure!(lives, "the VM ended: {}", storm.last_words()?);
        }
    }
    let stalls = Stalls::of(storm.calm()?.events.iter());
    stalls.judge(&format!("two disks, {}", image.name()))?;
    ensure!(
        stalls.busy() * 4 >= stalls.count(),
        "the guest was idle at most kills"
    );
    stalls.within_limits()
}
