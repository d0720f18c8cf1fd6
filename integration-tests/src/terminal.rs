//! A person's terminal: a pseudo-terminal with a program in its foreground.
#![expect(unsafe_code, reason = "runs code between fork and exec")]

use crate::tiny::Console;
use anyhow::{Context, Result};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The terminal, as the person has it.
#[derive(Debug)]
pub struct Terminal {
    keys: File,
    /// Held open, so that its settings can be asked for after the program's end.
    program_side: File,
    before: Termios,
    /// What it shows.
    pub screen: Console,
    program: std::process::Child,
}

impl Terminal {
    /// Starts `command` in the foreground of a new terminal, as a shell would.
    ///
    /// # Errors
    /// The system's.
    pub fn start(mut command: Command) -> Result<Self> {
        let OpenptyResult { master, slave } = openpty(None, None)?;
        let before = tcgetattr(&slave)?;
        command
            .stdin(Stdio::from(slave.try_clone()?))
            .stdout(Stdio::from(slave.try_clone()?))
            .stderr(Stdio::from(slave.try_clone()?));
        let terminal = slave.as_raw_fd();
        let take_terminal = move || {
            nix::unistd::setsid()?;
            // SAFETY: async-signal-safe, touches no memory; a session leader without a terminal
            // takes this one.
            if unsafe { libc::ioctl(terminal, libc::TIOCSCTTY, 0) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        };
        // SAFETY: the closure makes two system calls and allocates nothing.
        unsafe { command.pre_exec(take_terminal) };
        let program = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let keys = File::from(master);
        Ok(Self {
            screen: Console::new(keys.try_clone()?),
            keys,
            program_side: slave.into(),
            before,
            program,
        })
    }

    /// Types `keys`.
    ///
    /// # Errors
    /// The system's.
    pub fn type_keys(&mut self, keys: &[u8]) -> Result<()> {
        Ok(self.keys.write_all(keys)?)
    }

    /// Whether each key goes straight to the program, unechoed.
    ///
    /// # Errors
    /// The system's.
    pub fn is_raw(&self) -> Result<bool> {
        let flags = tcgetattr(&self.program_side)?.local_flags;
        Ok(!flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG))
    }

    /// Whether its settings are those from before the program.
    ///
    /// # Errors
    /// The system's.
    pub fn is_as_before(&self) -> Result<bool> {
        Ok(tcgetattr(&self.program_side)? == self.before)
    }

    /// Sends the program a signal.
    ///
    /// # Errors
    /// The system's.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.program.id())?;
        Ok(kill(Pid::from_raw(pid), signal)?)
    }

    /// Waits for the program's end.
    ///
    /// # Errors
    /// It still runs after `deadline`; says what is on the screen.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(status) = self.program.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > end {
                anyhow::bail!(
                    "it still runs after {deadline:?}; the screen:\n{}",
                    self.screen.text()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Both fail only where it is gone already.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}
