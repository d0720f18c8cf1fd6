//! `bulkhead run` with a run-time folder of its own.

use super::console::Console;
use crate::{
    artifacts::Artifact,
    process::Process,
    suite::{artifact, jail_flags},
};
use anyhow::{Context, Result, ensure};
use nix::{sys::signal::Signal, unistd::Pid};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use vm_spec::run_state::{FILE_NAME, ProcessRole, RunState};

const NAME: &str = "test";
/// Between two looks at the run-time folder.
const LOOK: Duration = Duration::from_millis(5);
/// Between two signals of [`Run::insist`].
const INSISTENCE: Duration = Duration::from_millis(100);

/// A launched VM.
#[derive(Debug)]
pub struct Run {
    /// The launcher, then spawner.
    pub process: Process,
    /// What the guest prints.
    pub console: Console,
    folder: TempDir,
}

/// The launcher, for [`Run::by`], with a shell's `before` and `redirection` around it.
///
/// # Errors
/// When there is no such program.
pub fn launcher(before: &str, redirection: &str) -> Result<Command> {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("{before} exec \"$@\" {redirection}"), "sh"])
        .arg(artifact(Artifact::Bulkhead)?);
    Ok(shell)
}

impl Run {
    /// Runs the tiny guest with `cmdline` and further flags.
    ///
    /// # Errors
    /// When the launcher does not start.
    pub fn tiny(cmdline: &str, flags: &[String]) -> Result<Self> {
        let kernel = artifact(Artifact::TinyGuest)?;
        let mut all = vec![format!("--kernel={}", kernel.display())];
        all.extend(["--memory=64M".to_owned(), format!("--cmdline={cmdline}")]);
        all.extend_from_slice(flags);
        Self::with_flags(&all)
    }

    /// `bulkhead run` with these flags.
    ///
    /// # Errors
    /// When the launcher does not start.
    pub fn with_flags(flags: &[String]) -> Result<Self> {
        Self::by(
            Command::new(artifact(Artifact::Bulkhead)?),
            tempfile::tempdir()?,
            flags,
        )
    }

    /// `run` with these flags, by a command that ends in the launcher's path, and with `folder`
    /// for its run-time folder.
    ///
    /// # Errors
    /// When it does not start.
    pub fn by(mut command: Command, folder: TempDir, flags: &[String]) -> Result<Self> {
        command
            .args(["run", "--name", NAME])
            .args(jail_flags())
            .args(flags)
            .env("XDG_RUNTIME_DIR", folder.path())
            .env("TMPDIR", folder.path())
            .stdout(Stdio::piped());
        let mut process = Process::start_with_input(command, Stdio::piped())?;
        let stdout = process.child().stdout.take().context("no stdout")?;
        Ok(Self {
            process,
            console: Console::new(stdout),
            folder,
        })
    }

    /// `bulkhead VERB NAME WORDS...` for this VM.
    ///
    /// # Errors
    /// When there is no such program.
    pub fn verb(&self, verb: &str, words: &[&str]) -> Result<Command> {
        Ok(self.verb_by(Command::new(artifact(Artifact::Bulkhead)?), verb, words))
    }

    /// As [`Self::verb`], by a command that ends in the launcher's path.
    #[must_use]
    pub fn verb_by(&self, mut command: Command, verb: &str, words: &[&str]) -> Command {
        command
            .args([verb, NAME])
            .args(words)
            .env("XDG_RUNTIME_DIR", self.folder());
        command
    }

    /// Types one byte on the console.
    ///
    /// # Errors
    /// When nobody reads it any more.
    pub fn press(&mut self, key: u8) -> Result<()> {
        let input = self.process.child().stdin.as_mut().context("no stdin")?;
        Ok(input.write_all(&[key])?)
    }

    /// Where its run-time folder and temporary files are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The VM's run-time folder; gone once it is over.
    #[must_use]
    pub fn run_folder(&self) -> PathBuf {
        self.folder.path().join("bulkhead").join(NAME)
    }

    /// What is known of the VM once its guest runs.
    ///
    /// # Errors
    /// When it does not run before `deadline` has passed.
    pub fn state(&mut self, deadline: Duration) -> Result<RunState> {
        let end = Instant::now() + deadline;
        let path = self.run_folder().join(FILE_NAME);
        loop {
            if let Ok(text) = fs::read(&path) {
                let state: RunState = serde_json::from_slice(&text)?;
                if state.first_instruction_ns.is_some() {
                    return Ok(state);
                }
            }
            ensure!(
                self.process.alive()?,
                "bulkhead ended: {}",
                self.process.stderr()?
            );
            ensure!(
                Instant::now() < end,
                "the guest does not run: {}",
                self.process.stderr()?
            );
            thread::sleep(LOOK);
        }
    }

    /// The process of the first device, or other part, of this role.
    ///
    /// # Errors
    /// As [`Self::state`]; when there is none.
    pub fn pid_of(&mut self, role: ProcessRole, deadline: Duration) -> Result<Pid> {
        let state = self.state(deadline)?;
        let process = state.processes.iter().find(|process| process.role == role);
        Ok(Pid::from_raw(process.context("no such process")?.pid))
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When it does not come before `deadline` has passed.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let status = self.process.wait(deadline)?;
        self.console.finish(deadline)?;
        Ok(status)
    }

    /// Sends `signal` again and again, as someone does who has waited long enough, until the end.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn insist(&mut self, signal: Signal, deadline: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + deadline;
        while Instant::now() < end && self.process.alive()? {
            self.process.signal(signal)?;
            thread::sleep(INSISTENCE);
        }
        self.wait(deadline)
    }
}

impl Drop for Run {
    /// Ends the whole VM: the spawner's death does, and a test that failed may have left it.
    fn drop(&mut self) {
        // Fails only where it is gone already.
        let _ = self.process.child().kill();
    }
}
