//! What people expect of a disk process besides data: limits, counters, growth, hints, polling.

use crate::fixture::{BLOCK, DISK, Disk, Kind, read_block, write_block};
use anyhow::{Context, Result, ensure};
use guest_contract::holds;
use integration_tests::{
    frontend_harness::{
        BlockDriver, BlockRequest, DEADLINE, Options, STATUS_IOERR, Session, protocol, request,
    },
    process::{Process, inherit_at},
    suite::test,
};
use libtest_mimic::Trial;
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::AsFd,
        unix::{fs::MetadataExt, net::UnixStream},
    },
    time::{Duration, Instant},
};

pub(crate) fn tests() -> Vec<Trial> {
    let mut tests = vec![
        test("behaviour::limit::operations", || {
            limit("--limit=ops=300,ops-burst=3", 1, 300.0, 3.0)
        }),
        test("behaviour::limit::operations_of_two_queues", || {
            limit("--limit=ops=300,ops-burst=3", 2, 300.0, 3.0)
        }),
        test("behaviour::limit::bytes", || {
            limit("--limit=bytes=1200K,bytes-burst=12K", 1, 300.0, 3.0)
        }),
        test("behaviour::grows", grows),
        test("behaviour::refuses_to_shrink", refuses_to_shrink),
        test("behaviour::polls_before_it_sleeps", polls),
    ];
    for kind in Kind::OURS {
        let name = |what: &str| format!("behaviour::{}::{what}", kind.name());
        tests.push(test(name("counters"), move || counters(kind)));
        tests.push(test(name("topology"), move || topology(kind)));
        tests.push(test(name("discard_gives_space_back"), move || gives_back(kind)));
    }
    tests
}

/// A process with a control socket.
pub(crate) fn with_control(
    disk: &Disk,
    flags: &[&str],
    options: &Options,
) -> Result<(Process, BlockDriver, BufReader<UnixStream>)> {
    let mut command = disk.command()?;
    command.args(["--fd=3", "--control-fd=4"]).args(flags);
    let (control, theirs) = UnixStream::pair()?;
    control.set_read_timeout(Some(DEADLINE))?;
    inherit_at(&mut command, theirs.into(), 4)?;
    let (process, socket) = Process::start_with_socket(command)?;
    let session = Session::start(socket, options).with_context(|| process.stderr().unwrap_or_default())?;
    Ok((process, BlockDriver::new(session), BufReader::new(control)))
}

/// Sends an order; its answer, a line.
fn order(control: &mut BufReader<UnixStream>, order: &str) -> Result<String> {
    control.get_mut().write_all(format!("{order}\n").as_bytes())?;
    let mut line = String::new();
    control.read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

/// The counters as text, to the line that ends them.
pub(crate) fn metrics(control: &mut BufReader<UnixStream>) -> Result<Vec<String>> {
    let mut lines = vec![order(control, "metrics")?];
    while lines.last().is_some_and(|line| line != "# EOF") {
        let mut line = String::new();
        ensure!(control.read_line(&mut line)? > 0, "the metrics do not end");
        lines.push(line.trim_end().to_owned());
    }
    Ok(lines)
}

/// No more requests of 4 KiB than `rate` a second and the burst, whichever queue they come from. (That
/// it is no fewer either is shown with a clock of its own in `vhost_daemon::bucket`.)
fn limit(flag: &str, queues: u16, rate: f64, burst: f64) -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    let mut command = disk.command()?;
    command.args([flag, "--fd=3"]);
    let (_process, socket) = Process::start_with_socket(command)?;
    let options = Options {
        queues,
        ..Options::default()
    };
    let mut driver = BlockDriver::new(Session::start(socket, &options)?);
    let requests = (1.2 * rate) as u64;
    let start = Instant::now();
    let mut done = 0;
    while done < requests {
        for queue in 0..usize::from(queues) {
            for block in 0..16 {
                driver.submit(queue, &read_block(block))?;
            }
            driver.kick(queue)?;
        }
        for queue in 0..usize::from(queues) {
            for _ in 0..16 {
                driver.complete(queue)?;
                done += 1;
            }
        }
    }
    // Each queue may overdraw by one request.
    let allowed = burst + f64::from(queues) + start.elapsed().as_secs_f64() * rate * 1.02;
    ensure!(
        done as f64 <= allowed,
        "{done} requests, where {allowed} are allowed"
    );
    Ok(())
}

