//! A host that runs out of space, and one whose file system makes no holes: in a mount namespace of the
//! disk process's own.

use crate::behaviour::metrics;
use crate::fixture::{Kind, read_block, write_block};
use anyhow::{Context, Result, bail, ensure};
use guest_contract::holds;
use integration_tests::{
    artifacts::Artifact,
    frontend_harness::{
        BlockDriver, BlockRequest, DEADLINE, Memory, Options, STATUS_IOERR, STATUS_OK, Segment, Session,
        protocol, request,
    },
    process::{Process, inherit_at},
    suite::{Skip, artifact, test},
};
use libtest_mimic::Trial;
use serde_json::Value;
use std::{
    io::{BufReader, Write},
    os::unix::net::UnixStream,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Mounts, makes an image, serves it, and checks it at the end. Half the space is taken until a line
/// comes on standard input.
const SCRIPT: &str = r#"
set -e
mount -t "$1" -o size=4m none "$2"
head -c 2M /dev/zero > "$2/hog"
qemu-img create -q -f "$3" "$2/disk" 64M
exec 5<&0
(exec 3>&- 4>&-; read -r line <&5 && rm "$2/hog") &
folder=$2 format=$3
shift 3
"$@" 5<&-
test "$format" = raw || qemu-img check -f "$format" "$folder/disk" >&2
"#;
/// More blocks than the file system holds.
const MANY: u64 = 1024;

pub(crate) fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for (kind, name) in [(Kind::Raw, "raw"), (Kind::Qcow2, "qcow2")] {
        tests.push(test(format!("space::{name}::report"), move || report(kind)));
        tests.push(test(format!("space::{name}::stop"), move || stop(kind)));
        tests.push(test(format!("space::{name}::stop_alone"), move || {
            stop_alone(kind)
        }));
        tests.push(test(format!("space::{name}::stop_and_hotplug"), move || {
            stop_and_hotplug(kind)
        }));
        tests.push(test(format!("space::{name}::stop_and_hang_up"), move || {
            stop_and_hang_up(kind)
        }));
        tests.push(test(format!("space::{name}::stop_and_reset"), move || {
            stop_and_reset(kind)
        }));
        tests.push(test(format!("space::{name}::stop_and_pause"), move || {
            stop_and_pause(kind)
        }));
    }
    tests.push(test("space::no_discard_where_there_are_no_holes", no_holes));
    tests.push(test(
        "space::what_is_done_is_told_while_more_is_slow",
        told_meanwhile,
    ));
    tests
}

struct Host {
    process: Process,
    driver: BlockDriver,
    control: BufReader<UnixStream>,
    _folder: TempDir,
}

impl Host {
    fn start(file_system: &str, kind: Kind, flags: &[&str]) -> Result<Self> {
        Self::start_with(file_system, kind, flags, &Options::default())
    }

    fn start_with(file_system: &str, kind: Kind, flags: &[&str], options: &Options) -> Result<Self> {
        let possible = Command::new("unshare").args(["-Urm", "true"]).output();
        if !possible.is_ok_and(|output| output.status.success()) {
            bail!(Skip("no user namespaces here".to_owned()));
        }
        let folder = tempfile::tempdir()?;
        let format = if kind == Kind::Raw { "raw" } else { "qcow2" };
        let mut command = Command::new("unshare");
        command
            .args(["-Urm", "sh", "-c", SCRIPT, "sh", file_system])
            .arg(folder.path())
            .arg(format)
            .arg(artifact(Artifact::VhostUserBlk)?)
            .arg(format!("--blk-file={}/disk", folder.path().display()))
            .arg(format!("--format={format}"))
            .args(["--fd=3", "--control-fd=4"])
            .args(flags);
        let (ours, theirs) = UnixStream::pair()?;
        inherit_at(&mut command, theirs.into(), 3)?;
        let (control, theirs) = UnixStream::pair()?;
        control.set_read_timeout(Some(DEADLINE))?;
        inherit_at(&mut command, theirs.into(), 4)?;
        let process = Process::start_with_input(command, Stdio::piped())?;
        let session = Session::start(ours, options).with_context(|| process.stderr().unwrap_or_default())?;
        Ok(Self {
            process,
            driver: BlockDriver::new(session),
            control: BufReader::new(control),
            _folder: folder,
        })
    }

