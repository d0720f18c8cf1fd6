//! Damaged images that a guest's requests run into: the guest gets an error, the image is marked and not
//! written to any more, and the process and the rest of the disk live on.

use crate::{
    fixture::{DISK, Disk, Kind, read_block, write_block},
    image_refused::refused,
};
use anyhow::{Context, Result, ensure};
use guest_contract::holds;
use integration_tests::{
    frontend_harness::{BlockDriver, BlockRequest, DEADLINE, Options, STATUS_IOERR, Session, request},
    process::Process,
    qemu_img::qemu_img,
    suite::test,
};
use libtest_mimic::Trial;
use std::{fs, path::Path};

const COPIED: u64 = 1 << 63;
/// Bytes of a cluster, and of a block of the pattern.
const CLUSTER: u64 = 4096;
/// A block that another L2 table maps than block 0.
const REST: u64 = 600;
/// A block that no L2 table maps.
const UNMAPPED: u64 = 1100;

pub(crate) fn tests() -> Vec<Trial> {
    let mut tests = vec![test("image_damaged::readers_change_nothing", readers)];
    for kind in [Kind::Qcow2, Kind::Qcow2Direct] {
        for damage in &DAMAGES {
            let name = format!("image_damaged::{}::{}", kind.name(), damage.name);
            tests.push(test(name, move || found(kind, damage)));
        }
    }
    tests
}

/// An image file in memory.
pub(crate) struct Bytes(Vec<u8>);

impl Bytes {
    fn word(&self, at: u64) -> u64 {
        let bytes = self.0.get(at as usize..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u64::from_be_bytes(*bytes))
    }

    fn set(&mut self, at: u64, word: u64) {
        self.put(at, &word.to_be_bytes());
    }

    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.0[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn l1(&self) -> u64 {
        self.word(40)
    }

    fn l2(&self) -> u64 {
        self.word(self.l1()) & !COPIED
    }

    fn refcount_table(&self) -> u64 {
        self.word(48)
    }

    fn refcount_block(&self) -> u64 {
        self.word(self.refcount_table())
    }

    fn set_refcount(&mut self, place: u64, count: u16) {
        let at = self.refcount_block() + place / CLUSTER * 2;
        self.put(at, &count.to_be_bytes());
    }
}

pub(crate) fn edit(path: &Path, change: impl FnOnce(&mut Bytes)) -> Result<()> {
    let mut bytes = Bytes(fs::read(path)?);
    change(&mut bytes);
    Ok(fs::write(path, bytes.0)?)
}

/// What is wrong with an image, what finds it, and what is said then.
struct Damage {
    name: &'static str,
    change: fn(&mut Bytes),
    by: Use,
    field: &'static str,
    reason: &'static str,
}

/// What a guest does with block 0.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Read,
    Write,
    /// Of [`UNMAPPED`].
    Allocate,
    WriteAndFlush,
}

/// One for each use; `vhost-blk/tests/` has all of them.
const DAMAGES: [Damage; 4] = [
    Damage {
        name: "reserved_bits_in_l1",
        change: |bytes| bytes.set(bytes.l1(), bytes.word(bytes.l1()) | 1),
        by: Use::Read,
        field: "L1 entry",
        reason: "reserved bits",
    },
    Damage {
        name: "allocation_over_metadata",
        change: |bytes| bytes.set_refcount(bytes.refcount_table(), 0),
        by: Use::Allocate,
        field: "refcount block",
        reason: "is 0, but it holds the refcount_table_offset",
    },
    Damage {
        name: "data_over_l1",
        change: |bytes| bytes.set(bytes.l2(), COPIED | bytes.l1()),
        by: Use::Write,
        field: "L2 entry",
        reason: "would overwrite the l1_table_offset",
    },
    Damage {
        name: "freed_metadata",
        change: |bytes| bytes.set(bytes.l2(), bytes.l1()),
        by: Use::WriteAndFlush,
        field: "refcount block",
        reason: "holds the l1_table_offset",
    },
];

/// An image with blocks 0 and [`REST`], damaged.
fn damaged(kind: Kind, damage: &Damage) -> Result<Disk> {
    let disk = Disk::new(kind)?;
    let path = disk.path.to_str().context("temporary folder is not UTF-8")?;
    let size = DISK.to_string();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        path,
        &size,
    ])?;
    let (mut process, mut driver) = disk.drive(&Options::default())?;
    for block in [0, REST] {
        driver.done(0, &write_block(1, block))?;
    }
    drop(driver);
    process.wait(DEADLINE)?;
    edit(&disk.path, damage.change)?;
    Ok(disk)
}

fn found(kind: Kind, damage: &Damage) -> Result<()> {
    let disk = damaged(kind, damage)?;
    let (mut process, mut driver) = disk.drive(&Options::default())?;
    let request = match damage.by {
        Use::Read => read_block(0),
        Use::Write => write_block(3, 0),
        Use::Allocate => write_block(3, UNMAPPED),
        Use::WriteAndFlush => {
            driver.done(0, &write_block(3, 0))?;
            BlockRequest::Flush
        }
    };
    let status = driver.run(0, &request)?.status;
    ensure!(status == STATUS_IOERR, "status {status}");
    ensure!(process.alive()?, "the process has gone: {}", process.stderr()?);
    let log = process.stderr()?;
    ensure!(
        log.contains(&format!("image is corrupt: {}: ", damage.field)) && log.contains(damage.reason),
        "the log does not name {:?} and say {:?}: {log}",
        damage.field,
        damage.reason
    );
    let before = fs::read(&disk.path)?;
    ensure!(before[79] & 2 != 0, "the corrupt bit is not set");
    // Read-only from now on, wherever it is.
    for block in [0, 1, REST, UNMAPPED] {
        let status = driver.run(0, &write_block(3, block))?.status;
        ensure!(status == STATUS_IOERR, "status {status} for block {block}");
    }
    let data = driver.done(0, &read_block(REST))?;
    ensure!(holds(&data, 1, REST), "block {REST} differs");
    // A guest that starts again may take all that it was offered.
    let features = driver.session.features.to_le_bytes();
    let connection = &mut driver.session.connection;
    connection.tell(request::SET_FEATURES, &features, &[])?;
    drop(driver);
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    ensure!(fs::read(&disk.path)? == before, "it was still written to");
    refused(
        disk.command()?,
        disk.folder.path(),
        "incompatible_features",
        "the corrupt bit is set",
    )
}

/// Where nobody may write, an error is all there is.
fn readers() -> Result<()> {
    for damage in DAMAGES.iter().filter(|damage| damage.by == Use::Read) {
        let disk = damaged(Kind::Qcow2, damage)?;
        let before = fs::read(&disk.path)?;
        let mut command = disk.command()?;
        command.args(["--read-only", "--fd=3"]);
        let (mut process, socket) = Process::start_with_socket(command)?;
        let session = Session::start(socket, &Options::default())?;
        let mut driver = BlockDriver::new(session);
        let status = driver.run(0, &read_block(0))?.status;
        ensure!(status == STATUS_IOERR, "{}: status {status}", damage.name);
        let data = driver.done(0, &read_block(REST))?;
        ensure!(holds(&data, 1, REST), "block {REST} differs");
        drop(driver);
        let status = process.wait(DEADLINE)?;
        ensure!(status.success(), "{status}: {}", process.stderr()?);
        ensure!(
            fs::read(&disk.path)? == before,
            "{}: it was written to",
            damage.name
        );
    }
    Ok(())
}
