//! A front end that asks for no answers (no VHOST_USER_PROTOCOL_F_REPLY_ACK), and whose rings are as long as virtio
//! allows, as crosvm's are.

use crate::fixture::{Disk, Flaws, Kind, check_blocks, read_block, write_block};
use anyhow::{Context, Result, ensure};
use guest_contract::holds;
use integration_tests::{
    frontend_harness::{BlockDriver, DEADLINE, Memory, Options, STATUS_OK, Session, protocol, request},
    suite::test,
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use std::sync::Arc;

/// The longest ring (virtio 1.3, 2.7).
const LONGEST: u16 = 1 << 15;
/// Of three descriptors each, so that heads come to lie behind 1024.
const REQUESTS: u64 = 600;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("silent::the_longest_ring", longest_ring),
        test("silent::a_refused_ring_ends_the_session", refused_ring),
    ]
}

fn options() -> Options {
    Options {
        ring_size: LONGEST,
        protocol: protocol::MQ | protocol::CONFIG | protocol::INFLIGHT_SHMFD,
        ..Options::default()
    }
}

/// Writes the blocks from `first`, all of them in flight at once.
fn submit(driver: &mut BlockDriver, first: u64) -> Result<()> {
    for number in first..first + REQUESTS {
        driver.submit(0, &write_block(7, number))?;
    }
    driver.kick(0)
}

fn complete(driver: &mut BlockDriver) -> Result<()> {
    for _ in 0..REQUESTS {
        let status = driver.complete(0)?.status;
        ensure!(status == STATUS_OK, "status {status}");
    }
    Ok(())
}

/// Heads and indices pass 1024; then the process is killed at work, and another goes on from the in-flight region.
fn longest_ring() -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    let (mut process, mut driver) = disk.drive(&options())?;
    for round in 0..2 {
        submit(&mut driver, round * REQUESTS)?;
        complete(&mut driver)
            .with_context(|| format!("{round}: {}", process.stderr().unwrap_or_default()))?;
    }
    let last = 2 * REQUESTS - 1;
    ensure!(
        holds(&driver.done(0, &read_block(last))?, 7, last),
        "data differs"
    );
    submit(&mut driver, 2 * REQUESTS)?;
    process.signal(Signal::SIGKILL)?;
    process.wait(DEADLINE)?;
    let (mut next, socket) = disk.start()?;
    let mut driver = driver.resume(socket, &options())?;
    complete(&mut driver).with_context(|| next.stderr().unwrap_or_default())?;
    drop(driver);
    next.wait(DEADLINE)?;
    check_blocks(&disk.content_with(Flaws::None)?, 7, 3 * REQUESTS)
}

/// It would be taken for one that runs.
fn refused_ring() -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    let (mut process, socket) = disk.start()?;
    let memory = Arc::new(Memory::new(1 << 20)?);
    let mut session = Session::negotiate(socket, &options(), memory)?;
    let three = [0_u32, 3].map(u32::to_le_bytes).concat();
    session.connection.tell(request::SET_VRING_NUM, &three, &[])?;
    let status = process.wait(DEADLINE)?;
    let log = process.stderr()?;
    ensure!(
        status.code() == Some(1) && log.contains("ring size 0x3 is not allowed"),
        "{status}: {log}"
    );
    Ok(())
}