    /// Gives back the space that is taken.
    fn free(&mut self) -> Result<()> {
        let input = self.process.child().stdin.as_mut().context("no pipe")?;
        Ok(input.write_all(b"go\n")?)
    }

    /// Writes blocks until `full` says so; how many there were.
    fn fill(&mut self, mut full: impl FnMut(&mut Self, u64) -> Result<bool>) -> Result<u64> {
        for block in 0..MANY {
            if full(self, block)? {
                ensure!(block > 0, "nothing could be written");
                return Ok(block);
            }
        }
        bail!("{MANY} blocks fit")
    }

    /// Blocks below `end` hold what was written, and the image is whole.
    fn check(mut self, end: u64) -> Result<()> {
        for block in 0..end {
            let data = self.driver.done(0, &read_block(block))?;
            ensure!(holds(&data, 7, block), "block {block} differs");
        }
        drop(self.driver);
        let status = self.process.wait(DEADLINE)?;
        ensure!(status.success(), "{status}: {}", self.process.stderr()?);
        Ok(())
    }

    /// Whether so many requests wait for the host.
    fn is_stopped(&mut self, requests: u64) -> Result<bool> {
        let wanted = format!("bulkhead_blk_stopped_requests{{queue=\"0\"}} {requests}");
        Ok(metrics(&mut self.control)?.contains(&wanted))
    }

    /// Writes blocks until one is kept.
    fn fill_until_stopped(&mut self) -> Result<u64> {
        let [_, _, used] = self.driver.session.rings[0].parts();
        self.fill(|host, block| {
            host.driver.submit(0, &write_block(7, block))?;
            host.driver.kick(0)?;
            let before = host.driver.session.rings[0].next_used();
            let end = Instant::now() + DEADLINE;
            while host.driver.session.memory.observe(used + 2)? == before {
                if host.is_stopped(1)? {
                    return Ok(true);
                }
                ensure!(Instant::now() < end, "neither an answer nor a stop");
            }
            let status = host.driver.complete(0)?.status;
            ensure!(
                status == STATUS_OK,
                "status {status}, where the queue had to stop"
            );
            Ok(false)
        })
    }
}

fn report(kind: Kind) -> Result<()> {
    let mut host = Host::start("tmpfs", kind, &[])?;
    let end = host.fill(|host, block| {
        let status = host.driver.run(0, &write_block(7, block))?.status;
        ensure!(status == STATUS_OK || status == STATUS_IOERR, "status {status}");
        Ok(status == STATUS_IOERR)
    })?;
    ensure!(holds(&host.driver.done(0, &read_block(end - 1))?, 7, end - 1));
    host.free()?;
    // The file is removed by another process: nothing tells when.
    let deadline = Instant::now() + DEADLINE;
    while host.driver.run(0, &write_block(7, end))?.status != STATUS_OK {
        ensure!(Instant::now() < deadline, "space returned, and writing fails");
        thread::sleep(Duration::from_millis(10));
    }
    host.check(end + 1)
}

fn stop(kind: Kind) -> Result<()> {
    let mut host = Host::start("tmpfs", kind, &["--on-error=stop", "--log-format=json"])?;
    let end = host.fill_until_stopped()?;
    // What comes behind waits, too.
    host.driver.submit(0, &write_block(7, end + 1))?;
    host.driver.kick(0)?;
    host.free()?;
    for _ in 0..2 {
        let status = host.driver.complete(0)?.status;
        ensure!(status == STATUS_OK, "status {status} when space returned");
    }
    ensure!(
        host.is_stopped(0)?,
        "nothing waits, and the counter says otherwise"
    );
    let log = host.process.stderr()?;
    for words in ["the queue stops", "the queue goes on"] {
        let line = log
            .lines()
            .find(|line| line.contains(words))
            .context("no word of it")?;
        let told: Value = serde_json::from_str(line)?;
        ensure!(told["queue"] == 0 && told["message"].is_string(), "{line}");
    }
    host.check(end + 2)
}

