//! Real KVM anywhere: an emulated machine with AMD SVM that runs the host's own programs.
//!
//! QEMU's TCG emulates SVM with nested paging; Debian's kernel in it loads `kvm_amd` and so has a
//! `/dev/kvm` that runs stock kernels. The host's file tree is its root (9p, below an overlay in
//! memory, so that nothing in there changes the host). One boot of the outer guest takes 7 to
//! 15 s and then runs any number of commands. See README.md beside this file.

pub mod agent;
mod outer;
pub mod wire;

use crate::host;
use crate::interrupt::Guard;
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
pub use wire::{Ended, Job, Stream};
use wire::{FromAgent, ToAgent};

/// How long the outer guest may take to its first sign of life.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// How long it may take to power off.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(30);
/// How often the outer machine gets an interrupt for nothing.
const PULSE: Duration = Duration::from_millis(100);
/// How much longer than a command's own deadline the runner waits for the agent's word.
const ANSWER_GRACE: Duration = Duration::from_secs(20);

/// The outer machine.
#[derive(Clone, Debug)]
pub struct Options {
    /// RAM in MiB.
    pub memory_mib: u32,
    /// vCPUs. One by default: as soon as two are in guests at the same time, the emulator now and then
    /// walks a guest's page tables without the nested ones. The guest then triple faults or writes into
    /// the outer kernel.
    pub cpus: u8,
    /// A folder of the host that both sides write, at the same path in the guest.
    pub shared: Option<PathBuf>,
    /// Show the outer kernel's console on standard error.
    pub console: bool,
    /// The program that runs as the outer guest's agent: a copy of this one (see
    /// [`agent::intercept`]), where this one's own file may be replaced meanwhile.
    pub agent: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_mib: 3072,
            cpus: 1,
            shared: None,
            console: false,
            agent: None,
        }
    }
}

/// A booted outer guest. Dropping it ends the emulator.
#[derive(Debug)]
pub struct Nested {
    emulator: Child,
    guard: Option<Guard>,
    port: UnixStream,
    /// The same port, for whole frames.
    orders: Arc<Mutex<UnixStream>>,
    /// What the emulator and the outer kernel said.
    log: File,
}

impl Nested {
    /// Boots the outer guest and waits for its agent. One that does not come up is given up, once: its
    /// processor may wait for an interrupt that the emulator lost, and there is no pulse yet.
    ///
    /// # Errors
    /// QEMU is missing, an image cannot be built, or the guest does not come up in time; the
    /// error ends with the guest's last console lines.
    pub fn boot(options: &Options) -> anyhow::Result<Self> {
        Self::come_up(|| {
            let log = tempfile::tempfile()
                .with_context(|| format!("a file for the console in {}", std::env::temp_dir().display()))?;
            let (emulator, guard, port) = outer::start(options, &log)?;
            let mut nested = Self::of(emulator, port, log)?;
            nested.guard = Some(guard);
            Ok(nested)
        })
    }

    fn come_up(mut start: impl FnMut() -> anyhow::Result<Self>) -> anyhow::Result<Self> {
        let mut nested = start()?;
        if let Err(error) = nested.wait_up() {
            eprintln!("nested: once more: {error:#}");
            nested = start()?;
            nested.wait_up()?;
        }
        nested.start_pulse();
        Ok(nested)
    }

    fn of(emulator: Child, port: UnixStream, log: File) -> anyhow::Result<Self> {
        // Only to one that is stuck does a write take time.
        port.set_write_timeout(Some(ANSWER_GRACE))?;
        Ok(Self {
            emulator,
            guard: None,
            orders: Arc::new(Mutex::new(port.try_clone()?)),
            port,
            log,
        })
    }

    fn wait_up(&mut self) -> anyhow::Result<()> {
        match self.receive(Instant::now() + BOOT_DEADLINE) {
            Ok(FromAgent::Ready) => Ok(()),
            Ok(other) => bail!("the outer guest's agent began with {other:?}"),
            Err(error) => Err(self.last_words(error).context("the outer guest did not come up")),
        }
    }

    /// Runs one command and hands its output on as it comes.
    ///
    /// # Errors
    /// The outer guest died or went silent beyond the command's deadline.
    pub fn run(&mut self, job: &Job, output: &mut dyn FnMut(Stream, &[u8])) -> anyhow::Result<Ended> {
        let deadline = Instant::now() + job.deadline + ANSWER_GRACE;
        self.order(&ToAgent::Run(job.clone()))
            .context("the outer guest takes no command")?;
        loop {
            match self.receive(deadline).map_err(|error| self.last_words(error))? {
                FromAgent::Output(stream, bytes) => output(stream, &bytes),
                FromAgent::Ended(ended) => return Ok(ended),
                FromAgent::Ready => bail!("the outer guest's agent started again"),
            }
        }
    }

