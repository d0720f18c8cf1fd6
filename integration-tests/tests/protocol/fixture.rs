//! Disks and the processes that serve them.

use crate::net;
use anyhow::{Context, Result, bail, ensure};
use guest_contract::{fill, holds};
use integration_tests::{
    artifacts::Artifact,
    frontend_harness::{BlockDriver, BlockRequest, DEADLINE, NetDriver, Options, Session},
    process::{Process, connect},
    qemu_img::{qemu_img, qemu_img_output},
    suite::{Skip, artifact, seccomp_flag},
    tiny::Tap,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    any::Any,
    fs::{self, File},
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};
use tempfile::TempDir;

/// Size of every test disk in bytes.
pub(crate) const DISK: u64 = 64 << 20;

/// How a disk is stored, and who serves it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Raw,
    Qcow2,
    /// Past the page cache, through the restricted ring.
    RawDirect,
    Qcow2Direct,
    /// Raw, served by the reference back end.
    Reference,
}

impl Kind {
    pub(crate) const OURS: [Self; 4] = [Self::Raw, Self::Qcow2, Self::RawDirect, Self::Qcow2Direct];
    pub(crate) const ALL: [Self; 5] = [
        Self::Raw,
        Self::Qcow2,
        Self::RawDirect,
        Self::Qcow2Direct,
        Self::Reference,
    ];

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Raw | Self::Reference => &["--format=raw"],
            Self::Qcow2 => &["--format=qcow2"],
            Self::RawDirect => &["--format=raw", "--cache=none"],
            Self::Qcow2Direct => &["--format=qcow2", "--cache=none"],
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::RawDirect => "raw-direct",
            Self::Qcow2Direct => "qcow2-direct",
            Self::Reference => "reference",
        }
    }
}

/// An empty image in a folder of its own.
pub(crate) struct Disk {
    pub(crate) kind: Kind,
    pub(crate) path: PathBuf,
    pub(crate) folder: TempDir,
}

/// What may be wrong with an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flaws {
    None,
    /// Clusters that nobody refers to, as a process that was killed may leave them.
    Leaks,
}

/// `qemu-img check`'s exit code for leaks and nothing worse.
const LEAKS: i32 = 3;

/// That the image has no others.
pub(crate) fn check(name: &str, flaws: Flaws) -> Result<()> {
    let output = qemu_img_output(Path::new("."), &["check", "-f", "qcow2", name])?;
    let code = output.status.code();
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        code == Some(0) || (flaws == Flaws::Leaks && code == Some(LEAKS)),
        "qemu-img check: {code:?}\n{}",
        text.lines().rev().take(8).collect::<Vec<_>>().join("\n")
    );
    Ok(())
}

impl Disk {
    pub(crate) fn new(kind: Kind) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("disk");
        let name = path.to_str().context("temporary folder is not UTF-8")?;
        match kind {
            Kind::Qcow2 | Kind::Qcow2Direct => drop(qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                name,
                &DISK.to_string(),
            ])?),
            Kind::Raw | Kind::RawDirect | Kind::Reference => File::create(&path)?.set_len(DISK)?,
        }
        Ok(Self { kind, path, folder })
    }

    /// Our device process's command line for this disk, without the socket.
    pub(crate) fn command(&self) -> Result<Command> {
        self.command_of(Artifact::VhostUserBlk, "protocol-test")
    }

    /// As [`Self::command`], of a process with this fault.
    pub(crate) fn faulty(&self, fault: &str) -> Result<Command> {
        self.command_of(Artifact::FaultyBlk, &format!("bad.{fault}"))
    }

    fn command_of(&self, program: Artifact, serial: &str) -> Result<Command> {
        let mut command = Command::new(artifact(program)?);
        command.arg(seccomp_flag());
        command
            .arg(format!("--blk-file={}", self.path.display()))
            .args(self.kind.flags())
            .args(["--num-queues=4", &format!("--serial={serial}")]);
        Ok(command)
    }

    /// Starts the process, and connects to it.
    pub(crate) fn start(&self) -> Result<(Process, UnixStream)> {
        if self.kind != Kind::Reference {
            let mut command = self.command()?;
            command.arg("--fd=3");
            return Process::start_with_socket(command);
        }
        let socket = self.folder.path().join("reference.sock");
        let mut command = Command::new(artifact(Artifact::ReferenceBlk)?);
        command.arg(&socket).arg(&self.path);
        let process = Process::start(command)?;
        Ok((process, connect(&socket, DEADLINE)?))
    }

    /// Starts the process and a driver.
    pub(crate) fn drive(&self, options: &Options) -> Result<(Process, BlockDriver)> {
        let (process, socket) = self.start()?;
        let session = Session::start(socket, options)
            .with_context(|| format!("stderr: {}", process.stderr().unwrap_or_default()))?;
        Ok((process, BlockDriver::new(session)))
    }

    /// The disk's content, read by someone else, once nobody serves it; qcow2 images are checked.
    pub(crate) fn content(&self) -> Result<Vec<u8>> {
        self.content_with(Flaws::None)
    }

    /// The content of an image that may have these flaws.
    pub(crate) fn content_with(&self, flaws: Flaws) -> Result<Vec<u8>> {
        if !matches!(self.kind, Kind::Qcow2 | Kind::Qcow2Direct) {
            return Ok(fs::read(&self.path)?);
        }
        let raw = self.folder.path().join("raw");
        let (from, to) = (self.path.to_str(), raw.to_str());
        let (from, to) = from.zip(to).context("temporary folder is not UTF-8")?;
        check(from, flaws)?;
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", from, to])?;
        Ok(fs::read(raw)?)
    }
}