/// A request that is larger than what a queue does in one go, and the only one: nothing else wakes the queue.
fn stop_alone(kind: Kind) -> Result<()> {
    const PIECE: u32 = 256 << 10;
    const PIECES: usize = 12;
    let mut host = Host::start("tmpfs", kind, &["--on-error=stop"])?;
    let session = &mut host.driver.session;
    let (header, status) = (session.data_start(), session.data_start() + 16);
    let data = header + 4096;
    // VIRTIO_BLK_T_OUT to sector 0.
    session.memory.write(header, &1_u128.to_le_bytes())?;
    session.memory.write(status, &[0xEE])?;
    session.memory.write(data, &vec![7; PIECE as usize])?;
    let segment = |address, length, writable| Segment {
        address,
        length,
        writable,
    };
    let mut chain = vec![segment(header, 16, false)];
    chain.extend([segment(data, PIECE, false); PIECES]);
    chain.push(segment(status, 1, true));
    session.rings[0].push(&chain)?;
    session.rings[0].notify()?;
    let deadline = Instant::now() + DEADLINE;
    while !host.is_stopped(1)? {
        ensure!(Instant::now() < deadline, "3 MiB fit into 2");
    }
    host.free()?;
    let session = &mut host.driver.session;
    session.rings[0].wait_used(DEADLINE)?;
    ensure!(session.memory.read(status, 1)? == [STATUS_OK]);
    host.check(0)
}

/// What waits does so while memory comes and goes, and while the ring is disabled.
fn stop_and_hotplug(kind: Kind) -> Result<()> {
    let mut host = Host::start("tmpfs", kind, &["--on-error=stop"])?;
    let end = host.fill_until_stopped()?;
    let more = Memory::new(1 << 20)?;
    // Far above the memory that there is.
    let mut region = more.region();
    for at in [0, 16] {
        region[at + 5] = 1;
    }
    let slot = [&0_u64.to_le_bytes()[..], &region].concat();
    let whole = host.driver.session.memory.clone();
    let table = [&1_u64.to_le_bytes()[..], &whole.region()].concat();
    let [disable, enable] = [0, 1_u64].map(|enabled| (enabled << 32).to_le_bytes());
    for (message, payload, fd) in [
        (request::ADD_MEM_REG, &slot[..], Some(more.fd())),
        (request::REM_MEM_REG, &slot, None),
        (request::SET_MEM_TABLE, &table, Some(whole.fd())),
        (request::SET_VRING_ENABLE, &disable, None),
        (request::SET_VRING_ENABLE, &enable, None),
    ] {
        let fds: Vec<_> = fd.into_iter().collect();
        host.driver.session.connection.tell(message, payload, &fds)?;
        ensure!(host.is_stopped(1)?, "message {message} had it answered");
    }
    host.free()?;
    let status = host.driver.complete(0)?.status;
    ensure!(status == STATUS_OK, "status {status} when space returned");
    host.check(end + 1)
}

/// What waits has no answer when the session ends: it is in the in-flight region, for the next process.
fn stop_and_hang_up(kind: Kind) -> Result<()> {
    let mut host = Host::start("tmpfs", kind, &["--on-error=stop"])?;
    host.fill_until_stopped()?;
    let Session {
        connection,
        memory,
        rings,
        ..
    } = host.driver.session;
    let ([_, _, used], before) = (rings[0].parts(), rings[0].next_used());
    drop(connection);
    let status = host.process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", host.process.stderr()?);
    ensure!(memory.observe(used + 2)? == before, "it came back");
    Ok(())
}

