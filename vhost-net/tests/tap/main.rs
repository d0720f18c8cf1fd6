//! The real `vhost-user-net` between a front end with no VM and a TAP in a namespace of its own.
#![allow(unreachable_pub, missing_docs, reason = "a test binary exports nothing")]

mod cases;
mod frames;
mod guest;
mod host;
mod hostile;
mod limits;
mod link;
mod namespace;
mod queues;
mod successor;

use anyhow::{Context, Result, ensure};
use integration_tests::artifacts::{Artifact, Artifacts};
use integration_tests::process::{Process, connect, inherit_at};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use namespace::{TestTap, text};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::OnceLock;
use std::time::Duration;
use tempfile::TempDir;

/// The static `vhost-user-net`, as it is shipped: its system calls are what its policy allows.
pub static BINARY: OnceLock<PathBuf> = OnceLock::new();

/// A device process that serves a TAP of its own.
pub struct Device {
    pub tap: TestTap,
    pub process: Process,
    folder: TempDir,
    /// `--control-fd`, unless the test has it.
    control: Option<UnixStream>,
}

impl Device {
    /// Starts it with the guest's MAC address and `flags`.
    pub fn start(flags: &[&str]) -> Result<Self> {
        Self::on(TestTap::new("")?, flags)
    }

    /// Starts it on this TAP.
    pub fn on(tap: TestTap, flags: &[&str]) -> Result<Self> {
        let (theirs, ours) = UnixStream::pair()?;
        ours.set_read_timeout(Some(guest::DEADLINE))?;
        let flags = [flags, &["--control-fd=9"]].concat();
        Ok(Self {
            control: Some(ours),
            ..Self::with(tap, &flags, [(theirs.into(), 9)])?
        })
    }

    /// Starts it on this TAP, with these descriptors under these numbers.
    pub fn with(
        tap: TestTap,
        flags: &[&str],
        inherited: impl IntoIterator<Item = (OwnedFd, i32)>,
    ) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let binary = BINARY.get().context("no binary")?;
        let mut command = Command::new(binary);
        command.arg(format!("--socket-path={}", folder.path().join("net").display()));
        command.arg(format!("--tap-name={}", tap.name));
        command.arg(format!("--mac={}", text(&tap.guest_mac())));
        command.args(flags);
        for (fd, number) in inherited {
            inherit_at(&mut command, fd, number)?;
        }
        Ok(Self {
            tap,
            process: Process::start(command)?,
            folder,
            control: None,
        })
    }

    /// Frames that it says it has dropped, `direction` and `reason` as its metrics have them.
    pub fn dropped(&self, direction: &str, reason: &str) -> Result<u64> {
        let metrics = metrics(self.control.as_ref().context("no --control-fd")?)?;
        let name = format!("bulkhead_net_dropped_total{{direction=\"{direction}\",reason=\"{reason}\"}} ");
        let count = metrics.lines().find_map(|line| line.strip_prefix(&name));
        Ok(count.with_context(|| format!("no {name}in {metrics}"))?.parse()?)
    }

    /// Connects to it.
    pub fn connect(&self) -> Result<UnixStream> {
        let socket = connect(&self.folder.path().join("net"), Duration::from_secs(10));
        let socket = socket.map_err(|error| error.context(self.process.stderr().unwrap_or_default()))?;
        self.tap.wait_up()?;
        Ok(socket)
    }
}

/// A device's counters, by the other end of its `--control-fd`.
pub fn metrics(control: &UnixStream) -> Result<String> {
    (&*control).write_all(b"metrics\n")?;
    // Nothing comes behind the end.
    let mut answer = BufReader::new(control);
    let mut metrics = String::new();
    while !metrics.ends_with("# EOF\n") {
        ensure!(answer.read_line(&mut metrics)? > 0, "no end: {metrics}");
    }
    Ok(metrics)
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if !arguments.list {
        let path = Artifacts::locate().and_then(|all| all.path(Artifact::VhostUserNet).map(PathBuf::from));
        match path {
            Ok(path) => BINARY.get_or_init(|| path),
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        };
    }
    // While this process has one thread only.
    let namespace = if arguments.list {
        Ok(())
    } else {
        namespace::enter()
    };
    let missing = namespace.err().map(|error| format!("{error:#}"));
    let cases = cases::ALL
        .iter()
        .chain(hostile::ALL)
        .chain(limits::ALL)
        .chain(link::ALL)
        .chain(queues::ALL)
        .chain(successor::ALL);
    let trials = cases.map(|(name, case)| {
        let missing = missing.clone();
        Trial::ignorable_test(*name, move || match missing {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => match case() {
                Ok(()) => Ok(Completion::Completed),
                Err(error) => Err(Failed::from(format!("{error:#}"))),
            },
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// A test and its name.
pub type Case = (&'static str, fn() -> Result<()>);
