//! Orders to a running VM's disk process: `bulkhead resize` and `bulkhead metrics`.

use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    suite::{artifact, test},
    tiny::{Events, Run},
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::{
    fs::{self, File},
    process::{Command, Output},
    time::Duration,
};
use vm_spec::events::EventKind;
use vm_spec::run_state::ProcessRole;

const DEADLINE: Duration = Duration::from_secs(20);
const DISK: u64 = 16 << 20;

pub(crate) fn tests() -> Vec<Trial> {
    vec![test("orders::a_disk_grows_and_tells", grows)]
}

/// `bulkhead VERB test WORDS...`.
fn order(run: &Run, verb: &str, words: &[&str]) -> Result<Output> {
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    command.args([verb, "test"]).args(words);
    Ok(command.env("XDG_RUNTIME_DIR", run.folder()).output()?)
}

fn said(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(err)
    )
}

/// A successor takes orders as its predecessor did.
fn grows() -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    File::create(&disk)?.set_len(DISK)?;
    let flags = [
        format!("--disk=path={},format=raw", disk.display()),
        "--power-off-grace=1".to_owned(),
    ];
    let mut run = Run::tiny("scenario=hlt", &flags)?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    let output = order(&run, "resize", &["disk0", "32M"])?;
    ensure!(output.status.success(), "{}", said(&output));
    ensure!(fs::metadata(&disk)?.len() == 2 * DISK, "it did not grow");
    let state = run.state(DEADLINE)?;
    let process = state.processes.iter().find(|p| p.role == ProcessRole::Disk);
    kill(
        Pid::from_raw(process.context("no disk process")?.pid),
        Signal::SIGKILL,
    )?;
    Events::default().wait(&run, DEADLINE, |event| event.event == EventKind::Restarted)?;
    let output = order(&run, "resize", &["disk0", "48M"])?;
    ensure!(output.status.success(), "{}", said(&output));
    ensure!(fs::metadata(&disk)?.len() == 3 * DISK, "it did not grow again");
    let output = order(&run, "metrics", &["disk0"])?;
    ensure!(
        output.status.success() && said(&output).contains("# TYPE ") && said(&output).contains("# EOF"),
        "{}",
        said(&output)
    );
    for (words, why) in [
        (["disk0", "1M"], "size: "),
        (["disk7", "64M"], "no disk 'disk7'"),
        (["net0", "64M"], "no disk 'net0'"),
    ] {
        let output = order(&run, "resize", &words)?;
        ensure!(
            output.status.code() == Some(1) && said(&output).contains(why),
            "{words:?}: {}",
            said(&output)
        );
    }
    ensure!(
        fs::metadata(&disk)?.len() == 3 * DISK,
        "a refused order was obeyed"
    );
    Ok(())
}
