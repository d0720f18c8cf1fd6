//! Ctrl-C, and what ends a command like it, end what the command has started, and remove what it has made.
//!
//! What runs in a process group of its own does not hear of a terminal's Ctrl-C, and nobody drops anything in a process
//! that a signal ends: all that must not stay is listed here meanwhile.

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, kill, killpg, raise, signal};
use nix::unistd::Pid;
use std::fs;
use std::io::{PipeReader, Read, Result};
use std::os::fd::IntoRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Signals that end a command.
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
/// How often a folder is removed in which somebody makes files meanwhile.
const ATTEMPTS: usize = 100;

/// Where the handler writes which signal came.
static WAKE: AtomicI32 = AtomicI32::new(-1);
/// All that must not stay.
static LISTED: Mutex<Vec<Listed>> = Mutex::new(Vec::new());
/// Held by whoever puts things in order before the command ends.
static ORDER: Mutex<()> = Mutex::new(());

#[derive(Clone, PartialEq, Eq, Debug)]
enum Listed {
    Group(Pid),
    Process(Pid),
    Folder(PathBuf),
}

/// One thing on the list, until this is dropped.
#[derive(Debug)]
pub struct Guard(Listed);

impl Drop for Guard {
    fn drop(&mut self) {
        let mut listed = lock(&LISTED);
        if let Some(at) = listed.iter().position(|one| *one == self.0) {
            listed.swap_remove(at);
        }
    }
}

/// A lock that says nothing about data: whoever panicked has left none half-way.
fn lock<T>(mutex: &'static Mutex<T>) -> MutexGuard<'static, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on such a signal ends all that is listed, and then this process as it would have. One that is ignored
/// (`nohup`, a script's `&`) stays so.
///
/// # Errors
/// The system's.
#[expect(unsafe_code, reason = "sets what signals do")]
pub fn heed() -> Result<()> {
    let (wakes, wake) = std::io::pipe()?;
    WAKE.store(wake.into_raw_fd(), Ordering::Release);
    std::thread::Builder::new().spawn(move || end(wakes))?;
    for each in SIGNALS {
        // SAFETY: the handler makes one async-signal-safe call and keeps errno.
        let before = unsafe { signal(each, SigHandler::Handler(note)) }?;
        if matches!(before, SigHandler::SigIgn) {
            // SAFETY: to ignore runs no code of ours.
            unsafe { signal(each, before) }?;
        }
    }
    Ok(())
}

#[expect(unsafe_code, reason = "the handler writes to a pipe by its number")]
extern "C" fn note(number: i32) {
    let before = Errno::last_raw();
    let byte = number as u8;
    // SAFETY: one byte from the stack, to the pipe that `heed` made, which nobody closes.
    unsafe { libc::write(WAKE.load(Ordering::Acquire), (&raw const byte).cast(), 1) };
    Errno::set_raw(before);
}

fn end(mut wakes: PipeReader) {
    let mut byte = [0];
    if wakes.read_exact(&mut byte).is_err() {
        return;
    }
    let _order = lock(&ORDER);
    // Never given back: nothing more is started.
    let listed = lock(&LISTED);
    for one in &*listed {
        // What is gone already is no error.
        let _ = match one {
            Listed::Group(group) => killpg(*group, Signal::SIGKILL),
            Listed::Process(pid) => kill(*pid, Signal::SIGKILL),
            Listed::Folder(_) => Ok(()),
        };
    }
    for one in &*listed {
        if let Listed::Folder(folder) = one {
            let gone = |_: &usize| fs::remove_dir_all(folder).is_ok() || !folder.exists();
            let _ = (0..ATTEMPTS).find(gone);
        }
    }
    end_by(i32::from(byte[0]));
}

#[expect(unsafe_code, reason = "sets what a signal does")]
fn end_by(number: i32) -> ! {
    if let Ok(number) = Signal::try_from(number) {
        // SAFETY: the default runs no code of ours.
        let _ = unsafe { signal(number, SigHandler::SigDfl) };
        let _ = raise(number);
    }
    std::process::exit(128 + number)
}

/// Until what this returns is dropped a signal ends nothing.
pub fn hold() -> MutexGuard<'static, ()> {
    lock(&ORDER)
}

/// Lists a folder.
pub fn folder(path: impl Into<PathBuf>) -> Guard {
    list(&mut lock(&LISTED), Listed::Folder(path.into()))
}

/// Starts a process, which is listed.
///
/// # Errors
/// The system's.
pub fn start(command: &mut Command) -> Result<(Child, Guard)> {
    start_as(command, Listed::Process)
}

/// Starts a process in a group of its own, which is listed.
///
/// # Errors
/// The system's.
pub fn start_group(command: &mut Command) -> Result<(Child, Guard)> {
    start_as(command.process_group(0), Listed::Group)
}

fn start_as(command: &mut Command, kind: fn(Pid) -> Listed) -> Result<(Child, Guard)> {
    let mut listed = lock(&LISTED);
    let child = command.spawn()?;
    let pid = Pid::from_raw(child.id().cast_signed());
    Ok((child, list(&mut listed, kind(pid))))
}

fn list(listed: &mut Vec<Listed>, one: Listed) -> Guard {
    listed.push(one.clone());
    Guard(one)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nested::{Job, agent::run_here};
    use crate::process;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::process::ExitStatusExt;
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    /// Names a folder to the program that the test interrupts: this very one.
    const INTERRUPTED: &str = "BULKHEAD_TEST_INTERRUPTED";
    const DEADLINE: Duration = Duration::from_secs(10);

    /// The program that is interrupted: it has a folder, a job, and a process besides.
    fn interrupted(made: PathBuf) {
        heed().unwrap();
        fs::create_dir(&made).unwrap();
        let _folder = folder(made);
        let (child, _guard) = start(Command::new("sleep").arg("60")).unwrap();
        eprintln!("{}", child.id());
        let job = Job::new(&["sh", "-c", "echo $$; exec sleep 60"], 10 * DEADLINE);
        run_here(&job, &mut |_, bytes| std::io::stderr().write_all(bytes).unwrap());
    }

    #[test]
    fn what_was_started_and_made_ends_with_the_command() {
        if let Some(made) = std::env::var_os(INTERRUPTED) {
            return interrupted(made.into());
        }
        let scratch = tempfile::tempdir().unwrap();
        let made = scratch.path().join("made");
        let mut program = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "--nocapture",
                "interrupt::tests::what_was_started_and_made_ends_with_the_command",
            ])
            .env(INTERRUPTED, &made)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(program.stderr.take().unwrap()).lines();
        let started: Vec<i32> = said.take(2).map(|line| line.unwrap().parse().unwrap()).collect();
        let runs = || started.iter().any(|pid| process::Listed::find(*pid).is_some());
        assert!(made.exists() && runs());
        kill(Pid::from_raw(program.id().cast_signed()), Signal::SIGTERM).unwrap();
        assert_eq!(program.wait().unwrap().signal(), Some(Signal::SIGTERM as i32));
        assert!(!made.exists());
        let end = Instant::now() + DEADLINE;
        while runs() {
            assert!(Instant::now() < end, "{started:?} still run");
            std::thread::yield_now();
        }
    }
}
