//! Launch of a Linux guest to the first line from its init, beside QEMU's microvm machine: the same
//! uncompressed kernel, initial RAM disk and command line, one vCPU, 256 MiB, taken in turn.
//!
//! `bench boot` builds the release binaries, or takes those in `BULKHEAD_BIN_DIR`.
//! Where KVM runs no stock kernel it does all of it inside the nested runner. Only the ratio means
//! anything there.

use super::median;
use crate::artifacts::{Artifact, Artifacts, BIN_DIR};
use crate::host::Host;
use crate::nested::{self, Ended, Job, Nested};
use anyhow::{Context, Result, bail, ensure};
use images::apt::Apt;
use images::cache::Cache;
use images::initramfs::Initramfs;
use images::kernel::{Kernel, KernelChoice};
use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// Launches of each kind that count; one more of each comes first and does not.
const ROUNDS: usize = 5;
/// For one boot.
const DEADLINE: Duration = Duration::from_secs(120);
/// For the whole series in the nested runner.
const NESTED_DEADLINE: Duration = Duration::from_secs(900);
/// What our median may be of QEMU's.
const LIMIT: f64 = 0.28;
/// What init says first.
const LINE: &str = "bench: init";
const CMDLINE: &str = "console=ttyS0 quiet mitigations=off panic=-1";
/// The folder with kernel and initial RAM disk; set for the run inside the nested runner.
pub(super) const FOLDER: &str = "BULKHEAD_BENCH_FOLDER";

/// What both boot.
struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Guest {
    fn build(folder: &Path) -> Result<Self> {
        let cache = Cache::open_default()?;
        let apt = Apt::open(&cache)?;
        let kernel = Kernel::get(&cache, &apt, KernelChoice::Default)?;
        let script = format!("echo {LINE}\n/bin/busybox poweroff -f\n");
        let initramfs = Initramfs {
            kernel: &kernel,
            modules: &[],
            later: &[],
            script: &script,
            files: &[],
        };
        let guest = Self::in_folder(folder);
        fs::copy(&kernel.elf, &guest.kernel)?;
        fs::copy(initramfs.build(&cache, &apt)?, &guest.initrd)?;
        Ok(guest)
    }

    fn in_folder(folder: &Path) -> Self {
        Self {
            kernel: folder.join("vmlinux"),
            initrd: folder.join("initramfs.cpio"),
        }
    }

    /// In a tmpfs: the nested runner reads the host's files slowly.
    fn copy_to(&self, folder: &Path) -> Result<Self> {
        let copy = Self::in_folder(folder);
        fs::copy(&self.kernel, &copy.kernel)?;
        fs::copy(&self.initrd, &copy.initrd)?;
        Ok(copy)
    }

    fn bulkhead(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg("run").arg("--kernel").arg(&self.kernel);
        command.arg("--initrd").arg(&self.initrd);
        command.args(["--cmdline", CMDLINE, "--cpus", "1", "--memory", "256M"]);
        command
    }

    fn microvm(&self) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "microvm", "-accel", "kvm", "-cpu", "host", "-smp", "1"]);
        command.args(["-m", "256", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-no-reboot", "-serial", "stdio", "-append", CMDLINE]);
        command.arg("-kernel").arg(&self.kernel);
        command.arg("-initrd").arg(&self.initrd);
        command
    }
}

/// Killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// From just before the process is made to init's line on its standard output.
fn launch(mut command: Command) -> Result<Duration> {
    let (sender, line) = mpsc::channel();
    let (close, closed) = mpsc::channel::<()>();
    let start = Instant::now();
    let mut running = Running(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
    let console = running.0.stdout.take().context("no stdout")?;
    let reader = thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if line.starts_with(LINE.as_bytes()) {
                // Nobody listens once the deadline has passed.
                let _ = sender.send(start.elapsed());
            }
        }
        drop(close);
    });
    let time = line
        .recv_timeout(DEADLINE)
        .with_context(|| format!("{command:?} did not get to init"))?;
    // It powers off by itself; the next launch is not to share the processor with this one's end.
    let end = closed.recv_timeout(DEADLINE);
    ensure!(
        end == Err(RecvTimeoutError::Disconnected),
        "{command:?} did not end"
    );
    ensure!(reader.join().is_ok(), "the console's reader panicked");
    drop(running);
    Ok(time)
}

/// The series on this very system.
fn compare(guest: &Guest, bulkhead: &Path) -> Result<bool> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    launch(guest.microvm())?;
    launch(guest.bulkhead(bulkhead))?;
    for _ in 0..ROUNDS {
        theirs.push(launch(guest.microvm())?);
        ours.push(launch(guest.bulkhead(bulkhead))?);
    }
    println!("launch to init's first line, medians of {ROUNDS} taken in turn:");
    println!("  bulkhead     {ours:.2?}");
    println!("  QEMU microvm {theirs:.2?}");
    let (ours, theirs) = (median(ours), median(theirs));
    let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
    println!("  {ours:.2?} / {theirs:.2?} = {ratio:.3} (limit {LIMIT})");
    Ok(ratio <= LIMIT)
}

pub(super) fn artifacts() -> Result<Artifacts> {
    Ok(match env::var_os(BIN_DIR) {
        Some(dir) => Artifacts::from_dir(Path::new(&dir)),
        None => Artifacts::build_shipped()?,
    })
}

/// The same program once more with these arguments, inside the nested runner: whether it succeeds.
pub(super) fn nested(folder: &Path, arguments: &[&str], deadline: Duration) -> Result<bool> {
    let program = env::current_exe()?;
    let program = program.to_string_lossy();
    let argv = [&[&*program], arguments].concat();
    let mut job = Job::new(&argv, deadline).for_nested(None);
    let set = |(name, value): (&str, &Path)| (name.to_owned(), value.to_string_lossy().into_owned());
    job.environment
        .extend([(FOLDER, folder), (BIN_DIR, folder)].map(set));
    // One guest of one vCPU at a time: the second CPU is for what runs beside it.
    let options = nested::Options {
        cpus: 2,
        ..Default::default()
    };
    let mut nested = Nested::boot(&options)?;
    let ended = nested.run_through(&job)?;
    nested.power_off()?;
    match ended {
        Ended::Exited(code) => Ok(code == 0),
        other => bail!("the series ended with {other:?}"),
    }
}

fn measure() -> Result<bool> {
    let folder = tempfile::tempdir()?;
    if let Some(built) = env::var_os(FOLDER) {
        let artifacts = artifacts()?;
        for artifact in [Artifact::Bulkhead, Artifact::Supervisor, Artifact::Vmm] {
            fs::copy(artifacts.path(artifact)?, folder.path().join(artifact.name()))?;
        }
        let guest = Guest::in_folder(Path::new(&built)).copy_to(folder.path())?;
        return compare(&guest, &folder.path().join(Artifact::Bulkhead.name()));
    }
    let guest = Guest::build(folder.path())?;
    let artifacts = artifacts()?;
    if Host::detect()?.runs_linux() {
        return compare(&guest, artifacts.path(Artifact::Bulkhead)?);
    }
    for artifact in [Artifact::Bulkhead, Artifact::Supervisor, Artifact::Vmm] {
        fs::copy(artifacts.path(artifact)?, folder.path().join(artifact.name()))?;
    }
    nested(folder.path(), &["boot"], NESTED_DEADLINE)
}

/// Measures; in a program that has called [`nested::agent::intercept`].
///
/// # Errors
/// A guest does not get to its init, or the limit is not held.
pub fn run() -> Result<()> {
    ensure!(measure()?, "the limit is not held");
    Ok(())
}
