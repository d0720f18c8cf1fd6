//! What a well-behaved driver may ask of a disk.

use crate::fixture::{BLOCK, DISK, Disk, Kind, check_blocks, read_block, write_block};
use anyhow::{Result, ensure};
use guest_contract::holds;
use integration_tests::{
    frontend_harness::{
        BlockDriver, BlockRequest, DEADLINE, Options, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP, virtio,
    },
    suite::test,
};
use libtest_mimic::Trial;
use std::collections::BTreeMap;

const BLOCKS: u64 = 1000;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;
const FEATURE_READ_ONLY: u64 = 1 << 5;

pub(crate) fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    let rings = [
        ("plain", 0),
        ("event_idx", virtio::EVENT_IDX),
        ("indirect", virtio::INDIRECT_DESC),
        ("event_idx_indirect", virtio::EVENT_IDX | virtio::INDIRECT_DESC),
    ];
    for kind in Kind::ALL {
        for (name, features) in rings {
            for (queues, depth) in [(1, 1), (4, 32)] {
                let name = format!("blk::{}::data_{name}_{queues}x{depth}", kind.name());
                tests.push(test(name, move || data(kind, features, queues, depth)));
            }
        }
    }
    for kind in Kind::OURS {
        let name = |what: &str| format!("blk::{}::{what}", kind.name());
        tests.push(test(name("serial"), move || serial(kind)));
        tests.push(test(name("discard"), move || discard(kind)));
        tests.push(test(name("write_zeroes"), move || write_zeroes(kind)));
        tests.push(test(name("bad_requests"), move || bad_requests(kind)));
        tests.push(test(name("read_only"), move || read_only(kind)));
        tests.push(test(name("config"), move || config(kind)));
    }
    tests
}

fn options(features: u64, queues: u16) -> Options {
    let rings = virtio::EVENT_IDX | virtio::INDIRECT_DESC;
    Options {
        features: !rings | features,
        queues,
        ..Options::default()
    }
}

/// Runs `requests` on all queues, up to `depth` in each, and hands each completion to `check`.
pub(crate) fn run_all(
    driver: &mut BlockDriver,
    depth: usize,
    requests: impl IntoIterator<Item = (u64, BlockRequest)>,
    mut check: impl FnMut(u64, u8, &[u8]) -> Result<()>,
) -> Result<()> {
    let queues = driver.session.rings.len();
    let mut pending = BTreeMap::new();
    let mut finish = |driver: &mut BlockDriver, queue, pending: &mut BTreeMap<u64, u64>| {
        let completion = driver.complete(queue)?;
        let number = pending.remove(&completion.tag).unwrap_or_default();
        check(number, completion.status, &completion.data)
    };
    for (at, (number, request)) in requests.into_iter().enumerate() {
        let queue = at % queues;
        if driver.in_flight(queue) == depth {
            finish(driver, queue, &mut pending)?;
        }
        pending.insert(driver.submit(queue, &request)?, number);
        driver.kick(queue)?;
    }
    for queue in 0..queues {
        while driver.in_flight(queue) > 0 {
            finish(driver, queue, &mut pending)?;
        }
    }
    Ok(())
}

fn data(kind: Kind, features: u64, queues: u16, depth: usize) -> Result<()> {
    let disk = Disk::new(kind)?;
    let (mut process, mut driver) = disk.drive(&options(features, queues))?;
    ensure!(
        driver.session.features & features == features,
        "ring features are not offered"
    );
    let writes = (0..BLOCKS).map(|block| (block, write_block(7, block)));
    run_all(&mut driver, depth, writes, |block, status, _| {
        ensure!(status == STATUS_OK, "write of block {block}: status {status}");
        Ok(())
    })?;
    driver.done(0, &BlockRequest::Flush)?;
    let reads = (0..BLOCKS).rev().map(|block| (block, read_block(block)));
    run_all(&mut driver, depth, reads, |block, status, data| {
        ensure!(status == STATUS_OK, "read of block {block}: status {status}");
        ensure!(holds(data, 7, block), "block {block} differs");
        Ok(())
    })?;
    drop(driver);
    let status = process.wait(DEADLINE)?;
    ensure!(
        status.success() || kind == Kind::Reference,
        "{status} after the front end left: {}",
        process.stderr()?
    );
    check_blocks(&disk.content()?, 7, BLOCKS)
}