/// A driver that resets the device has its answer.
fn stop_and_reset(kind: Kind) -> Result<()> {
    let mut host = Host::start("tmpfs", kind, &["--on-error=stop"])?;
    let end = host.fill_until_stopped()?;
    host.driver.session.stop_ring(0)?;
    let status = host.driver.complete(0)?.status;
    ensure!(status == STATUS_IOERR, "status {status}");
    host.driver
        .session
        .connection
        .tell(request::RESET_DEVICE, &[], &[])?;
    let session = host.driver.session.restart(&Options::default())?;
    host.driver = BlockDriver::new(session);
    host.check(end)
}

/// As QEMU stops a device (`stop`) and goes on (`cont`): what waits is in the in-flight region meanwhile.
fn stop_and_pause(kind: Kind) -> Result<()> {
    let defaults = Options::default();
    let options = Options {
        protocol: defaults.protocol | protocol::STATUS | protocol::GET_VRING_BASE_INFLIGHT,
        ..defaults
    };
    let mut host = Host::start_with("tmpfs", kind, &["--on-error=stop"], &options)?;
    ensure!(
        host.driver.session.protocol == options.protocol,
        "not all is offered"
    );
    let end = host.fill_until_stopped()?;
    let session = &mut host.driver.session;
    let base = session.stop_ring(0)?;
    let connection = &mut session.connection;
    connection.tell(request::SET_STATUS, &0_u64.to_le_bytes(), &[])?;
    host.free()?;
    host.driver.session.go_on(&[u16::try_from(base)?])?;
    let status = host.driver.complete(0)?.status;
    ensure!(status == STATUS_OK, "status {status} when space returned");
    host.check(end + 1)
}

fn no_holes() -> Result<()> {
    const FEATURE_DISCARD: u64 = 1 << 13;
    const FEATURE_WRITE_ZEROES: u64 = 1 << 14;
    let mut host = Host::start("ramfs", Kind::Raw, &[])?;
    let features = host.driver.session.features;
    ensure!(features & FEATURE_DISCARD == 0, "DISCARD is offered");
    ensure!(
        features & FEATURE_WRITE_ZEROES != 0,
        "WRITE_ZEROES is not offered"
    );
    // struct virtio_blk_config: write_zeroes_may_unmap at 56.
    ensure!(host.driver.session.config(56, 1)? == [0]);
    for block in 0..4 {
        host.driver.done(0, &write_block(7, block))?;
    }
    let clear = BlockRequest::WriteZeroes {
        sector: 2 * 8,
        count: 2 * 8,
        unmap: true,
    };
    host.driver.done(0, &clear)?;
    let data = host.driver.done(0, &read_block(3))?;
    ensure!(data.iter().all(|byte| *byte == 0), "the block is not zero");
    host.check(2)
}

/// The file system cannot zero a range: each request writes 16 MiB.
fn told_meanwhile() -> Result<()> {
    const REQUESTS: u16 = 8;
    let mut host = Host::start("ramfs", Kind::Raw, &[])?;
    let clear = BlockRequest::WriteZeroes {
        sector: 0,
        count: 32 << 10,
        unmap: false,
    };
    for _ in 0..REQUESTS {
        host.driver.submit(0, &clear)?;
    }
    let [_, _, used] = host.driver.session.rings[0].parts();
    host.driver.kick(0)?;
    let end = Instant::now() + DEADLINE;
    let done = loop {
        let done = host.driver.session.memory.observe(used + 2)?;
        if done > 0 {
            break done;
        }
        ensure!(Instant::now() < end, "nothing is done");
    };
    ensure!(done < REQUESTS, "all were told together");
    for _ in 0..REQUESTS {
        let status = host.driver.complete(0)?.status;
        ensure!(status == STATUS_OK, "status {status}");
    }
    host.check(0)
}
