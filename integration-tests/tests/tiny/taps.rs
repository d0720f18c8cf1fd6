//! TAPs that cannot be had: what the message says, and which field it names.

use super::bad_input::says;
use anyhow::{Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    demo::peer::Peer,
    host::Host,
    process::inherit_at,
    suite::{artifact, test},
    tiny::Run,
};
use libtest_mimic::Trial;
use std::{fs::File, os::fd::OwnedFd, path::Path, process::Command, time::Duration};

/// The descriptor that launchers inherit.
const FD: i32 = 9;

const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("bad_input::tap_busy_by_name", busy_by_name),
        test("bad_input::tap_missing", missing),
        test("bad_input::tap_busy_by_fd", busy_by_fd),
        test("bad_input::tap_fd_is_no_tap", no_tap),
        test("bad_input::tap_fd_is_not_open", not_open),
        test("bad_input::tap_mtu_is_too_large", too_large),
    ]
}

/// The launcher in the network namespace of a process that holds the TAP `tap0`.
fn beside(peer: &Peer, tap: &str, words: &[&str]) -> Result<()> {
    let mut command = Command::new("nsenter");
    command
        .args([&format!("--target={}", peer.pid()), "--user", "--net"])
        .args(["--preserve-credentials", "--"])
        .arg(artifact(Artifact::Bulkhead)?);
    let flags = [kernel()?, format!("--net=tap={tap}")];
    says(Run::by(command, tempfile::tempdir()?, &flags)?, words)
}

fn busy_by_name() -> Result<()> {
    Host::need_tun()?;
    let words = ["net[0].tap: ", "'tap0'", "is busy", "another VM uses it"];
    beside(&Peer::start("")?, "tap0", &words)
}

fn missing() -> Result<()> {
    Host::need_tun()?;
    let words = ["net[0].tap: ", "no interface 'tap7'", "ip tuntap add"];
    beside(&Peer::start("")?, "tap7", &words)
}

/// Two NICs on one TAP would each take the other's frames.
fn busy_by_fd() -> Result<()> {
    Host::need_tun()?;
    let peer = Peer::start("")?;
    let words = ["net[1].tap-fd: ", "descriptor 9", "is busy", "a TAP of its own"];
    inheriting(Some(peer.tap.try_clone()?), 2, &words)
}

fn no_tap() -> Result<()> {
    Host::need_kvm()?;
    let words = ["net[0].tap-fd: ", "descriptor 9", "no TAP", "TUNSETIFF"];
    inheriting(Some(File::open(Path::new("/dev/null"))?.into()), 1, &words)?;
    Host::need_tun()?;
    // Open, but attached to no interface yet.
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    inheriting(Some(tun.into()), 1, &words)
}

fn not_open() -> Result<()> {
    Host::need_kvm()?;
    inheriting(None, 1, &["net[0].tap-fd: ", "descriptor 9", "not open"])
}

/// What the host has is not the reason, so that nobody is sent to look for it.
fn too_large() -> Result<()> {
    Host::need_kvm()?;
    Host::need_tun()?;
    let flags = [kernel()?, "--net=private=10.213.7.1/24,mtu=65535".to_owned()];
    let mut run = Run::with_flags(&flags)?;
    let status = run.wait(DEADLINE)?;
    let message = run.process.stderr()?;
    ensure!(status.code() == Some(1), "{status}: {message}");
    ensure!(
        message.contains("net[0].private: cannot make a TAP") && message.contains("set the MTU"),
        "{message}"
    );
    ensure!(!message.contains("hint"), "{message}");
    Ok(())
}

/// The launcher with `fd` as its descriptor [`FD`], and as many NICs on that.
fn inheriting(fd: Option<OwnedFd>, nics: usize, words: &[&str]) -> Result<()> {
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    if let Some(fd) = fd {
        inherit_at(&mut command, fd, FD)?;
    }
    let mut flags = vec![kernel()?];
    flags.extend(std::iter::repeat_n(format!("--net=tap-fd={FD}"), nics));
    says(Run::by(command, tempfile::tempdir()?, &flags)?, words)
}

fn kernel() -> Result<String> {
    Ok(format!("--kernel={}", artifact(Artifact::TinyGuest)?.display()))
}
