//! Requests that wait for the host's disk hold up no others: reads of what its page cache lacks, in whole or in
//! part, which go through a ring; flushes, which have a thread of their own.

use crate::blk::run_all;
use crate::fixture::{
    BLOCK, DISK, Disk, Kind, check_blocks, kick_and_wait, need_disk, read_block, with_fault, write_block,
};
use anyhow::{Context, Result, bail, ensure};
use guest_contract::holds;
use integration_tests::{
    artifacts::Artifact,
    frontend_harness::{BlockDriver, BlockRequest, DEADLINE, Options, STATUS_OK, Session, request},
    process::Process,
    qemu_img::qemu_img,
    suite::{Skip, artifact, seccomp_flag, test},
};
use libtest_mimic::Trial;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

const BLOCKS: u64 = 2048;
/// Blocks that a flush has to write.
const MANY: u64 = 8192;
/// Blocks of one read.
const RUN: u64 = 16;
/// Exit code of a process that found a thread of its own to spin.
const HUNG: i32 = 75;

pub(crate) fn tests() -> Vec<Trial> {
    let case = |what, kind, over| {
        test(format!("aside::not_in_the_cache::{what}"), move || {
            cold(kind, over)
        })
    };
    let flush = |kind: Kind| test(format!("aside::flush::{}", kind.name()), move || flush(kind));
    let stopped = |kind: Kind| {
        let name = format!("aside::flush::{}::is_waited_for (waits)", kind.name());
        test(name, move || stopped(kind))
    };
    vec![
        flush(Kind::Raw),
        flush(Kind::Qcow2),
        test("aside::flush::alone", alone),
        test("aside::flush::spins", spins),
        stopped(Kind::Raw),
        stopped(Kind::Qcow2),
        case("raw", Kind::Raw, None),
        case("qcow2", Kind::Qcow2, None),
        case("overlay_on_raw", Kind::Raw, Some("--cache=writeback")),
        case("overlay_on_qcow2", Kind::Qcow2, Some("--cache=writeback")),
        case("direct_overlay_on_raw", Kind::Raw, Some("--cache=none")),
    ]
}

/// `kind` is that of the image with the data; it lies below a fresh one that is opened `over` it, or alone.
fn cold(kind: Kind, over: Option<&'static str>) -> Result<()> {
    let disk = Disk::new(kind)?;
    filled(&disk)?;
    let mut command = disk.command()?;
    if let Some(cache) = over {
        command = overlay(&disk, cache)?;
    }
    command.arg("--fd=3");
    let (process, socket) = Process::start_with_socket(command)?;
    let session = Session::start(socket, &Options::default())
        .with_context(|| format!("stderr: {}", process.stderr().unwrap_or_default()))?;
    let mut driver = BlockDriver::new(session);
    forget(&disk.path)?;
    let runs = (0..BLOCKS / RUN).rev().map(|run| (run, read_run(run)));
    run_all(&mut driver, 32, runs, |run, status, data| {
        ensure!(status == STATUS_OK, "read {run}: status {status}");
        for (block, data) in (run * RUN..).zip(data.chunks(BLOCK)) {
            ensure!(holds(data, 7, block), "block {block} differs");
        }
        Ok(())
    })?;
    let reads = through_rings(&process)?;
    ensure!(reads > 0, "no read went through a ring");
    Ok(())
}

/// Writes the pattern and ends.
fn filled(disk: &Disk) -> Result<()> {
    let (mut process, mut driver) = disk.drive(&Options::default())?;
    let writes = (0..BLOCKS).map(|block| (block, write_block(7, block)));
    run_all(&mut driver, 32, writes, |block, status, _| {
        ensure!(status == STATUS_OK, "write of block {block}: status {status}");
        Ok(())
    })?;
    driver.done(0, &BlockRequest::Flush)?;
    drop(driver);
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    Ok(())
}

/// The command line for a new image over `disk`.
fn overlay(disk: &Disk, cache: &str) -> Result<Command> {
    let top = disk.folder.path().join("top");
    let utf8 = |path: &PathBuf| {
        path.to_str()
            .map(str::to_owned)
            .context("a path that is not UTF-8")
    };
    let (base, name, format) = (utf8(&disk.path)?, utf8(&top)?, disk.kind.name());
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", format, "-b", &base, &name])?;
    let mut command = Command::new(artifact(Artifact::VhostUserBlk)?);
    command.arg(seccomp_flag());
    command.args([&format!("--blk-file={name}"), "--format=qcow2", cache]);
    command.arg(format!("--backing={format}:{base}"));
    Ok(command)
}

fn read_run(run: u64) -> BlockRequest {
    let bytes = RUN * BLOCK as u64;
    BlockRequest::Read {
        sector: run * bytes / 512,
        length: bytes as u32,
    }
}

/// Leaves nothing of the file in the page cache but the first pages of each third read, unless the file's layout
/// shifts them.
fn forget(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    // Or it would read ahead.
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
    let bytes = RUN * BLOCK as u64;
    for start in (0..DISK).step_by(3 * bytes as usize) {
        file.read_at(&mut [0; 5 * BLOCK], start)?;
    }
    Ok(())
}

