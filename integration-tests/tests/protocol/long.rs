//! A request that takes long is no hang.

use crate::blk::segment;
use crate::fixture::{Disk, Flaws, Kind, check};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    frontend_harness::{BlockRequest, DEADLINE, Options, STATUS_OK, request},
    qemu_img::qemu_img,
    suite::{full, test_within},
};
use libtest_mimic::Trial;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{os::fd::AsFd, time::Duration};

/// Sectors of the disk: 2^20 clusters.
const SECTORS: u32 = 8 << 20;
/// As many segments as a request may have.
const SEGMENTS: usize = 32;
/// Between two looks for a thread that spins.
const LOOK_MS: u16 = 1000;
const LIMIT: Duration = Duration::from_secs(300);

pub(crate) fn tests() -> Vec<Trial> {
    if !full() {
        return Vec::new();
    }
    vec![test_within(LIMIT, "long::discard (full)", discard)]
}

/// A driver that was told the limits of an older build looks at 33 million clusters in one request, while the front
/// end asks for signs of life.
fn discard() -> Result<()> {
    let disk = Disk::new(Kind::Qcow2)?;
    let name = disk.path.to_str().context("temporary folder is not UTF-8")?;
    let options = "preallocation=metadata,cluster_size=4k";
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "4G"])?;
    let (mut process, mut driver) = disk.drive(&Options::default())?;
    let data = segment(0, SECTORS, 0).repeat(SEGMENTS);
    driver.submit(
        0,
        &BlockRequest::Other {
            kind: 11,
            sector: 0,
            data,
        },
    )?;
    driver.kick(0)?;
    loop {
        let call = &driver.session.rings[0].call;
        let mut told = [PollFd::new(call.as_fd(), PollFlags::POLLIN)];
        if poll(&mut told, PollTimeout::from(LOOK_MS))? > 0 {
            break;
        }
        let alive = driver.session.connection.ask(request::GET_FEATURES, &[], &[]);
        alive.with_context(|| process.stderr().unwrap_or_default())?;
    }
    let status = driver.complete(0)?.status;
    ensure!(status == STATUS_OK, "status {status}");
    drop(driver);
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    check(name, Flaws::None)
}