fn counters(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    let (mut process, mut driver, mut control) = with_control(&disk, &[], &options)?;
    for block in 0..10 {
        driver.done(1, &write_block(1, block))?;
    }
    for block in 0..7 {
        driver.done(1, &read_block(block))?;
    }
    driver.done(1, &BlockRequest::Flush)?;
    let outside = BlockRequest::Read {
        sector: DISK / 512,
        length: 512,
    };
    ensure!(
        driver.run(0, &outside)?.status == STATUS_IOERR,
        "read past the end"
    );
    let lines = metrics(&mut control)?;
    for expected in [
        format!("bulkhead_blk_capacity_bytes {DISK}"),
        "bulkhead_blk_operations_total{queue=\"1\",op=\"write\"} 10".to_owned(),
        "bulkhead_blk_operations_total{queue=\"1\",op=\"read\"} 7".to_owned(),
        "bulkhead_blk_operations_total{queue=\"1\",op=\"flush\"} 1".to_owned(),
        format!(
            "bulkhead_blk_bytes_total{{queue=\"1\",op=\"write\"}} {}",
            10 * BLOCK
        ),
        format!(
            "bulkhead_blk_bytes_total{{queue=\"1\",op=\"read\"}} {}",
            7 * BLOCK
        ),
        "bulkhead_blk_errors_total{queue=\"1\"} 0".to_owned(),
        "bulkhead_blk_errors_total{queue=\"0\"} 1".to_owned(),
        "bulkhead_blk_latency_seconds_count{queue=\"1\"} 18".to_owned(),
        "bulkhead_blk_latency_seconds_bucket{queue=\"1\",le=\"+Inf\"} 18".to_owned(),
    ] {
        ensure!(lines.contains(&expected), "no '{expected}' in {lines:#?}");
    }
    let refused = order(&mut control, "reboot")?;
    ensure!(refused.starts_with("error: "), "an unknown order: {refused}");
    // Whoever gave the orders is gone: the disk goes on.
    drop(control);
    driver.done(0, &read_block(0))?;
    drop(driver);
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    Ok(())
}

/// `struct virtio_blk_config` (virtio 1.3, 5.2.4): blk_size at 20, topology at 24.
fn topology(kind: Kind) -> Result<()> {
    const FEATURE_BLK_SIZE: u64 = 1 << 6;
    const FEATURE_TOPOLOGY: u64 = 1 << 10;
    let disk = Disk::new(kind)?;
    let (_process, mut driver) = disk.drive(&Options::default())?;
    let features = driver.session.features;
    ensure!(features & FEATURE_BLK_SIZE != 0 && features & FEATURE_TOPOLOGY != 0);
    let config = driver.session.config(20, 12)?;
    let optimal: u32 = match kind {
        Kind::Qcow2 | Kind::Qcow2Direct => 128,
        _ => 8,
    };
    let mut expected = 512_u32.to_le_bytes().to_vec();
    expected.extend([3, 0, 8, 0]);
    expected.extend(optimal.to_le_bytes());
    ensure!(config == expected, "{config:?}, not {expected:?}");
    Ok(())
}