/// `command`, whose calls that `calls` names are written to `file` by strace. The process is our child, and strace goes
/// when it does.
pub(crate) fn traced(command: &Command, calls: &str, file: &Path) -> Result<Command> {
    if Command::new("strace").arg("-V").output().is_err() {
        bail!(Skip("strace is not installed".to_owned()));
    }
    let mut traced = Command::new("strace");
    traced.args(["-D", "-f", "-qq", "-e", &format!("trace={calls}"), "-o"]);
    traced
        .arg(file)
        .arg(command.get_program())
        .args(command.get_args());
    Ok(traced)
}

/// For tests of what waits for a disk: flushes have a thread of their own there.
pub(crate) fn need_disk(disk: &Disk) -> Result<()> {
    let file_system = nix::sys::statfs::statfs(disk.folder.path())?.filesystem_type();
    if file_system == nix::sys::statfs::TMPFS_MAGIC {
        bail!(Skip("in memory nothing waits for a flush".to_owned()))
    }
    Ok(())
}

/// Starts a process with this fault, and a driver.
pub(crate) fn with_fault(disk: &Disk, fault: &str) -> Result<(Process, BlockDriver)> {
    let mut command = disk.faulty(fault)?;
    command.arg("--fd=3");
    let (process, socket) = Process::start_with_socket(command)?;
    let session = Session::start(socket, &Options::default())
        .with_context(|| format!("stderr: {}", process.stderr().unwrap_or_default()))?;
    Ok((process, BlockDriver::new(session)))
}

/// Kicks queue 0, and waits until its thread has woken for it: it takes what there is before it obeys the front end.
pub(crate) fn kick_and_wait(driver: &mut BlockDriver) -> Result<()> {
    driver.kick(0)?;
    let end = Instant::now() + DEADLINE;
    while has_input(&driver.session.rings[0].kick)? {
        ensure!(Instant::now() < end, "the kick is not heeded");
    }
    Ok(())
}

/// Whether a read of `file` would not wait.
pub(crate) fn has_input(file: &impl AsFd) -> Result<bool> {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

/// Bytes of a block of the pattern.
pub(crate) const BLOCK: usize = 4096;

/// Writes block `number` of the pattern.
pub(crate) fn write_block(seed: u64, number: u64) -> BlockRequest {
    let mut data = vec![0; BLOCK];
    fill(&mut data, seed, number);
    BlockRequest::Write {
        sector: number * (BLOCK as u64 / 512),
        data,
    }
}

/// Reads block `number`.
pub(crate) fn read_block(number: u64) -> BlockRequest {
    BlockRequest::Read {
        sector: number * (BLOCK as u64 / 512),
        length: BLOCK as u32,
    }
}

/// That `blocks` blocks of `content` hold the pattern.
pub(crate) fn check_blocks(content: &[u8], seed: u64, blocks: u64) -> Result<()> {
    for (number, data) in (0..blocks).zip(content.chunks(BLOCK)) {
        ensure!(holds(data, seed, number), "block {number} differs");
    }
    Ok(())
}

/// One of the two programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Target {
    Disk,
    Nic,
}

impl Target {
    /// The command line without the socket, and what has to stay until the process ends.
    pub(crate) fn command(self) -> Result<(Command, Box<dyn Any>)> {
        Ok(match self {
            Self::Disk => {
                let disk = Disk::new(Kind::Raw)?;
                (disk.command()?, Box::new(disk))
            }
            Self::Nic => {
                let tap = Tap::new()?;
                (net::command(&tap)?, Box::new(tap))
            }
        })
    }

    /// A front end that does as it should is served.
    pub(crate) fn serves(self, socket: UnixStream) -> Result<()> {
        match self {
            Self::Disk => {
                let session = Session::start(socket, &Options::default())?;
                BlockDriver::new(session).done(0, &write_block(2, 0)).map(drop)
            }
            Self::Nic => {
                let session = Session::start(socket, &net::options(0))?;
                net::send(&mut NetDriver::new(session)?, 0)
            }
        }
    }
}
