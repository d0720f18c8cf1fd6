//! The runner's side inside the outer guest: takes commands, runs them, tells how they went.
//!
//! Every program that uses the nested runner is also its agent: the outer guest sees the host's
//! files, so that its init starts the very program that booted it, which finds [`AGENT_FLAG`] as
//! its first argument. As process 1 it starts itself once more as the worker and reaps whatever
//! is orphaned; when the worker ends, or its port reports that the runner is gone, the machine is
//! powered off.

use super::wire::{Ended, FromAgent, Job, PORT_NAME, Stream, ToAgent};
use crate::interrupt;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// First argument that turns a program into the agent.
pub const AGENT_FLAG: &str = "--nested-agent";
/// First argument of the worker that the agent, as process 1, starts.
const WORKER_FLAG: &str = "--nested-worker";
/// How long the outer guest may take to learn that the runner is there.
const RUNNER_DEADLINE: Duration = Duration::from_secs(20);
/// Between two looks for it.
const RUNNER_LOOK: Duration = Duration::from_millis(50);
/// How long a command's output may stay open after the command itself ended (a daemon that it
/// left behind may hold the pipe).
const OUTPUT_GRACE: Duration = Duration::from_secs(2);

/// Becomes the agent if the command line says so, and then never returns. Every program that
/// boots the nested runner calls this first in its `main`.
pub fn intercept() {
    match std::env::args().nth(1).as_deref() {
        Some(AGENT_FLAG) => init(),
        Some(WORKER_FLAG) => std::process::exit(i32::from(worker().is_err())),
        _ => {}
    }
}

/// Process 1: starts the worker, reaps, powers off.
fn init() -> ! {
    let worker = std::env::current_exe().and_then(|program| Command::new(program).arg(WORKER_FLAG).spawn());
    match worker {
        Ok(worker) => reap_until(Pid::from_raw(worker.id().cast_signed())),
        Err(error) => eprintln!("nested: cannot start the worker: {error}"),
    }
    nix::unistd::sync();
    let error = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
    // Ending process 1 panics the kernel, which ends the emulator as well.
    eprintln!("nested: cannot power off: {error:?}");
    std::process::exit(1)
}

fn reap_until(worker: Pid) {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) if pid == worker => return,
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_) => return,
        }
    }
}

fn worker() -> std::io::Result<()> {
    let mut port = open_port()?;
    wait_for_runner(&port, RUNNER_DEADLINE)?;
    let answers = Arc::new(Mutex::new(port.try_clone()?));
    say(&answers, &FromAgent::Ready)?;
    loop {
        match ToAgent::read(&mut port)? {
            ToAgent::PowerOff => return Ok(()),
            ToAgent::Pulse => {}
            ToAgent::Run(job) => {
                let answers = Arc::clone(&answers);
                // The runner sends the next one when this has ended. That it is gone is read above.
                std::thread::spawn(move || {
                    make_runtime_folder(&job);
                    let ended = run(&job, &to_port(&answers));
                    let _ = say(&answers, &FromAgent::Ended(ended));
                });
            }
        }
    }
}

/// A port says that its other end is closed until the runner's is known to be open. A write would wait for ever where
/// the runner is gone already.
fn wait_for_runner(port: &impl AsFd, limit: Duration) -> std::io::Result<()> {
    let until = Instant::now() + limit;
    loop {
        let mut fds = [PollFd::new(port.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO)?;
        let closed = |events: PollFlags| events.contains(PollFlags::POLLHUP);
        if !fds[0].revents().is_some_and(closed) {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(std::io::ErrorKind::NotConnected.into());
        }
        // That it is closed is said at once: there is nothing to wait for.
        std::thread::sleep(RUNNER_LOOK);
    }
}

/// `/run/user/UID` for a command of an ordinary user; the command itself will say if it is missing.
fn make_runtime_folder(job: &Job) {
    if let Some(user) = job.user {
        let folder = format!("/run/user/{user}");
        let _ = std::fs::create_dir(&folder);
        let _ = std::os::unix::fs::chown(&folder, Some(user), Some(user));
    }
}

/// The port's device node, found by the name that the emulator gave it.
fn open_port() -> std::io::Result<File> {
    for entry in std::fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            let device = std::path::Path::new("/dev").join(entry.file_name());
            return File::options().read(true).write(true).open(device);
        }
    }
    Err(std::io::Error::new(
        std::io::ErrorKind::NotFound,
        "no port named after the runner",
    ))
}