    /// Runs one command with its output passed through to this process's own.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_through(&mut self, job: &Job) -> anyhow::Result<Ended> {
        self.run(job, &mut |stream, bytes| {
            // A reader that went away does not stop the command.
            let _ = match stream {
                Stream::Out => std::io::stdout()
                    .write_all(bytes)
                    .and_then(|()| std::io::stdout().flush()),
                Stream::Err => std::io::stderr().write_all(bytes),
            };
        })
    }

    /// Powers the outer guest off and waits for the emulator's end.
    ///
    /// # Errors
    /// It did not end in time and was killed.
    pub fn power_off(mut self) -> anyhow::Result<()> {
        self.order(&ToAgent::PowerOff)?;
        // The emulator closes its end of the port when it exits.
        let end = self.receive(Instant::now() + POWER_OFF_DEADLINE);
        let gone = end.is_err_and(|error| {
            let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            matches!(
                kind,
                Some(std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset)
            )
        });
        if !gone {
            self.emulator.kill()?;
        }
        self.emulator.wait()?;
        if gone {
            Ok(())
        } else {
            bail!("the outer guest did not power off")
        }
    }

    fn order(&self, order: &ToAgent) -> std::io::Result<()> {
        tell(&self.orders, order)
    }

    /// The emulator now and then loses the local timer's interrupt, and a processor that waits for it then
    /// waits for ever. Any other interrupt wakes it, and the lost one is delivered too.
    fn start_pulse(&self) {
        let orders = Arc::clone(&self.orders);
        std::thread::spawn(move || {
            // Until the emulator is gone.
            while tell(&orders, &ToAgent::Pulse).is_ok() {
                std::thread::sleep(PULSE);
            }
        });
    }

    /// An error together with what the outer guest said last.
    fn last_words(&self, error: anyhow::Error) -> anyhow::Error {
        let log = outer::console_tail(&self.log);
        error.context(format!("the outer guest's console ended with:\n{log}"))
    }

    fn receive(&mut self, deadline: Instant) -> anyhow::Result<FromAgent> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("no word from the outer guest in time");
        }
        self.port.set_read_timeout(Some(left))?;
        FromAgent::read(&mut self.port).context("reading from the outer guest")
    }
}

fn tell(orders: &Mutex<UnixStream>, order: &ToAgent) -> std::io::Result<()> {
    // A panic elsewhere leaves no half frame.
    order.write(&mut *orders.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Drop for Nested {
    fn drop(&mut self) {
        // Before another process may have its number.
        drop(self.guard.take());
        // After power_off it has been waited for, and both calls do nothing.
        let _ = self.emulator.kill();
        let _ = self.emulator.wait();
    }
}

/// What can be told to an agent: text, and not what kind of host this is.
fn environment(variables: impl Iterator<Item = (OsString, OsString)>) -> BTreeMap<String, String> {
    variables
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name != host::HOST)
        .collect()
}

impl Job {
    /// A command with this process's environment, the system's own tools in its PATH, and working folder.
    #[must_use]
    pub fn new(argv: &[&str], deadline: Duration) -> Self {
        Self {
            argv: argv.iter().map(|argument| (*argument).to_owned()).collect(),
            environment: environment(std::env::vars_os().chain([("PATH".into(), images::search_path())])),
            folder: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
            user: None,
            deadline,
        }
    }

    /// What differs in the outer guest's environment.
    #[must_use]
    pub fn nested_environment() -> BTreeMap<String, String> {
        let variables = [
            ("TMPDIR", "/run/tmp"),
            ("XDG_RUNTIME_DIR", "/run/user/0"),
            (host::NESTED, "1"),
        ];
        variables
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into()
    }

    /// The same command for the outer guest, as this user (root if none).
    #[must_use]
    pub fn for_nested(mut self, user: Option<u32>) -> Self {
        self.environment.extend(Self::nested_environment());
        if let Some(user) = user {
            self.environment
                .insert("XDG_RUNTIME_DIR".to_owned(), format!("/run/user/{user}"));
        }
        self.user = user;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// A runner with no machine, and its agent's end of the port.
    fn machine() -> anyhow::Result<(Nested, UnixStream)> {
        let (port, agent) = UnixStream::pair()?;
        let emulator = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        Ok((Nested::of(emulator, port, tempfile::tempfile()?)?, agent))
    }

    #[test]
    fn one_that_does_not_come_up_is_tried_once_more_and_then_has_a_pulse() {
        let mut agents = Vec::new();
        let nested = Nested::come_up(|| {
            let (nested, mut agent) = machine()?;
            match agents.len() {
                // The first ends at once.
                0 => agent.shutdown(std::net::Shutdown::Both)?,
                _ => FromAgent::Ready.write(&mut agent)?,
            }
            agents.push(agent);
            Ok(nested)
        })
        .unwrap();
        assert_eq!(agents.len(), 2);
        agents[1].set_read_timeout(Some(100 * PULSE)).unwrap();
        for _ in 0..3 {
            assert!(matches!(ToAgent::read(&mut agents[1]).unwrap(), ToAgent::Pulse));
        }
        drop(nested);
    }

    #[test]
    fn variables_that_are_no_text_are_left_out() {
        use std::os::unix::ffi::OsStringExt;
        let variables = [
            ("A", b"1".to_vec()),
            ("B", vec![0xff]),
            (host::HOST, b"none".to_vec()),
        ];
        let variables = variables.map(|(name, value)| (name.into(), OsString::from_vec(value)));
        let kept = environment(variables.into_iter());
        assert_eq!(kept, BTreeMap::from([("A".to_owned(), "1".to_owned())]));
    }

    #[test]
    fn the_end_of_the_console_is_told() {
        let mut log = tempfile::tempfile().unwrap();
        assert_eq!(outer::console_tail(&log), "");
        log.write_all(&[vec![b'x'; 10_000], b"last words".to_vec()].concat())
            .unwrap();
        let tail = outer::console_tail(&log);
        assert!(tail.ends_with("xlast words") && tail.len() < 5000);
    }

    #[test]
    fn a_second_failure_is_an_error() {
        let mut started = 0;
        let nested = Nested::come_up(|| {
            started += 1;
            machine().map(|(nested, _)| nested)
        });
        assert!(nested.is_err());
        assert_eq!(started, 2);
    }
}
