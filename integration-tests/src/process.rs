//! Child processes of tests: started with a socket at fd 3, never left behind, always waited for
//! with a deadline.

use anyhow::{Context, Result, bail, ensure};
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Between two looks at something that has no event to wait for.
const LOOK: Duration = Duration::from_millis(5);

/// Where the descriptors wait that children inherit.
const FIRST_SPARE: i32 = 200;

/// Runs `ip` (package iproute2) in this thread's network namespace; `arguments` are split at blanks.
///
/// # Errors
/// With what it complained about.
pub fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .context("ip (package iproute2)")?;
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "ip {arguments}: {complaint}");
    Ok(())
}

/// Waits until `path` is there: a socket that is only looked for, where a connection would count.
///
/// # Errors
/// When it does not appear before `deadline` has passed.
pub fn wait_for(path: &Path, deadline: Duration) -> Result<()> {
    let end = Instant::now() + deadline;
    while !path.exists() {
        ensure!(Instant::now() < end, "{} does not appear", path.display());
        thread::sleep(LOOK);
    }
    Ok(())
}

/// A child process; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stderr: File,
}

impl Process {
    /// Starts `command` with stdin null and stderr in a file of its own.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(command: Command) -> Result<Self> {
        Self::start_with_input(command, Stdio::null())
    }

    /// As [`Process::start`], with another stdin.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_with_input(mut command: Command, input: Stdio) -> Result<Self> {
        let stderr = tempfile::tempfile()?;
        let child = command
            .stdin(input)
            .stderr(stderr.try_clone()?)
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self { child, stderr })
    }

    /// Starts `command` with one end of a socketpair as its fd 3; returns the other end.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_with_socket(mut command: Command) -> Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        inherit_at(&mut command, theirs.into(), 3)?;
        Ok((Self::start(command)?, ours))
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends `signal`.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("cannot send {signal}"))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it still runs after `deadline`.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(
                Instant::now() < end,
                "process {} still runs after {deadline:?}",
                self.pid()
            );
            thread::sleep(LOOK);
        }
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn alive(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// What it has written to stderr so far.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn stderr(&self) -> Result<String> {
        // Not `read`: the child's own writes go on from the offset that a read would move.
        let mut text = vec![0; usize::try_from(self.stderr.metadata()?.len())?];
        self.stderr.read_exact_at(&mut text, 0)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only where the child is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process as `/proc` lists it, that no later one is mistaken for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Listed {
    /// Its process id.
    pub pid: i32,
    /// In clock ticks since boot (`proc_pid_stat(5)`, field 22).
    pub started: u64,
    /// Its parent's process id.
    pub parent: i32,
}

impl Listed {
    /// The process `pid`, unless it is over: gone, or a zombie that its parent has yet to reap.
    ///
    /// A process whose first thread alone is a zombie is not over: the other threads still hold
    /// its memory, its files and their locks.
    #[must_use]
    pub fn find(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before may hold anything, blanks and parentheses too.
        let (_, rest) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        (*fields.first()? != "Z" || number(17)? > 1).then_some(())?;
        Some(Self {
            pid,
            started: number(19)?,
            parent: number(1)?.try_into().ok()?,
        })
    }
}

/// What each thread of process `pid` does, a line each: for the words of a test that failed.
#[must_use]
pub fn threads(pid: i32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let lines = tasks.into_iter().flatten().flatten().map(|task| {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        let (_, rest) = stat.rsplit_once(") ").unwrap_or_default();
        let field = |at| rest.split(' ').nth(at).unwrap_or_default();
        format!(
            "{pid} {}: {} in {:?}, user {} system {} ticks\n",
            read("comm").trim_end(),
            field(0),
            read("wchan"),
            field(11),
            field(12)
        )
    });
    lines.collect()
}

/// Makes `fd` the child's fd `number` (below `FIRST_SPARE`).
///
/// # Errors
/// When no descriptor is left.
#[expect(unsafe_code, reason = "runs code between fork and exec")]
pub fn inherit_at(command: &mut Command, fd: OwnedFd, number: i32) -> Result<()> {
    ensure!(number < FIRST_SPARE, "fd {number}");
    // Out of the way of every number that is asked for: no dup2 closes what another one needs.
    let raw = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(FIRST_SPARE))?;
    // SAFETY: fcntl has just made this descriptor.
    let spare = unsafe { OwnedFd::from_raw_fd(raw) };
    let install = move || {
        // SAFETY: async-signal-safe, touches no memory.
        if unsafe { libc::dup2(spare.as_raw_fd(), number) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: the closure makes only the call above and allocates nothing.
    unsafe { command.pre_exec(install) };
    Ok(())
}

/// Connects to the socket that a process started by hand listens on.
///
/// # Errors
/// When nobody listens there before `deadline` has passed.
pub fn connect(path: &Path, deadline: Duration) -> Result<UnixStream> {
    let end = Instant::now() + deadline;
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(error) if Instant::now() >= end => bail!("nobody listens on {}: {error}", path.display()),
            Err(_) => thread::sleep(LOOK),
        }
    }
}
