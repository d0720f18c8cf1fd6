//! What is installed works from where it is installed.

use anyhow::{Context, Result, ensure};
use integration_tests::artifacts::{Artifact, BIN_DIR};
use integration_tests::install::{Place, install};
use integration_tests::suite::{artifacts, test};
use libtest_mimic::Trial;
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("install::under_a_prefix", under_a_prefix),
        test("install::for_a_package", for_a_package),
        test("install::for_all_whatever_the_umask", for_all_whatever_the_umask),
    ]
}

fn run(program: &Path, argument: &str) -> Result<Output> {
    let output = Command::new(program).arg(argument).output()?;
    ensure!(
        output.status.success(),
        "{} {argument}: {output:?}",
        program.display()
    );
    Ok(output)
}

/// Every discovery file names a back end that says it is of that type.
fn discovered(folder: &Path, types: &[&str]) -> Result<()> {
    let mut seen = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let about: Value = serde_json::from_slice(&std::fs::read(entry?.path())?)?;
        let binary = about["binary"].as_str().context("no binary")?;
        let said: Value = serde_json::from_slice(&run(Path::new(binary), "--print-capabilities")?.stdout)?;
        ensure!(said["type"] == about["type"], "{said} is not {about}");
        seen.push(about["type"].as_str().unwrap_or_default().to_owned());
    }
    seen.sort();
    ensure!(seen == types, "{seen:?}");
    Ok(())
}

fn under_a_prefix() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let place = Place {
        prefix: folder.path().to_owned(),
        destdir: None,
    };
    // The second time over the first.
    install(artifacts()?, &place)?;
    let files = install(artifacts()?, &place)?;
    ensure!(files.iter().all(|file| file.exists()), "{files:?}");
    discovered(&folder.path().join("share/qemu/vhost-user"), &["block", "net"])?;
    run(&folder.path().join("bin/bulkhead"), "--version")?;
    for back_end in ["vhost-user-blk", "vhost-user-net"] {
        run(&folder.path().join("bin").join(back_end), "--print-capabilities")?;
    }
    Ok(())
}

fn for_a_package() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let place = Place {
        prefix: "/opt/b".into(),
        destdir: Some(folder.path().to_owned()),
    };
    let files = install(artifacts()?, &place)?;
    let inside = folder.path().join("opt/b");
    ensure!(files.iter().all(|file| file.starts_with(&inside)), "{files:?}");
    let about = inside.join("share/qemu/vhost-user/50-bulkhead-blk.json");
    let about: Value = serde_json::from_slice(&std::fs::read(about)?)?;
    ensure!(
        about["binary"] == "/opt/b/libexec/bulkhead/vhost-user-blk",
        "{about}"
    );
    run(&inside.join("bin/bulkhead"), "--version")?;
    let relative = Place {
        prefix: "opt".into(),
        destdir: None,
    };
    ensure!(install(artifacts()?, &relative).is_err(), "a relative prefix");
    Ok(())
}

fn for_all_whatever_the_umask() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let prefix = folder.path().join("prefix");
    let binaries = folder.path().join("binaries");
    std::fs::create_dir(&binaries)?;
    for program in Artifact::ALL {
        std::fs::write(binaries.join(program.name()), "")?;
    }
    let mut shell = Command::new("sh");
    shell
        .args([
            "-c",
            "umask 077; exec \"$0\" --prefix \"$1\"",
            env!("CARGO_BIN_EXE_install"),
        ])
        .arg(&prefix)
        .env(BIN_DIR, &binaries);
    let output = shell.output()?;
    ensure!(output.status.success(), "{output:?}");
    for inside in ["", "bin", "libexec/bulkhead", "share/qemu/vhost-user"] {
        let mode = prefix.join(inside).metadata()?.permissions().mode() & 0o777;
        ensure!(mode == 0o755, "{inside}: {mode:o}");
    }
    Ok(())
}
