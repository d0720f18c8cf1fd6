//! `bulkhead upgrade` in the middle of a storm.

use crate::storm::{DEADLINE, Image, Storm, strict};
use anyhow::{Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    suite::{artifact, test_within},
};
use libtest_mimic::Trial;
use std::{path::Path, process::Output, thread, time::Duration};
use vm_spec::events::EventKind;

pub(crate) fn tests() -> Vec<Trial> {
    let limit = Duration::from_secs(150);
    let mut tests: Vec<_> = [Image::Raw, Image::Qcow2]
        .into_iter()
        .map(|image| {
            let name = format!("upgrade::there_and_back_{}", image.name());
            test_within(limit, name, move || there_and_back(image))
        })
        .collect();
    tests.push(test_within(limit, "upgrade::falls_back", falls_back));
    tests
}

/// `bulkhead upgrade` on the storm's VM.
pub(crate) fn upgrade(storm: &Storm, arguments: &[&str], binary: &Path) -> Result<Output> {
    let mut command = storm.run.verb("upgrade", arguments)?;
    Ok(command.arg("--binary").arg(binary).output()?)
}

/// Between two builds, several times.
fn there_and_back(image: Image) -> Result<()> {
    Host::need_kvm()?;
    let mut storm = Storm::start(image, "disk0", None)?;
    let builds = [Artifact::FaultyBlk, Artifact::VhostUserBlk];
    let mut times = 0;
    for build in builds.into_iter().cycle().take(10) {
        thread::sleep(Duration::from_millis(200));
        let output = upgrade(&storm, &[], artifact(build)?)?;
        ensure!(output.status.success(), "{output:?}");
        times += 1;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let upgraded = storm
            .victim
            .wait_count(&storm.run, EventKind::Upgraded, times, DEADLINE)?;
        ensure!(said.contains(&format!("-> {},", upgraded.pid)), "{said}");
    }
    let calm = storm.calm()?;
    let only = calm.events.iter().all(|event| event.event == EventKind::Upgraded);
    ensure!(only, "{:?}", calm.events);
    let mut stalls: Vec<_> = calm.events.iter().map(|event| event.took_us).collect();
    stalls.sort_unstable();
    println!(
        "{}: {times} upgrades; the guest waited, in us: {stalls:?}",
        image.name()
    );
    let (median, most) = if strict() {
        (50_000, 250_000)
    } else {
        (500_000, 5_000_000)
    };
    ensure!(
        stalls[stalls.len() / 2] < median && stalls[stalls.len() - 1] < most,
        "an upgrade took too long"
    );
    Ok(())
}

/// A program that is no device process, and a file that is no program: the old build serves on.
fn falls_back() -> Result<()> {
    Host::need_kvm()?;
    let mut storm = Storm::start(Image::Qcow2, "disk0", None)?;
    let wrong = [artifact(Artifact::VhostUserNet)?, artifact(Artifact::TinyGuest)?];
    for (binary, tries) in wrong.into_iter().zip(1..) {
        let output = upgrade(&storm, &["disk0"], binary)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{output:?}");
        ensure!(said.contains("not upgraded"), "{said}");
        let restarted = storm
            .victim
            .wait_count(&storm.run, EventKind::Restarted, tries, DEADLINE)?;
        ensure!(restarted.took_us > 0, "{restarted:?}");
    }
    let missing = upgrade(&storm, &["disk7"], wrong[0])?;
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    ensure!(!missing.status.success() && said.contains("disk7"), "{said}");
    let calm = storm.calm()?;
    let upgraded = calm
        .events
        .iter()
        .find(|event| event.event == EventKind::Upgraded);
    ensure!(upgraded.is_none(), "{upgraded:?}");
    Ok(())
}
