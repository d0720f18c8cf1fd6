//! Kills at random moments under load: nothing is lost, doubled or reordered.

use crate::{
    storm::{Image, Stalls, Storm},
    victim::Victim,
};
use anyhow::{Context, Result, ensure};
use integration_tests::{host::Host, suite::test_within, tiny::Run, verify::FULL};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use std::{env, fs::File, thread, time::Duration};
use vm_spec::{events::EventKind, run_state::ProcessRole};

const DEADLINE: Duration = Duration::from_secs(30);
/// A successor is there within this time.
const SUCCESSOR: Duration = Duration::from_secs(10);
/// How often two disks are to die at once, and in how many VMs at most.
const DOUBLE_KILLS: usize = 3;
const MOST_VMS: usize = 10;
/// The seed of the moments; printed, so that a run can be repeated as far as time can.
const SEED: &str = "BULKHEAD_SEED";

pub(crate) fn tests() -> Vec<Trial> {
    let full = env::var_os(FULL).is_some();
    let (kills, limit) = if full { (500, 3600) } else { (50, 170) };
    let limit = Duration::from_secs(limit);
    let mut tests: Vec<_> = [(Image::Raw, kills / 2), (Image::Qcow2, kills)]
        .into_iter()
        .map(|(image, kills)| {
            test_within(
                limit,
                format!("kills::disk_under_load_{}", image.name()),
                move || under_load(image, kills),
            )
        })
        .collect();
    tests.push(test_within(limit, "kills::disk_stopped_under_load", stopped));
    tests.push(test_within(limit, "kills::disk_while_the_guest_reboots", reboots));
    tests.push(test_within(limit, "kills::disk_before_the_guest_runs", early));
    tests.push(test_within(limit, "kills::disk_as_the_guest_powers_off", late));
    tests.push(test_within(limit, "kills::two_disks_at_once", two));
    tests
}

/// Moments (a SplitMix64 sequence).
pub(crate) struct Moments(u64);

impl Moments {
    fn new() -> Self {
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
        events.extend(storm.calm()?.events);
        if Stalls::of(events.iter()).busy() >= kills {
            break;
        }
    }
    let stalls = Stalls::of(events.iter());
    println!("{struck} kills in {rounds} VMs, {allocating} of them while the image's blocks changed");
    stalls.judge(image.name())?;
    ensure!(
        image == Image::Raw || allocating * 2 >= stalls.count(),
        "{allocating} of {} kills with allocating writes",
        stalls.count()
    );
    Ok(())
}

/// A disk process that is stopped is found, killed and replaced; its work goes on.
fn stopped() -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk");
    File::create(&path)?.set_len(256 << 20)?;
    let disk = format!("--disk=path={},format=raw", path.display());
    let mut run = Run::tiny("scenario=blk requests=100000 size=4096 depth=64", &[disk])?;
    let mut victim = Victim::new(ProcessRole::Disk);
    ensure!(victim.strike(&mut run, Signal::SIGSTOP, SUCCESSOR)?, "no process");
    let hung = victim.wait_event(&run, EventKind::Hung, DEADLINE)?;
    let restarted = victim.wait_event(&run, EventKind::Restarted, DEADLINE)?;
    ensure!(hung.pid != restarted.pid, "{hung:?} {restarted:?}");
    let events = victim.events(&run)?;
    ensure!(
        events.iter().all(|event| event.event != EventKind::Died),
        "a hung process is not one that died: {events:?}"
    );
    run.wait(DEADLINE)?;
    run.console
        .expect_ok()
        .with_context(|| run.process.stderr().unwrap_or_default())
}

/// Kills during boots, negotiations and resets: a guest that reboots does little else.
fn reboots() -> Result<()> {
    Host::need_kvm()?;
    let mut moments = Moments::new();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk");
    File::create(&path)?.set_len(256 << 20)?;
    let disk = format!("--disk=path={},format=raw", path.display());
    let mut run = Run::tiny("scenario=reboot reboots=100", &[disk])?;
    let mut victim = Victim::new(ProcessRole::Disk);
    let mut struck = 0;
    while victim.strike(&mut run, Signal::SIGKILL, SUCCESSOR)? {
        struck += 1;
        if victim.wait_restarted(&mut run, SUCCESSOR)? {
            moments.wait();
        }
    }
    run.wait(DEADLINE)?;
    run.console
        .expect_ok()
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    let boots = run.console.text().matches("boots=").count();
    ensure!(boots == 101, "{boots} boots with {struck} kills");
    println!("{struck} kills in {boots} boots");
    ensure!(struck > 0, "the guest was done before the first kill");
    Ok(())
}