/// A read that comes after a flush, which has much to write, is done before it.
fn flush(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    need_disk(&disk)?;
    let (_process, mut driver) = disk.drive(&Options::default())?;
    for _ in 0..3 {
        let writes = (0..MANY).map(|block| (block, write_block(7, block)));
        run_all(&mut driver, 32, writes, |block, status, _| {
            ensure!(status == STATUS_OK, "write of block {block}: status {status}");
            Ok(())
        })?;
        let flush = driver.submit(0, &BlockRequest::Flush)?;
        let read = driver.submit(0, &read_run(3))?;
        driver.kick(0)?;
        let first = driver.complete(0)?;
        ensure!(first.tag == read, "the read waited for the flush");
        ensure!(first.status == STATUS_OK && holds(&first.data[..BLOCK], 7, 3 * RUN));
        let second = driver.complete(0)?;
        ensure!(second.tag == flush && second.status == STATUS_OK, "{second:?}");
    }
    Ok(())
}

/// Nothing is asked for besides a flush, which takes 2 s all the same.
fn alone() -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    need_disk(&disk)?;
    let (_process, mut driver) = with_fault(&disk, "flush-2s")?;
    driver.submit(0, &BlockRequest::Flush)?;
    kick_and_wait(&mut driver)?;
    driver.session.connection.ask(request::GET_FEATURES, &[], &[])?;
    let read = driver.submit(0, &read_run(3))?;
    driver.kick(0)?;
    let first = driver.complete(0)?;
    ensure!(
        first.tag == read && first.status == STATUS_OK,
        "the read waited for the flush"
    );
    Ok(())
}

/// What is under way aside, on the thread that flushes, is waited for, and not left to the next ring.
fn stopped(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    need_disk(&disk)?;
    let (mut process, mut driver) = with_fault(&disk, "flush-2s")?;
    let begun = Instant::now();
    driver.submit(0, &BlockRequest::Flush)?;
    driver.submit(0, &write_block(8, 0))?;
    kick_and_wait(&mut driver)?;
    let base = driver.session.stop_ring(0)?;
    let took = begun.elapsed();
    let [_, _, used] = driver.session.rings[0].parts();
    let published = driver.session.memory.observe(used + 2)?;
    ensure!((base, published) == (2, 2), "{published} are done of {base}");
    ensure!(took >= Duration::from_secs(2), "the flush took {took:?}");
    for _ in 0..2 {
        let status = driver.complete(0)?.status;
        ensure!(status == STATUS_OK, "status {status}");
    }
    driver.session.connection.tell(request::RESET_DEVICE, &[], &[])?;
    let mut driver = BlockDriver::new(driver.session.restart(&Options::default())?);
    ensure!(holds(&driver.done(0, &read_block(0))?, 8, 0), "data differs");
    let [_, _, used] = driver.session.rings[0].parts();
    let published = driver.session.memory.observe(used + 2)?;
    ensure!(published == 1, "{published} completions of one request");
    drop(driver);
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    check_blocks(&disk.content()?, 8, 1)
}

/// A process that is asked for a sign of life finds that its own thread gives none.
fn spins() -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    need_disk(&disk)?;
    let (mut process, mut driver) = with_fault(&disk, "spin-flush")?;
    driver.submit(0, &BlockRequest::Flush)?;
    kick_and_wait(&mut driver)?;
    let end = Instant::now() + Duration::from_secs(45);
    // As often as a front end asks that sees no progress; its requests go on being answered.
    while driver
        .session
        .connection
        .ask(request::GET_FEATURES, &[], &[])
        .is_ok()
    {
        ensure!(Instant::now() < end, "nobody finds the thread that spins");
        std::thread::sleep(Duration::from_millis(100));
    }
    let (status, log) = (process.wait(DEADLINE)?, process.stderr()?);
    ensure!(
        status.code() == Some(HUNG) && log.contains("thread spins") && log.contains("flushes"),
        "{status}: {log}"
    );
    Ok(())
}

/// How many transfers the process's rings have ended.
fn through_rings(process: &Process) -> Result<u64> {
    let folder = PathBuf::from(format!("/proc/{}", process.pid()));
    let entries = match fs::read_dir(folder.join("fd")) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            bail!(Skip("only root sees what a ring has done".to_owned()))
        }
        entries => entries?,
    };
    let (mut rings, mut ended) = (0, 0);
    for entry in entries {
        let entry = entry?;
        if fs::read_link(entry.path())?.as_os_str() == "anon_inode:[io_uring]" {
            rings += 1;
            let about = fs::read_to_string(folder.join("fdinfo").join(entry.file_name()))?;
            let tail = about.lines().find_map(|line| line.strip_prefix("CqTail:"));
            ended += tail.context("a ring without a CqTail")?.trim().parse::<u64>()?;
        }
    }
    if rings == 0 {
        bail!(Skip(
            "no ring: reads of this file system wait for nothing, or the host refuses one".to_owned()
        ))
    }
    Ok(ended)
}
