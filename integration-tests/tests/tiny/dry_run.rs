//! `run --dry-run`, which looks and leaves everything as it is.

use crate::net::{kept, segment};
use crate::verbs::{bulkhead, expect};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    suite::{artifact, test},
    tiny::Run,
};
use libtest_mimic::Trial;
use std::{
    fs::{self, File, Permissions},
    io::ErrorKind,
    net::TcpListener,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    process::Command,
    time::Duration,
};

const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("verbs::a_dry_run_keeps_a_capture", keeps_a_capture),
        test("verbs::a_dry_run_beside_its_vm", beside_its_vm),
        test("verbs::a_dry_run_starts_nothing", starts_nothing),
    ]
}

fn kernel() -> Result<String> {
    Ok(format!("--kernel={}", artifact(Artifact::TinyGuest)?.display()))
}

/// What a VM has captured is not lost by a look at how it would run.
fn keeps_a_capture() -> Result<()> {
    Host::need_kvm()?;
    Host::need_tun()?;
    let folder = tempfile::tempdir()?;
    let capture = folder.path().join("capture");
    fs::write(&capture, "frames")?;
    let net = format!("--net=private=10.213.7.1/24,pcap={}", capture.display());
    let output = bulkhead(folder.path(), &["run", "--dry-run", &kernel()?, &net])?;
    ensure!(expect(&output, 0)?.contains("vhost-user-net"), "{output:?}");
    ensure!(fs::read(&capture)? == b"frames", "the capture was emptied");
    fs::remove_file(&capture)?;
    let output = bulkhead(folder.path(), &["run", "--dry-run", &kernel()?, &net])?;
    ensure!(expect(&output, 0)?.contains("vhost-user-net"), "{output:?}");
    ensure!(!capture.exists(), "a capture was made");
    let net = format!(
        "--net=private=10.213.7.1/24,pcap={}/no/capture",
        folder.path().display()
    );
    let output = bulkhead(folder.path(), &["run", "--dry-run", &kernel()?, &net])?;
    expect(&output, 1)?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(words.contains("net[0].pcap: cannot write"), "{words}");
    Ok(())
}

/// A VM that has its images and its ports is in nobody's way.
fn beside_its_vm() -> Result<()> {
    Host::need_tun()?;
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    File::create(&disk)?.set_len(16 << 20)?;
    let mut flags = vec![
        format!("--disk=path={},format=raw", disk.display()),
        "--net=private=10.213.9.1/24".to_owned(),
    ];
    if Host::need_passt().is_ok() {
        // Freed at once: nobody else asks for it within this test.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        flags.push(format!("--net=user,publish=127.0.0.1:{port}:80"));
    }
    let mut run = Run::tiny("scenario=hlt", &flags)?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    let kernel = kernel()?;
    let mut words = vec!["run", "--dry-run", &kernel];
    words.extend(flags.iter().map(String::as_str));
    let output = bulkhead(folder.path(), &words)?;
    ensure!(expect(&output, 0)?.contains("vhost-user-blk"), "{output:?}");
    ensure!(run.process.alive()?, "the VM is over");
    Ok(())
}

/// No passt (but to ask it what it can), no keeper of a segment, no connection, no run-time folder.
fn starts_nothing() -> Result<()> {
    Host::need_kvm()?;
    Host::need_tun()?;
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let passt = path("passt");
    fs::write(
        &passt,
        format!("#!/bin/sh\necho \"$@\" >> {}\n", path("calls").display()),
    )?;
    fs::set_permissions(&passt, Permissions::from_mode(0o755))?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let back_end = UnixListener::bind(path("socket"))?;
    back_end.set_nonblocking(true)?;
    let name = segment("dry");
    let output = Command::new(artifact(Artifact::Bulkhead)?)
        .args(["run", "--dry-run", &kernel()?])
        .arg(format!(
            "--net=user,publish=127.0.0.1:{}:80",
            taken.local_addr()?.port()
        ))
        .arg(format!("--net=isolated={name}"))
        .arg(format!("--net=vhost-user={}", path("socket").display()))
        .env("PATH", folder.path())
        .env("XDG_RUNTIME_DIR", path("runtime"))
        .output()?;
    expect(&output, 0)?;
    ensure!(!kept(&name)?, "a keeper was started");
    let calls = fs::read_to_string(path("calls"))?;
    ensure!(
        calls.lines().all(|call| call == "--help"),
        "passt was called with {calls}"
    );
    let connected = back_end.accept().map(drop).map_err(|e| e.kind());
    ensure!(connected == Err(ErrorKind::WouldBlock), "{connected:?}");
    ensure!(!path("runtime").exists(), "a run-time folder was made");
    Ok(())
}
