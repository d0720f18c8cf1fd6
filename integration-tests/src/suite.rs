//! Tests with a deadline each, that may say at run time why they cannot run here.

use crate::artifacts::{Artifact, Artifacts};
use anyhow::{Result, anyhow};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::sys::signal::{SigHandler, Signal, signal};
use std::{
    path::Path,
    process::ExitCode,
    sync::{OnceLock, mpsc},
    thread,
    time::Duration,
};

/// `off` in the environment: what is under test runs with no jail around it, so that a failure can be
/// told apart from one of the jail.
pub const JAIL: &str = "BULKHEAD_JAIL";

/// Whether [`JAIL`] is off.
#[must_use]
pub fn jail_is_off() -> bool {
    std::env::var_os(JAIL).is_some_and(|value| value == "off")
}

/// The flags of `bulkhead run` for it.
#[must_use]
pub fn jail_flags() -> &'static [&'static str] {
    if jail_is_off() { &["--jail=off"] } else { &[] }
}

/// What device processes and the vmm are told that are started by hand.
#[must_use]
pub fn seccomp_flag() -> &'static str {
    if jail_is_off() {
        "--seccomp=off"
    } else {
        "--seccomp=enforce"
    }
}

/// For tests of the jail itself.
///
/// # Errors
/// [`Skip`] where it is off.
pub fn need_jail() -> Result<()> {
    if jail_is_off() {
        return Err(Skip("the jail is off".to_owned()).into());
    }
    Ok(())
}

/// Everything is to be tried, and the strict limits hold: `cargo verify --full`.
#[must_use]
pub fn full() -> bool {
    std::env::var_os(crate::verify::FULL).is_some()
}

/// For tests that start processes and wait for them.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// This host lacks what the test needs.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Skip(pub String);

/// A test of at most [`DEADLINE`].
pub fn test(name: impl Into<String>, body: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    test_within(DEADLINE, name, body)
}

/// A test of at most `deadline`. One that hangs fails; its thread is left behind.
pub fn test_within(
    deadline: Duration,
    name: impl Into<String>,
    body: impl FnOnce() -> Result<()> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || {
        let (sender, receiver) = mpsc::channel();
        let thread = thread::spawn(move || {
            // Fails only when the deadline has passed and nobody listens.
            let _ = sender.send(body());
        });
        let result = match receiver.recv_timeout(deadline) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(anyhow!("the test still runs after {deadline:?}")),
            Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
                Err(panic) => Err(anyhow!("the test panicked: {}", text(panic.as_ref()))),
                Ok(()) => Err(anyhow!("the test ended without a result")),
            },
        };
        match result {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => match error.downcast_ref::<Skip>() {
                Some(skip) => Ok(Completion::ignored_with(skip)),
                None => Err(Failed::from(format!("{error:#}"))),
            },
        }
    })
}

fn text(panic: &(dyn std::any::Any + Send)) -> String {
    let literal = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    literal
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default()
}

/// Runs the tests that the command line asks for.
#[must_use]
pub fn run(tests: Vec<Trial>) -> ExitCode {
    heed_signals();
    libtest_mimic::run(&Arguments::from_args(), tests).exit_code()
}

/// Signals of a terminal end what tests start, which inherits what becomes of them, also where whoever runs the tests
/// has them ignored (`nohup`, a script's `&`).
#[expect(unsafe_code, reason = "sets what signals do")]
fn heed_signals() {
    for each in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP] {
        // SAFETY: the default runs no code of ours.
        let _ = unsafe { signal(each, SigHandler::SigDfl) };
    }
}

/// Where `artifact` is.
///
/// # Errors
/// When it is missing; as [`artifacts`].
pub fn artifact(artifact: Artifact) -> Result<&'static Path> {
    Ok(artifacts()?.path(artifact)?)
}

/// All of them; the first call builds them unless `BULKHEAD_BIN_DIR` says where they are.
///
/// # Errors
/// They cannot be built.
pub fn artifacts() -> Result<&'static Artifacts> {
    static ARTIFACTS: OnceLock<Result<Artifacts, String>> = OnceLock::new();
    let artifacts =
        ARTIFACTS.get_or_init(|| Artifacts::locate().map_err(|error| format!("{:#}", anyhow!(error))));
    artifacts.as_ref().map_err(|error| anyhow!(error.clone()))
}
