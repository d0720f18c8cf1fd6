//! A back end is killed under load, and another goes on from the in-flight region: every request
//! completes, and completes once.

use crate::fixture::{
    BLOCK, Disk, Flaws, Kind, kick_and_wait, need_disk, read_block, with_fault, write_block,
};
use anyhow::{Context, Result, bail, ensure};
use guest_contract::holds;
use integration_tests::{
    frontend_harness::{BlockDriver, BlockRequest, DEADLINE, Options, STATUS_OK, Session, virtio},
    process::Process,
    suite::{Skip, test},
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

const DEPTH: usize = 64;
/// The same block always gets the same data, so that order does not matter.
const BLOCKS: u64 = 8192;
const ROUNDS: u32 = 8;

pub(crate) fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for kind in Kind::OURS {
        for (name, features) in [("plain", 0), ("event_idx", virtio::EVENT_IDX)] {
            let name = format!("recovery::{}::{name}", kind.name());
            tests.push(test(name, move || killed_under_load(kind, features)));
        }
    }
    for kind in [Kind::Raw, Kind::Qcow2] {
        let name = format!("recovery::{}::a_flush_under_way_is_taken_up", kind.name());
        tests.push(test(name, move || flush_is_taken_up(kind)));
    }
    tests.push(test("recovery::a_ring_that_fails", ring_fails));
    tests.push(test("recovery::a_ring_that_is_busy", ring_is_busy));
    tests
}

/// A process whose io_uring has this fault, and a driver.
fn with_faulty_ring(disk: &Disk, fault: &str) -> Result<(Process, BlockDriver)> {
    let mut command = disk.faulty(fault)?;
    command.args(["--io=uring", "--fd=3"]);
    let (process, socket) = Process::start_with_socket(command)?;
    let session = match Session::start(socket, &Options::default()) {
        Err(_) if process.stderr()?.contains("refuses an io_uring") => {
            bail!(Skip("the host has no io_uring".to_owned()))
        }
        session => session?,
    };
    Ok((process, BlockDriver::new(session)))
}

/// Nobody knows what becomes of requests in an io_uring that fails: the process ends, and the next one does them.
fn ring_fails() -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    let (mut process, mut driver) = with_faulty_ring(&disk, "ring")?;
    driver.submit(0, &read_block(0))?;
    driver.kick(0)?;
    let status = process.wait(DEADLINE)?;
    let log = process.stderr()?;
    ensure!(
        status.code() == Some(1) && log.contains("io_uring fails"),
        "{status}: {log}"
    );
    let (_next, socket) = disk.start()?;
    let mut driver = driver.resume(socket, &Options::default())?;
    let status = driver.complete(0)?.status;
    ensure!(status == STATUS_OK, "status {status}");
    Ok(())
}

/// A request that the kernel cannot take at once needs no further kick.
fn ring_is_busy() -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    let (_process, mut driver) = with_faulty_ring(&disk, "busy-ring")?;
    driver.done(0, &read_block(0)).map(drop)
}

/// A flush that the thread for flushes was at, and what was completed meanwhile.
fn flush_is_taken_up(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    need_disk(&disk)?;
    let (mut process, mut driver) = with_fault(&disk, "slow-flush")?;
    let flush = driver.submit(0, &BlockRequest::Flush)?;
    let write = driver.submit(0, &write_block(5, 0))?;
    kick_and_wait(&mut driver)?;
    let first = driver.complete(0)?;
    ensure!(first.tag == write && first.status == STATUS_OK, "{first:?}");
    process.signal(Signal::SIGKILL)?;
    process.wait(DEADLINE)?;
    let (_next, socket) = disk.start()?;
    let mut driver = driver.resume(socket, &Options::default())?;
    let second = driver.complete(0)?;
    ensure!(second.tag == flush && second.status == STATUS_OK, "{second:?}");
    ensure!(holds(&driver.done(0, &read_block(0))?, 5, 0), "data differs");
    let used = driver.session.rings[0].parts()[2];
    let published = driver.session.memory.observe(used + 2)?;
    ensure!(published == 3, "{published} completions of 3 requests");
    Ok(())
}

