//! Random faults of disks and NICs of four VMs at a time, and of the processes that are not replaced, for a given time.

use crate::{
    durable,
    kills::Moments,
    storm::{Image, Stalls, Storm},
    upgrade::upgrade,
    victim::Victim,
};
use anyhow::{Context, Result, anyhow, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    suite::{artifact, full, test_within},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use std::{
    env,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};
use vm_spec::{
    events::{EventKind, VmEvent},
    run_state::ProcessRole,
};

/// Seconds; unset: half an hour for all tests, a moment for the quick ones.
const SECONDS: &str = "BULKHEAD_STRESS_SECONDS";
const VMS: u64 = 4;
const DISK: &str = "disk0";
/// Faults of a VM's devices before it is let finish, and all of its disk compared.
const FAULTS: u32 = 25;
/// What is not replaced.
const ENDS: [ProcessRole; 5] = [
    ProcessRole::Vmm,
    ProcessRole::Supervisor,
    ProcessRole::Spawner,
    ProcessRole::Forker,
    ProcessRole::Reaper,
];
/// A busy host takes its time.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn tests() -> Vec<Trial> {
    let given = env::var(SECONDS).ok().and_then(|text| text.parse().ok());
    let usual = if full() { 1800 } else { 12 };
    let time = Duration::from_secs(given.unwrap_or(usual));
    let limit = time + Duration::from_secs(300);
    vec![test_within(limit, "stress::faults_everywhere", move || {
        stress(time)
    })]
}

#[derive(Default)]
struct Tally {
    finished: u32,
    kills: u32,
    of_nics: u32,
    stops: u32,
    upgrades: u32,
    /// VMs ended by the death of a process that is not replaced: its name, and how long the rest took.
    ended: Vec<(ProcessRole, Duration)>,
    events: Vec<VmEvent>,
}

fn stress(time: Duration) -> Result<()> {
    Host::need_kvm()?;
    let end = Instant::now() + time;
    let tally = Mutex::new(Tally::default());
    thread::scope(|scope| {
        let vms: Vec<_> = (0..VMS)
            .map(|number| {
                let tally = &tally;
                scope.spawn(move || {
                    let mut moments = Moments::of(number);
                    while Instant::now() < end {
                        one(number, &mut moments, tally).with_context(|| format!("VM {number}"))?;
                    }
                    Ok(())
                })
            })
            .collect();
        vms.into_iter()
            .map(|vm| vm.join().map_err(|_| anyhow!("a thread panicked"))?)
            .collect::<Result<Vec<()>>>()
    })?;
    let tally = tally.into_inner().map_err(|_| anyhow!("a thread panicked"))?;
    println!(
        "{time:?}: {} VMs compared to the last block, {} kills, {} of NICs, {} stops, {} upgrades",
        tally.finished, tally.kills, tally.of_nics, tally.stops, tally.upgrades
    );
    ensure!(tally.finished > 0, "no disk was compared");
    for role in ENDS {
        let took = tally
            .ended
            .iter()
            .filter(|(of, _)| *of == role)
            .map(|(_, took)| *took);
        let (count, longest) = took.fold((0, Duration::ZERO), |(n, most), took| (n + 1, most.max(took)));
        println!("{count} VMs ended with their {role:?}; all was gone after at most {longest:?}");
    }
    let count = |kind| tally.events.iter().filter(|event| event.event == kind).count();
    ensure!(count(EventKind::NeedsReset) == 0, "a device was given up");
    println!(
        "events: {} died, {} hung, {} restarted, {} upgraded",
        count(EventKind::Died),
        count(EventKind::Hung),
        count(EventKind::Restarted),
        count(EventKind::Upgraded)
    );
    let of_disks = tally.events.iter().filter(|event| event.device == DISK);
    let stalls = Stalls::of(of_disks);
    stalls.judge("stress")?;
    stalls.within_limits()
}

/// One VM, from its start to its end; those of number 0 are always let finish.
fn one(number: u64, moments: &mut Moments, tally: &Mutex<Tally>) -> Result<()> {
    let image = [Image::Raw, Image::Qcow2][moments.below(2) as usize];
    let has_nic = Host::need_tun().is_ok();
    let mut storm = match has_nic {
        true => Storm::beside_a_nic(image)?,
        false => Storm::start(image, DISK, None)?,
    };
    let mut disk = Victim::named(ProcessRole::Disk, DISK);
    let mut nic = Victim::named(ProcessRole::Net, "net0");
    let mut upgrades = 0;
    for _ in 0..FAULTS {
        moments.wait();
        let mut now = tally_of(tally)?;
        match moments.below(100) {
            0..5 => {
                now.stops += 1;
                drop(now);
                strike(&mut storm.run, &mut disk, Signal::SIGSTOP)?;
            }
            5..25 => {
                now.upgrades += 1;
                drop(now);
                upgrades += 1;
                let builds = [Artifact::VhostUserBlk, Artifact::FaultyBlk];
                let output = upgrade(&storm, &[DISK], artifact(builds[upgrades % 2])?)?;
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                ensure!(output.status.success(), "{said}");
            }
            25..40 if has_nic => {
                now.of_nics += 1;
                drop(now);
                strike(&mut storm.run, &mut nic, Signal::SIGKILL)?;
            }
            98.. if number > 0 => {
                drop(now);
                return end(storm, moments, tally);
            }
            _ => {
                now.kills += 1;
                drop(now);
                strike(&mut storm.run, &mut disk, Signal::SIGKILL)?;
            }
        }
    }
    let calm = storm.calm()?;
    let upgraded = calm
        .events
        .iter()
        .filter(|event| event.event == EventKind::Upgraded);
    let told = upgraded.count();
    ensure!(told == upgrades, "{upgrades} upgrades, {told} events of them");
    let mut now = tally_of(tally)?;
    now.finished += 1;
    now.events.extend(calm.events);
    Ok(())
}

fn tally_of(tally: &Mutex<Tally>) -> Result<std::sync::MutexGuard<'_, Tally>> {
    tally.lock().map_err(|_| anyhow!("a thread panicked"))
}

fn strike(run: &mut Run, victim: &mut Victim, signal: Signal) -> Result<()> {
    victim.forget();
    let lives = victim.strike(run, signal, PATIENCE)? && victim.wait_restarted(run, PATIENCE)?;
    ensure!(lives, "the VM ended: {}", run.process.stderr()?);
    Ok(())
}

/// Kills a process that is not replaced: the VM ends, nothing of it is left, its image is sound.
fn end(mut storm: Storm, moments: &mut Moments, tally: &Mutex<Tally>) -> Result<()> {
    let role = ENDS[moments.below(ENDS.len() as u64) as usize];
    let state = storm.run.state(PATIENCE)?;
    // What happened until now.
    let events = storm.victim.events(&storm.run).unwrap_or_default();
    durable::strike(&state, role)?;
    let took = durable::wait_gone(&mut storm.run, &state, PATIENCE)?;
    storm.check_image()?;
    let mut now = tally_of(tally)?;
    now.ended.push((role, took));
    now.events.extend(events);
    Ok(())
}