fn serial(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    let (_process, mut driver) = disk.drive(&options(0, 1))?;
    let id = driver.done(0, &BlockRequest::GetId)?;
    ensure!(id == b"protocol-test\0\0\0\0\0\0\0", "serial {id:?}");
    Ok(())
}

/// Writes 256 blocks, lets `clear` clear blocks 64 to 191, and checks all of them.
fn cleared(kind: Kind, feature: u64, clear: impl Fn(&mut BlockDriver) -> Result<()>) -> Result<()> {
    let disk = Disk::new(kind)?;
    let (mut process, mut driver) = disk.drive(&options(0, 1))?;
    ensure!(
        driver.session.features & feature != 0,
        "feature {feature:#x} is not offered"
    );
    for block in 0..256 {
        driver.done(0, &write_block(3, block))?;
    }
    clear(&mut driver)?;
    driver.done(0, &BlockRequest::Flush)?;
    for block in 0..256 {
        let data = driver.done(0, &read_block(block))?;
        let zero = (64..192).contains(&block);
        ensure!(
            if zero {
                data.iter().all(|byte| *byte == 0)
            } else {
                holds(&data, 3, block)
            },
            "block {block} differs (cleared: {zero})"
        );
    }
    drop(driver);
    process.wait(DEADLINE)?;
    let content = disk.content()?;
    check_blocks(&content, 3, 64)?;
    ensure!(
        content[64 * BLOCK..192 * BLOCK].iter().all(|byte| *byte == 0),
        "the image keeps data"
    );
    Ok(())
}

fn discard(kind: Kind) -> Result<()> {
    // Discarded data may read as anything by the standard; our images free it, so it reads zero.
    let request = BlockRequest::Discard {
        sector: 64 * 8,
        count: 128 * 8,
    };
    cleared(kind, FEATURE_DISCARD, |driver| driver.done(0, &request).map(drop))
}

fn write_zeroes(kind: Kind) -> Result<()> {
    cleared(kind, FEATURE_WRITE_ZEROES, |driver| {
        for (unmap, sector) in [(false, 64 * 8), (true, 128 * 8)] {
            driver.done(
                0,
                &BlockRequest::WriteZeroes {
                    sector,
                    count: 64 * 8,
                    unmap,
                },
            )?;
        }
        Ok(())
    })
}

/// `struct virtio_blk_discard_write_zeroes`.
pub(crate) fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &count.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