fn gives_back(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    let (mut process, mut driver) = disk.drive(&Options::default())?;
    for block in 0..512 {
        driver.done(0, &write_block(5, block))?;
    }
    driver.done(0, &BlockRequest::Flush)?;
    let used = || -> Result<u64> { Ok(fs::metadata(&disk.path)?.blocks() * 512) };
    let before = used()?;
    driver.done(
        0,
        &BlockRequest::Discard {
            sector: 0,
            count: 448 * 8,
        },
    )?;
    driver.done(0, &BlockRequest::Flush)?;
    ensure!(
        holds(&driver.done(0, &read_block(500))?, 5, 500),
        "block 500 differs"
    );
    drop(driver);
    process.wait(DEADLINE)?;
    let (after, freed) = (used()?, 448 * BLOCK as u64);
    ensure!(
        after + freed / 2 < before,
        "{before} bytes before, {after} after {freed} were discarded"
    );
    Ok(())
}

fn capacity(driver: &mut BlockDriver) -> Result<u64> {
    let config = driver.session.config(0, 8)?;
    Ok(u64::from_le_bytes(config[..8].try_into()?) * 512)
}

fn grows() -> Result<()> {
    const BACKEND_CONFIG_CHANGE_MSG: u32 = 2;
    let disk = Disk::new(Kind::Raw)?;
    let options = Options {
        protocol: Options::default().protocol | protocol::BACKEND_REQ,
        ..Options::default()
    };
    let (_process, mut driver, mut control) = with_control(&disk, &[], &options)?;
    let (mut channel, theirs) = UnixStream::pair()?;
    channel.set_read_timeout(Some(DEADLINE))?;
    let connection = &mut driver.session.connection;
    connection.tell(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
    let last = DISK / BLOCK as u64;
    let status = driver.run(0, &write_block(6, last))?.status;
    ensure!(status == STATUS_IOERR, "a write past the end: status {status}");
    let answer = order(&mut control, &format!("size {}", 2 * DISK))?;
    ensure!(answer == "ok", "{answer}");
    let mut message = [0; 12];
    channel.read_exact(&mut message)?;
    ensure!(
        message[..4] == BACKEND_CONFIG_CHANGE_MSG.to_le_bytes(),
        "{message:?}"
    );
    ensure!(capacity(&mut driver)? == 2 * DISK);
    driver.done(0, &write_block(6, last))?;
    ensure!(
        holds(&driver.done(0, &read_block(last))?, 6, last),
        "data differs"
    );
    let end = driver.done(0, &read_block(2 * last - 1))?;
    ensure!(
        end.iter().all(|byte| *byte == 0),
        "the new part does not read as zeros"
    );
    ensure!(fs::metadata(&disk.path)?.len() == 2 * DISK);
    Ok(())
}

fn refuses_to_shrink() -> Result<()> {
    for kind in Kind::OURS {
        let disk = Disk::new(kind)?;
        let (_process, mut driver, mut control) = with_control(&disk, &[], &Options::default())?;
        for size in [0, DISK - 512, DISK + 1, u64::MAX] {
            let answer = order(&mut control, &format!("size {size}"))?;
            ensure!(answer.starts_with("error: size: "), "{size}: {answer}");
            ensure!(capacity(&mut driver)? == DISK);
        }
        driver.done(0, &write_block(1, 0))?;
    }
    Ok(())
}

/// A device that polls asks for kicks again only when its time is over (VIRTQ_USED_F_NO_NOTIFY, virtio 1.3,
/// 2.7.10), however busy the machine; one that does not, at once in some of many tries.
fn polls() -> Result<()> {
    const PATIENCE: Duration = Duration::from_millis(10);
    let disk = Disk::new(Kind::Raw)?;
    let mut command = disk.command()?;
    command.args(["--poll-us=10000", "--fd=3"]);
    let (_process, socket) = Process::start_with_socket(command)?;
    let mut driver = BlockDriver::new(Session::start(socket, &Options::default())?);
    let [_, _, used_flags] = driver.session.rings[0].parts();
    for block in 0..20 {
        let start = Instant::now();
        driver.done(0, &write_block(2, block))?;
        while driver.session.memory.observe(used_flags)? != 0 {
            ensure!(start.elapsed() < DEADLINE, "the device never sleeps");
        }
        let awake = start.elapsed();
        ensure!(awake >= PATIENCE, "asleep after {awake:?}");
    }
    Ok(())
}
