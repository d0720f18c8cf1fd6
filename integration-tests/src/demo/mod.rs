//! `cargo demo`: a stock Debian guest in jailed processes, from nothing to power-off.
//!
//! Three processes make it. The outermost builds and stages everything ([`run`]); the demo
//! proper runs as an unprivileged user, on this host or in the nested runner ([`run_staged`]);
//! the TAP's other side is a process in namespaces of its own ([`peer`]).

pub mod peer;
mod stage;
mod table;
mod timeline;
mod user;
mod vm;

use crate::artifacts::{Artifacts, BIN_DIR, PROFILE};
use crate::host::Host;
use crate::interrupt;
use crate::nested::{self, Job, Nested};
use crate::scratch::Scratch;
use crate::setup::{self, Purpose};
use anyhow::{Context, bail};
use stage::Stage;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use user::DemoUser;

/// First argument of the demo proper, before the stage's folder.
pub const STAGED: &str = "staged";
/// The user of the nested demo where root started it: any user without privileges will do.
const NESTED_USER: u32 = 1000;
/// How long the demo proper may take in the nested runner.
const NESTED_DEADLINE: Duration = Duration::from_secs(420);

/// What a demo that went well says in its last line.
#[derive(Debug)]
pub struct Outcome {
    host: Host,
}

/// Builds, stages and runs the demo; the demo proper prints the last line.
///
/// # Errors
/// Something could not be installed, built or started, or the demo failed.
pub fn run() -> anyhow::Result<()> {
    interrupt::heed()?;
    let host = Host::detect()?;
    setup::install_missing(if host.runs_linux() {
        Purpose::Demo
    } else {
        Purpose::NestedDemo
    })?;
    setup::usual_umask();
    let artifacts = artifacts()?;
    let folder = Scratch::make("stage")?;
    let stage = Stage::fill(folder.path(), &artifacts)?;
    if host.runs_linux() {
        run_here(&stage)
    } else {
        eprintln!("demo: {}; using the nested runner", host.lack());
        run_nested(&stage)
    }
}

/// The demo proper: prints the console, the table, the timeline and the last line.
///
/// # Errors
/// Whatever did not go as it should.
pub fn run_staged(folder: &Path) -> anyhow::Result<()> {
    let outcome = vm::run(&Stage::at(folder))?;
    println!("demo: ok (host: {})", outcome.host);
    Ok(())
}

/// Release binaries, unless the environment names a profile or a folder.
fn artifacts() -> anyhow::Result<Artifacts> {
    if std::env::var_os(BIN_DIR).is_some() || std::env::var_os(PROFILE).is_some() {
        return Ok(Artifacts::locate()?);
    }
    eprintln!("demo: building the release binaries");
    Ok(Artifacts::build_shipped()?)
}

fn run_here(stage: &Stage) -> anyhow::Result<()> {
    let mut demo = Command::new(stage.demo());
    demo.arg(STAGED)
        .arg(stage.folder())
        .current_dir("/")
        .env("TMPDIR", "/tmp");
    // What was lent is taken back even if Ctrl-C ends the demo.
    let _order = interrupt::hold();
    let user = if nix::unistd::geteuid().is_root() {
        Some(DemoUser::make()?)
    } else {
        None
    };
    if let Some(user) = &user {
        demo.uid(user.id).gid(user.id);
    }
    let status = demo.status().context("cannot start the staged demo");
    drop(user);
    match status? {
        status if status.success() => Ok(()),
        status => bail!("the staged demo ended with {status}"),
    }
}

fn run_nested(stage: &Stage) -> anyhow::Result<()> {
    // Not this very program, whose path may be one that the outer kernel's command line cannot name.
    let options = nested::Options {
        agent: Some(stage.demo()),
        ..nested::Options::default()
    };
    let mut nested = Nested::boot(&options)?;
    let (demo, folder) = (stage.demo(), stage.folder());
    let argv = [demo.to_str(), Some(STAGED), folder.to_str()].map(|word| word.unwrap_or_default());
    let user = nix::unistd::geteuid();
    let user = if user.is_root() {
        NESTED_USER
    } else {
        user.as_raw()
    };
    let mut job = Job::new(&argv, NESTED_DEADLINE).for_nested(Some(user));
    job.folder = "/".into();
    let ended = nested.run_through(&job)?;
    nested.power_off()?;
    if ended.success() {
        Ok(())
    } else {
        bail!("the staged demo ended with {ended:?}")
    }
}