/// Mostly a block of the pattern; else something that changes the disk's second half, of which nothing is known.
fn load(number: u64) -> BlockRequest {
    let block = number % BLOCKS;
    let (sector, count) = ((BLOCKS + block / 16 * 16) * 8, 16 * 8);
    let zeroes = |unmap| BlockRequest::WriteZeroes { sector, count, unmap };
    match number % 16 {
        1 => BlockRequest::Discard { sector, count },
        5 => zeroes(true),
        9 => zeroes(false),
        13 => write_block(5, BLOCKS + block),
        _ => write_block(5, block),
    }
}

fn is_pattern(number: u64) -> bool {
    number % 4 != 1
}

/// Kills the back end `ROUNDS` times, each time a little later, with up to `DEPTH` requests in
/// each of two queues. The ring refuses a completion of what is not in flight, so that a request
/// completed twice is an error; one that is lost runs into the deadline.
fn killed_under_load(kind: Kind, features: u64) -> Result<()> {
    let disk = Disk::new(kind)?;
    let options = Options {
        queues: 2,
        // Room for DEPTH requests of three descriptors each.
        ring_size: 256,
        features: !(virtio::EVENT_IDX | virtio::INDIRECT_DESC) | features,
        ..Options::default()
    };
    let (mut process, mut driver) = disk.drive(&options)?;
    ensure!(
        driver.session.inflight.is_some(),
        "no in-flight region is offered"
    );
    let mut submitted = 0;
    let mut completed = BTreeSet::new();
    for round in 0..ROUNDS {
        let end = Instant::now() + Duration::from_millis(u64::from(round * 7));
        loop {
            for queue in 0..2 {
                while driver.in_flight(queue) < DEPTH {
                    driver.submit(queue, &load(submitted))?;
                    submitted += 1;
                }
                driver.kick(queue)?;
            }
            if Instant::now() >= end {
                break;
            }
            for queue in 0..2 {
                let completion = driver.complete(queue)?;
                ensure!(completion.status == STATUS_OK, "status {}", completion.status);
                ensure!(
                    completed.insert(completion.tag),
                    "request {} completed twice",
                    completion.tag
                );
            }
        }
        process.signal(Signal::SIGKILL)?;
        process.wait(DEADLINE)?;
        let (next, socket) = disk.start()?;
        process = next;
        driver = driver
            .resume(socket, &options)
            .with_context(|| format!("round {round}: {}", process.stderr().unwrap_or_default()))?;
        // The interrupts of what the dead one published may be lost: look once, unasked.
        for queue in 0..2 {
            while driver.in_flight(queue) > DEPTH / 2 {
                let completion = driver.complete(queue).with_context(|| format!("round {round}"))?;
                ensure!(completion.status == STATUS_OK, "status {}", completion.status);
                ensure!(
                    completed.insert(completion.tag),
                    "request {} completed twice",
                    completion.tag
                );
            }
        }
    }
    for queue in 0..2 {
        while driver.in_flight(queue) > 0 {
            let completion = driver.complete(queue)?;
            ensure!(
                completed.insert(completion.tag),
                "request {} completed twice",
                completion.tag
            );
        }
    }
    ensure!(
        completed.len() as u64 == submitted,
        "{} of {submitted} completed",
        completed.len()
    );
    drop(driver);
    process.wait(DEADLINE)?;
    let content = disk.content_with(Flaws::Leaks)?;
    for (number, data) in (0..submitted.min(BLOCKS)).zip(content.chunks(BLOCK)) {
        ensure!(
            !is_pattern(number) || holds(data, 5, number),
            "block {number} differs"
        );
    }
    Ok(())
}