/// Kills from the first moment at which the process is known: as it starts, as the vmm negotiates
/// with it, as the machine is built.
fn early() -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk");
    File::create(&path)?.set_len(16 << 20)?;
    let disk = format!("--disk=path={},format=raw", path.display());
    let mut before = 0;
    for delay in 0..30 {
        let mut run = Run::tiny("scenario=blk requests=200 size=4096", std::slice::from_ref(&disk))?;
        let mut victim = Victim::new(ProcessRole::Disk);
        victim.strike_early(&mut run, Duration::from_micros(100 * delay))?;
        before += usize::from(!victim.guest_runs(&run));
        let status = run.wait(DEADLINE)?;
        let words = run.process.stderr()?;
        ensure!(status.success(), "{delay}: {status}: {words}");
        run.console.expect_ok().with_context(|| words)?;
    }
    println!("{before} of 30 kills before the guest ran");
    ensure!(before >= 5, "only {before} kills before the guest ran");
    Ok(())
}

/// Kills around the end of a guest that is asked for nothing more: the VM ends as it should.
fn late() -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk");
    File::create(&path)?.set_len(16 << 20)?;
    let disk = format!("--disk=path={},format=raw", path.display());
    let mut struck = 0;
    for delay in 0..30 {
        let mut run = Run::tiny("scenario=blk requests=200 size=4096", std::slice::from_ref(&disk))?;
        run.console.wait_line("requests=200", DEADLINE)?;
        thread::sleep(Duration::from_micros(200 * delay));
        let mut victim = Victim::new(ProcessRole::Disk);
        struck += usize::from(victim.strike(&mut run, Signal::SIGKILL, SUCCESSOR)?);
        let status = run.wait(DEADLINE)?;
        let words = run.process.stderr()?;
        ensure!(status.success(), "{delay}: {status}: {words}");
        run.console.expect_ok().with_context(|| words)?;
    }
    println!("{struck} of 30 kills hit");
    ensure!(struck >= 5, "only {struck} kills hit");
    Ok(())
}

/// Both disks of a VM die in the same moment, again and again, in as many VMs as it takes: on a fast
/// machine a guest is done soon.
fn two() -> Result<()> {
    Host::need_kvm()?;
    let mut struck = 0;
    for _ in 0..MOST_VMS {
        struck += strike_two()?;
        if struck >= DOUBLE_KILLS {
            break;
        }
    }
    println!("{struck} double kills");
    ensure!(
        struck >= DOUBLE_KILLS,
        "the guests were done after {struck} double kills"
    );
    Ok(())
}

/// How often both disks died at once before the guest was done.
fn strike_two() -> Result<usize> {
    let folder = tempfile::tempdir()?;
    let disk = |name: &str| -> Result<String> {
        let path = folder.path().join(name);
        File::create(&path)?.set_len(256 << 20)?;
        Ok(format!("--disk=path={},format=raw", path.display()))
    };
    let flags = [disk("one")?, disk("two")?];
    let mut run = Run::tiny("scenario=blk requests=60000 size=4096 depth=64 disk=1", &flags)?;
    let mut moments = Moments::new();
    let mut victims = [Victim::named("disk0"), Victim::named("disk1")];
    let mut struck = 0;
    'work: loop {
        moments.wait();
        for victim in &mut victims {
            if !victim.strike(&mut run, Signal::SIGKILL, SUCCESSOR)? {
                break 'work;
            }
        }
        struck += 1;
        for victim in &mut victims {
            if !victim.wait_restarted(&mut run, SUCCESSOR)? {
                break 'work;
            }
        }
    }
    run.wait(DEADLINE)?;
    run.console
        .expect_ok()
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    Ok(struck)
}
