//! A process that serves a disk, with its driver.

use super::blk_driver::{Lane, Limit, Work};
use crate::{
    frontend_harness::{DEADLINE, MEMORY_NAME, Options, Session, virtio},
    process::{Process, connect},
};
use anyhow::{Context, Result, anyhow, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

/// Entries of each ring.
const RING: u16 = 128;

/// Who serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Program {
    Ours,
    Qemu,
}

/// What is served, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Contender {
    pub(super) program: Program,
    pub(super) format: Format,
    pub(super) queues: u16,
    /// O_DIRECT.
    pub(super) direct: bool,
}

/// The image's format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Format {
    Raw,
    Qcow2,
}

impl Format {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Where the binaries are, and flags under test.
pub(super) struct Programs {
    pub(super) ours: PathBuf,
    pub(super) our_flags: Vec<String>,
    pub(super) qemu: PathBuf,
    pub(super) qemu_aio: String,
    pub(super) qemu_iothread: bool,
}

/// What one turn took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    pub(super) requests: u64,
    pub(super) time: Duration,
    /// CPU time of the serving process.
    pub(super) cpu: Duration,
}

impl Turn {
    pub(super) fn rate(&self) -> f64 {
        self.requests as f64 / self.time.as_secs_f64()
    }

    /// Microseconds of CPU for a request.
    pub(super) fn cost(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.requests.max(1) as f64
    }
}

/// A running process and the lanes of its queues.
pub(super) struct Peer {
    process: Process,
    lanes: Vec<Lane>,
    /// The image, where each turn begins with nothing of it in the page cache.
    pub(super) forget: Option<File>,
    /// The connection stays open as long as the lanes are used.
    _session: Session,
}

static SOCKETS: AtomicU32 = AtomicU32::new(0);

impl Peer {
    pub(super) fn start(
        programs: &Programs,
        contender: Contender,
        image: &Path,
        folder: &Path,
        work: Work,
    ) -> Result<Self> {
        let socket = folder.join(format!("s{}", SOCKETS.fetch_add(1, Ordering::Relaxed)));
        let command = match contender.program {
            Program::Ours => programs.our_command(contender, image, &socket),
            Program::Qemu => programs.qemu_command(contender, image, &socket),
        };
        let process = Process::start(command)?;
        let stderr = |error: anyhow::Error| {
            let said = process.stderr().unwrap_or_default();
            error.context(format!("{contender:?}: {said}"))
        };
        let stream = connect(&socket, DEADLINE).map_err(stderr)?;
        let each = Lane::footprint(&work);
        let options = Options {
            queues: contender.queues,
            ring_size: RING,
            features: !virtio::INDIRECT_DESC,
            memory: (16 << 20) + (each * u64::from(contender.queues)).next_multiple_of(1 << 20),
            ..Options::default()
        };
        let session = Session::start(stream, &options).map_err(stderr)?;
        let mut lanes = Vec::new();
        for (index, ring) in (0_u64..).zip(&session.rings) {
            let slots = session.data_start() + index * each;
            lanes.push(Lane::new(
                &session.memory,
                ring,
                slots,
                work,
                0x1234_5678 + index * 977,
            )?);
        }
        Ok(Self {
            process,
            lanes,
            forget: None,
            _session: session,
        })
    }

    /// Runs all queues for one turn.
    pub(super) fn turn(&mut self, limit: Limit) -> Result<Turn> {
        ensure!(self.process.alive()?, "it has ended: {}", self.process.stderr()?);
        if let Some(image) = &self.forget {
            posix_fadvise(image, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
        let (cpu, start) = (self.cpu()?, Instant::now());
        let run = |lanes: &mut [Lane]| -> Result<u64> {
            if let [lane] = lanes {
                return lane.run(limit);
            }
            thread::scope(|scope| {
                let threads: Vec<_> = lanes
                    .iter_mut()
                    .map(|lane| scope.spawn(move || lane.run(limit)))
                    .collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().map_err(|_| anyhow!("a driver's thread panicked"))?)
                    .sum()
            })
        };
        let requests = run(&mut self.lanes).with_context(|| self.process.stderr().unwrap_or_default())?;
        Ok(Turn {
            requests,
            time: start.elapsed(),
            cpu: self.cpu()?.saturating_sub(cpu),
        })
    }

    /// Time on a CPU of all threads. A thread that ended takes its time along; the threads that
    /// matter live on.
    fn cpu(&self) -> Result<Duration> {
        let mut sum = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.process.pid()))? {
            let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else {
                continue;
            };
            let first = text.split(' ').next().context("empty schedstat")?;
            sum += first.parse::<u64>()?;
        }
        Ok(Duration::from_nanos(sum))
    }

    /// Its share of resident memory (PSS) without the guest's RAM, in KiB.
    pub(super) fn idle_memory(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/smaps", self.process.pid()))?;
        let (mut sum, mut counts) = (0, true);
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("Pss:") if counts => {
                    sum += words.next().context("empty Pss")?.parse::<u64>()?;
                }
                // A mapping's first line: addresses, rights, offset, device, inode, name.
                Some(word) if !word.ends_with(':') => counts = !line.contains(MEMORY_NAME),
                _ => {}
            }
        }
        Ok(sum)
    }

    /// Resident memory that is the process's own, in KiB.
    pub(super) fn memory(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.process.pid()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        Ok(number.context("no RssAnon")?.parse()?)
    }
}

impl Programs {
    fn our_command(&self, contender: Contender, image: &Path, socket: &Path) -> Command {
        let mut command = Command::new(&self.ours);
        command
            .arg(format!("--socket-path={}", socket.display()))
            .arg(format!("--blk-file={}", image.display()))
            .arg(format!("--format={}", contender.format.name()))
            .arg(format!("--num-queues={}", contender.queues))
            .args(&self.our_flags);
        if contender.direct {
            command.arg("--cache=none");
        }
        command
    }

    fn qemu_command(&self, contender: Contender, image: &Path, socket: &Path) -> Command {
        let mut command = Command::new(&self.qemu);
        let (direct, aio) = match (contender.direct, self.qemu_aio.as_str()) {
            (true, "threads") => ("on", "native"),
            (true, aio) => ("on", aio),
            (false, aio) => ("off", aio),
        };
        let mut export = format!(
            "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={}",
            socket.display(),
            contender.queues
        );
        if self.qemu_iothread {
            command.args(["--object", "iothread,id=t"]);
            export.push_str(",iothread=t");
        }
        command.arg("--blockdev").arg(format!(
            "driver=file,node-name=file,filename={},cache.direct={direct},aio={aio},discard=unmap",
            image.display()
        ));
        command.arg("--blockdev").arg(format!(
            "driver={},node-name=disk,file=file,cache.direct={direct},discard=unmap",
            contender.format.name()
        ));
        command.arg("--export").arg(export);
        command
    }
}