fn say(port: &Mutex<File>, message: &FromAgent) -> std::io::Result<()> {
    // The lock only keeps frames whole; a panic elsewhere leaves no half frame.
    message.write(&mut *port.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Takes a command's output from two threads.
type Sink = Arc<dyn Fn(Stream, &[u8]) -> std::io::Result<()> + Send + Sync>;

fn to_port(answers: &Arc<Mutex<File>>) -> Sink {
    let answers = Arc::clone(answers);
    Arc::new(move |stream, bytes: &[u8]| say(&answers, &FromAgent::Output(stream, bytes.to_vec())))
}

/// Runs a command on this very system, under the same watch as in the outer guest.
pub fn run_here(job: &Job, output: &mut dyn FnMut(Stream, &[u8])) -> Ended {
    let (sender, messages) = std::sync::mpsc::channel::<FromAgent>();
    let pieces = sender.clone();
    let sink: Sink = Arc::new(move |stream, bytes: &[u8]| {
        pieces
            .send(FromAgent::Output(stream, bytes.to_vec()))
            .map_err(std::io::Error::other)
    });
    let job = job.clone();
    std::thread::spawn(move || sender.send(FromAgent::Ended(run(&job, &sink))));
    // A process that the command left behind may hold its output: its end is what counts.
    for message in messages {
        match message {
            FromAgent::Output(stream, bytes) => output(stream, &bytes),
            FromAgent::Ended(ended) => return ended,
            FromAgent::Ready => {}
        }
    }
    Ended::NotStarted("the thread that watches it panicked".to_owned())
}

fn run(job: &Job, sink: &Sink) -> Ended {
    let [program, arguments @ ..] = job.argv.as_slice() else {
        return Ended::NotStarted("an empty command".to_owned());
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(&job.environment)
        .current_dir(&job.folder);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(user) = job.user {
        command.uid(user).gid(user);
    }
    match interrupt::start_group(&mut command) {
        Ok((child, _guard)) => finish(child, job.deadline, sink),
        Err(error) => Ended::NotStarted(format!("{program}: {error}")),
    }
}

fn finish(mut child: Child, deadline: Duration, sink: &Sink) -> Ended {
    let group = Pid::from_raw(child.id().cast_signed());
    let open = Arc::new(Outputs::default());
    let out = child
        .stdout
        .take()
        .map(|pipe| forward(pipe, Stream::Out, sink, &open));
    let err = child
        .stderr
        .take()
        .map(|pipe| forward(pipe, Stream::Err, sink, &open));
    let watchdog = Watchdog::start(group, deadline);
    let status = child.wait();
    let timed_out = watchdog.stop();
    open.wait_closed(OUTPUT_GRACE);
    drop((out, err));
    match status {
        _ if timed_out => Ended::TimedOut,
        Ok(status) => how(status),
        Err(error) => Ended::NotStarted(error.to_string()),
    }
}

fn how(status: ExitStatus) -> Ended {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ended::Exited(code),
        (None, signal) => Ended::Signalled(signal.unwrap_or(0)),
    }
}

/// How many of the command's two outputs are open.
#[derive(Default)]
struct Outputs {
    open: Mutex<usize>,
    closed: Condvar,
}

impl Outputs {
    fn wait_closed(&self, limit: Duration) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.closed.wait_timeout_while(open, limit, |open| *open > 0));
    }

    fn change(&self, by: isize) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        *open = open.saturating_add_signed(by);
        self.closed.notify_all();
    }
}

fn forward(
    mut pipe: impl Read + Send + 'static,
    stream: Stream,
    sink: &Sink,
    open: &Arc<Outputs>,
) -> JoinHandle<()> {
    let (sink, open) = (Arc::clone(sink), Arc::clone(open));
    open.change(1);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length @ 1..) = pipe.read(&mut buffer) {
            if sink(stream, &buffer[..length]).is_err() {
                break;
            }
        }
        open.change(-1);
    })
}

/// Kills a process group when time is up.
struct Watchdog {
    done: Arc<(Mutex<bool>, Condvar)>,
    thread: JoinHandle<bool>,
}

impl Watchdog {
    fn start(group: Pid, limit: Duration) -> Self {
        let done = Arc::new((Mutex::new(false), Condvar::new()));
        let watched = Arc::clone(&done);
        let until = Instant::now() + limit;
        let thread = std::thread::spawn(move || {
            let (flag, changed) = &*watched;
            let flag = flag.lock().unwrap_or_else(PoisonError::into_inner);
            let left = until.saturating_duration_since(Instant::now());
            let late = changed
                .wait_timeout_while(flag, left, |done| !*done)
                .is_ok_and(|(_, wait)| wait.timed_out());
            if late {
                let _ = killpg(group, Signal::SIGKILL);
            }
            late
        });
        Self { done, thread }
    }

    /// Whether it had to kill.
    fn stop(self) -> bool {
        *self.done.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.done.1.notify_all();
        self.thread.join().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_runner_that_is_gone_is_not_waited_for_for_ever() {
        let (port, runner) = UnixStream::pair().unwrap();
        wait_for_runner(&port, Duration::ZERO).unwrap();
        drop(runner);
        let error = wait_for_runner(&port, 3 * RUNNER_LOOK).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::NotConnected);
    }
}
