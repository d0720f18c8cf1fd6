//! What the driver was told is durable was made so, and nothing else: the calls of the process, as strace sees them.

use crate::fixture::{Disk, Kind, traced, write_block};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    frontend_harness::{BlockDriver, BlockRequest, DEADLINE, Options, Session},
    process::Process,
    suite::test,
};
use libtest_mimic::Trial;
use std::{fs, path::PathBuf};

/// VIRTIO_BLK_F_FLUSH.
const FLUSH: u64 = 1 << 9;
const BLOCKS: u64 = 64;

pub(crate) fn tests() -> Vec<Trial> {
    let of_kind = |kind: Kind| {
        let name = |what| format!("durable::{}::{what}", kind.name());
        [
            test(name("when_the_driver_flushes"), move || when_flushed(kind)),
            test(name("without_flushes"), move || without_flushes(kind)),
        ]
    };
    Kind::OURS.into_iter().flat_map(of_kind).collect()
}

/// A process under strace, and what that has written.
struct Observed {
    process: Process,
    calls: PathBuf,
}

impl Observed {
    fn start(disk: &Disk, options: &Options) -> Result<(Self, BlockDriver)> {
        let calls = disk.folder.path().join("calls");
        let mut command = traced(&disk.command()?, "fsync,fdatasync,pwritev2", &calls)?;
        command.arg("--fd=3");
        let (process, socket) = Process::start_with_socket(command)?;
        let session = Session::start(socket, options)
            .with_context(|| format!("stderr: {}", process.stderr().unwrap_or_default()))?;
        Ok((Self { process, calls }, BlockDriver::new(session)))
    }

    /// How many calls have made all that was written durable.
    fn syncs(&self) -> Result<usize> {
        let calls = fs::read_to_string(&self.calls)?;
        let ended = |line: &&str| line.contains("sync") && line.ends_with("= 0");
        Ok(calls.lines().filter(ended).count())
    }

    /// How many have made durable what they wrote.
    fn durable_writes(&self) -> Result<usize> {
        let calls = fs::read_to_string(&self.calls)?;
        Ok(calls.lines().filter(|line| line.contains("RWF_DSYNC")).count())
    }

    /// That the process ends once its front end has left.
    fn ends(&mut self, driver: BlockDriver) -> Result<()> {
        drop(driver);
        let status = self.process.wait(DEADLINE)?;
        ensure!(status.success(), "{status}: {}", self.process.stderr()?);
        Ok(())
    }
}

fn when_flushed(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    let (mut observed, mut driver) = Observed::start(&disk, &Options::default())?;
    driver.done(0, &write_block(3, 0))?;
    if matches!(kind, Kind::Qcow2 | Kind::Qcow2Direct) {
        ensure!(
            observed.durable_writes()? > 0,
            "data lies in clusters that may be lost"
        );
    }
    for block in 1..BLOCKS {
        driver.done(0, &write_block(3, block))?;
    }
    driver.done(0, &BlockRequest::Flush)?;
    let before = observed.syncs()?;
    ensure!(before > 0, "the first flush did nothing");
    for block in 0..BLOCKS {
        driver.done(0, &write_block(4, block))?;
    }
    let rewritten = observed.syncs()?;
    ensure!(
        rewritten == before,
        "{} writes waited for the disk",
        rewritten - before
    );
    driver.done(0, &BlockRequest::Flush)?;
    let flushed = observed.syncs()?;
    ensure!(flushed > rewritten, "a flush did nothing");
    driver.done(0, &write_block(5, 0))?;
    observed.ends(driver)?;
    ensure!(observed.syncs()? > flushed, "the end of the session lost a write");
    Ok(())
}

/// A driver without FLUSH takes what is completed for durable (virtio 1.3, 5.2.6.2).
fn without_flushes(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    let defaults = Options::default();
    let options = Options {
        features: defaults.features & !FLUSH,
        ..defaults
    };
    let (mut observed, mut driver) = Observed::start(&disk, &options)?;
    let mut synced = observed.syncs()?;
    // Each block is written anew once it is there.
    let writes = (0..8).chain(0..8).map(|block| write_block(3, block));
    let zeroes = BlockRequest::WriteZeroes {
        sector: 0,
        count: 8,
        unmap: false,
    };
    for (number, request) in writes.chain([zeroes]).enumerate() {
        driver.done(0, &request)?;
        let now = observed.syncs()?;
        ensure!(now > synced, "request {number} was completed, and is not durable");
        synced = now;
    }
    observed.ends(driver)
}