fn bad_requests(kind: Kind) -> Result<()> {
    const KEPT: u64 = 8;
    let disk = Disk::new(kind)?;
    let (mut process, mut driver) = disk.drive(&options(0, 1))?;
    let end = DISK / 512;
    let other = |kind, sector, data: &[u8]| BlockRequest::Other {
        kind,
        sector,
        data: data.to_vec(),
    };
    let cases = [
        (
            BlockRequest::Read {
                sector: end,
                length: 512,
            },
            STATUS_IOERR,
        ),
        (
            BlockRequest::Read {
                sector: end - 1,
                length: 1024,
            },
            STATUS_IOERR,
        ),
        (
            BlockRequest::Read {
                sector: u64::MAX,
                length: 512,
            },
            STATUS_IOERR,
        ),
        (
            BlockRequest::Read {
                sector: u64::MAX / 512,
                length: 4096,
            },
            STATUS_IOERR,
        ),
        (
            BlockRequest::Read {
                sector: 0,
                length: 511,
            },
            STATUS_IOERR,
        ),
        (
            BlockRequest::Write {
                sector: end,
                data: vec![1; 512],
            },
            STATUS_IOERR,
        ),
        (
            BlockRequest::Write {
                sector: 0,
                data: vec![1; 513],
            },
            STATUS_IOERR,
        ),
        (
            BlockRequest::Discard {
                sector: end,
                count: 1,
            },
            STATUS_IOERR,
        ),
        (
            BlockRequest::Discard {
                sector: u64::MAX - 1,
                count: u32::MAX,
            },
            STATUS_IOERR,
        ),
        (
            BlockRequest::WriteZeroes {
                sector: end - 1,
                count: 2,
                unmap: false,
            },
            STATUS_IOERR,
        ),
        (other(0x7777, 0, &[0; 16]), STATUS_UNSUPP),
        // Discard with an undefined flag: virtio 1.3, 5.2.6.2 asks for UNSUPP.
        (
            other(11, 0, &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x80]),
            STATUS_UNSUPP,
        ),
        // A discard of half a segment, of none, of more than are allowed.
        (other(11, 0, &[0; 8]), STATUS_IOERR),
        (other(11, 0, &[]), STATUS_IOERR),
        (other(11, 0, &segment(KEPT * 8, 8, 0).repeat(33)), STATUS_IOERR),
        // UNMAP is for WRITE_ZEROES alone.
        (other(11, 0, &segment(KEPT * 8, 8, 1)), STATUS_UNSUPP),
        (other(13, 0, &segment(KEPT * 8, 8, 2)), STATUS_UNSUPP),
        (other(13, 0, &segment(u64::MAX, 1, 1)), STATUS_IOERR),
        (other(13, 0, &segment(0, u32::MAX, 0)), STATUS_IOERR),
        // Nothing is done where one segment of several is bad.
        (
            other(11, 0, &[segment(KEPT * 8, 8, 0), segment(end, 1, 0)].concat()),
            STATUS_IOERR,
        ),
        (
            other(13, 0, &[segment(KEPT * 8, 8, 1), segment(end, 1, 1)].concat()),
            STATUS_IOERR,
        ),
    ];
    driver.done(0, &write_block(1, KEPT))?;
    for (request, expected) in cases {
        let status = driver.run(0, &request)?.status;
        ensure!(
            status == expected,
            "status {status}, not {expected}, for {request:?}"
        );
    }
    ensure!(process.alive()?, "the process has gone");
    driver.done(0, &write_block(1, 0))?;
    for block in [0, KEPT] {
        ensure!(
            holds(&driver.done(0, &read_block(block))?, 1, block),
            "block {block} differs after bad requests"
        );
    }
    Ok(())
}

fn read_only(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    let before = disk.content()?;
    let mut command = disk.command()?;
    command.args(["--read-only", "--fd=3"]);
    let (mut process, socket) = integration_tests::process::Process::start_with_socket(command)?;
    let session = integration_tests::frontend_harness::Session::start(socket, &options(0, 1))?;
    ensure!(
        session.features & FEATURE_READ_ONLY != 0,
        "VIRTIO_BLK_F_RO is not offered"
    );
    let mut driver = BlockDriver::new(session);
    let clear = |unmap| BlockRequest::WriteZeroes {
        sector: 0,
        count: 8,
        unmap,
    };
    for request in [write_block(1, 0), clear(true), clear(false)] {
        let status = driver.run(0, &request)?.status;
        ensure!(status != STATUS_OK, "{request:?} succeeded");
    }
    driver.done(0, &read_block(0))?;
    drop(driver);
    process.wait(DEADLINE)?;
    ensure!(disk.content()? == before, "the image changed");
    Ok(())
}

fn config(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    let (_process, mut driver) = disk.drive(&options(0, 1))?;
    let config = driver.session.config(0, 60)?;
    ensure!(
        config[..8] == (DISK / 512).to_le_bytes(),
        "capacity {:?}",
        &config[..8]
    );
    // struct virtio_blk_config: num_queues is the 16 bits at 34.
    ensure!(
        config[34..36] == 4_u16.to_le_bytes(),
        "num_queues {:?}",
        &config[34..36]
    );
    // max_discard_sectors is the 32 bits at 36: 65536 clusters.
    let cluster = match kind {
        Kind::Raw | Kind::RawDirect | Kind::Reference => 4 << 10,
        Kind::Qcow2 | Kind::Qcow2Direct => 64_u32 << 10,
    };
    ensure!(
        config[36..40] == (cluster * (65536 / 512)).to_le_bytes(),
        "max_discard_sectors {:?}",
        &config[36..40]
    );
    ensure!(
        driver.session.queue_num >= 4,
        "GET_QUEUE_NUM says {}",
        driver.session.queue_num
    );
    Ok(())
}
