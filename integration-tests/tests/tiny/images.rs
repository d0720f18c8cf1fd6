//! `bulkhead image`, beside what is compared with qemu-img: how it ends, and what it refuses.

use super::verbs::{bulkhead, expect};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    process::Process,
    suite::{artifact, test},
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};
use vm_spec::control::exit_code;

const DEADLINE: Duration = Duration::from_secs(20);
/// Between two looks at a folder.
const LOOK: Duration = Duration::from_millis(2);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("images::an_interrupted_one_is_removed", interrupted),
        test("images::a_check_that_failed_is_no_verdict", unchecked),
        test("images::only_qcow2_has_a_shape", shapeless),
        test("images::snapshots_for_programs", snapshots),
        test("images::no_disk_is_smaller_than_nothing", too_small),
    ]
}

/// Nobody takes half a copy for a disk; who has the signal ignored gets a whole one.
fn interrupted() -> Result<()> {
    let place = tempfile::tempdir()?;
    let path = |name: &str| place.path().join(name);
    fs::write(path("a.raw"), vec![7; 128 << 20])?;
    for (shell, signal, code) in [
        ("exec \"$@\"", Signal::SIGINT, 130),
        ("exec \"$@\"", Signal::SIGTERM, 143),
        ("trap '' HUP; exec \"$@\"", Signal::SIGHUP, 0),
    ] {
        let mut command = Command::new("sh");
        command
            .args(["-c", shell, "sh"])
            .arg(artifact(Artifact::Bulkhead)?)
            .args(["image", "convert"])
            .args([path("a.raw"), path("b.qcow2")]);
        let mut process = Process::start(command)?;
        let end = Instant::now() + DEADLINE;
        while !path("b.qcow2").exists() {
            ensure!(process.alive()? && Instant::now() < end, "{}", process.stderr()?);
            thread::sleep(LOOK);
        }
        process.signal(signal)?;
        let status = process.wait(DEADLINE)?;
        ensure!(
            status.code() == Some(code),
            "{signal}: {status}: {}",
            process.stderr()?
        );
        ensure!(path("b.qcow2").exists() == (code == 0), "{signal}: half a copy");
    }
    Ok(())
}

/// 2 says that an image is corrupt, which nobody has looked at.
fn unchecked() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a");
    fs::write(&path, "")?;
    let path = path.to_str().context("no name")?;
    for words in [
        [path].as_slice(),
        &["--bad", path],
        &[path, "--format=dmg"],
        &["b.qcow2"],
        &[],
    ] {
        let words = [&["image", "check"], words].concat();
        expect(&bulkhead(folder.path(), &words)?, exit_code::ERROR)?;
    }
    for (words, code) in [
        (["image", "check", "--help"], 0),
        (["image", "info", path], exit_code::USAGE),
        (["image", "info", "--bad"], exit_code::USAGE),
    ] {
        expect(&bulkhead(folder.path(), &words)?, code)?;
    }
    Ok(())
}

/// What cannot be obeyed is refused, and makes no file.
fn shapeless() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (raw, other) = (path("a.raw"), path("b.raw"));
    for words in [
        ["create", &raw, "10M", "--cluster-size=64K"],
        ["create", &raw, "10M", "--lazy-refcounts"],
    ] {
        let words = [["image"].as_slice(), &words].concat();
        expect(&bulkhead(folder.path(), &words)?, exit_code::USAGE)?;
        ensure!(
            !folder.path().join("a.raw").exists(),
            "{words:?}: a file was made"
        );
    }
    expect(&bulkhead(folder.path(), &["image", "create", &raw, "10M"])?, 0)?;
    let words = ["image", "convert", &raw, &other, "--cluster-size=64K"];
    expect(&bulkhead(folder.path(), &words)?, exit_code::USAGE)?;
    ensure!(!folder.path().join("b.raw").exists(), "a file was made");
    Ok(())
}

fn snapshots() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.qcow2").to_string_lossy().into_owned();
    let image = |words: &[&str]| expect(&bulkhead(folder.path(), &[&["image"], words].concat())?, 0);
    image(&["create", &path, "10M"])?;
    let list = || -> Result<Value> {
        Ok(serde_json::from_str(&image(&[
            "snapshot", "--list", "--json", &path,
        ])?)?)
    };
    ensure!(list()? == serde_json::json!([]), "there are some already");
    image(&["snapshot", "--create=first", &path])?;
    let (alone, info) = (list()?, image(&["info", "--json", &path])?);
    let info: Value = serde_json::from_str(&info)?;
    ensure!(
        alone[0]["name"] == "first" && alone == info["snapshots"],
        "{alone} {info}"
    );
    let words = ["image", "snapshot", "--create=second", "--json", &path];
    expect(&bulkhead(folder.path(), &words)?, exit_code::USAGE)?;
    Ok(())
}

fn too_small() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.qcow2").to_string_lossy().into_owned();
    expect(&bulkhead(folder.path(), &["image", "create", &path, "1G"])?, 0)?;
    let output = bulkhead(folder.path(), &["image", "resize", "--shrink", &path, "-5G"])?;
    expect(&output, exit_code::USAGE)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains("it has 1G"), "{said}");
    Ok(())
}
