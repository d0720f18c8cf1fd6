//! TAPs that cannot be had: what the message says, and which field it names.

use super::bad_input::says;
use anyhow::{Result, bail, ensure};
use integration_tests::{
    artifacts::Artifact,
    demo::peer::Peer,
    host::Host,
    process::inherit_at,
    suite::{Skip, artifact, test},
    tap::open_as,
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::{
    libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_VNET_HDR},
    unistd::Uid,
};
use std::{fs::File, os::fd::OwnedFd, path::Path, process::Command, time::Duration};
use vm_spec::control::exit_code;

/// The descriptor that launchers inherit.
const FD: i32 = 9;

const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("bad_input::tap_busy_by_name", busy_by_name),
        test("bad_input::tap_of_several_queues_busy", several_queues_busy),
        test("bad_input::tap_missing", missing),
        test("bad_input::tap_busy_by_fd", busy_by_fd),
        test("bad_input::tap_fd_is_no_tap", no_tap),
        test("bad_input::tap_fd_of_other_frames", other_frames),
        test("bad_input::tap_fds_of_two_taps", two_taps),
        test("bad_input::tap_fd_is_not_open", not_open),
        test("bad_input::tap_mtu_is_too_large", too_large),
        test("bad_input::tap_of_a_larger_mtu", larger_mtu),
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
    says(
        Run::by(command, tempfile::tempdir()?, &flags)?,
        exit_code::ERROR,
        words,
    )
}

fn busy_by_name() -> Result<()> {
    Host::need_tun()?;
    let words = ["net[0].tap: ", "'tap0'", "is busy", "another VM uses it"];
    beside(&Peer::start("")?, "tap0", &words)
}

/// The kernel would let anyone have one more of its queues.
fn several_queues_busy() -> Result<()> {
    need_own_tap()?;
    let tap = format!("bhq{}", std::process::id());
    let _queue = open_as(&tap, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE)?;
    let up = Command::new("ip").args(["link", "set", &tap, "up"]).status()?;
    ensure!(up.success(), "{up}");
    for queues in ["", ",queues=2"] {
        let flags = [kernel()?, format!("--net=tap={tap}{queues}")];
        let words = ["net[0].tap: ", "is busy", "another VM uses it"];
        let command = Command::new(artifact(Artifact::Bulkhead)?);
        says(
            Run::by(command, tempfile::tempdir()?, &flags)?,
            exit_code::ERROR,
            &words,
        )?;
    }
    Ok(())
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

/// Without virtio-net headers, behind four bytes about the protocol, or without Ethernet headers.
fn other_frames() -> Result<()> {
    need_own_tap()?;
    let words = ["net[0].tap-fd: ", "descriptor 9", "bare frames", "IFF_NO_PI"];
    let right = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    for flags in [
        right & !IFF_VNET_HDR,
        right & !IFF_NO_PI,
        IFF_TUN | IFF_NO_PI | IFF_VNET_HDR,
    ] {
        inheriting(
            Some(open_as(&format!("bhw{}", std::process::id()), flags)?),
            1,
            &words,
        )?;
    }
    Ok(())
}

fn two_taps() -> Result<()> {
    need_own_tap()?;
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
    let name = |letter| format!("bh{letter}{}", std::process::id());
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    inherit_at(&mut command, open_as(&name('x'), flags)?, FD)?;
    inherit_at(&mut command, open_as(&name('y'), flags)?, FD + 1)?;
    let net = format!("--net=tap-fd={FD},tap-fd={},queues=2", FD + 1);
    let words = ["net[0].tap-fd: ", "two interfaces", "IFF_MULTI_QUEUE"];
    says(
        Run::by(command, tempfile::tempdir()?, &[kernel()?, net])?,
        exit_code::ERROR,
        &words,
    )
}

/// Goes on only where this process can make a TAP.
fn need_own_tap() -> Result<()> {
    Host::need_kvm()?;
    Host::need_tun()?;
    if !Uid::effective().is_root() {
        bail!(Skip("only root can make a TAP of the host's".to_owned()));
    }
    Ok(())
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

fn larger_mtu() -> Result<()> {
    need_own_tap()?;
    let tap = format!("bhm{}", std::process::id());
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
    // One queue of it is ours, so that it stays.
    let _queue = open_as(&tap, flags)?;
    let command = Command::new(artifact(Artifact::Bulkhead)?);
    let nics = [
        format!("--net=tap={tap},mtu=1400"),
        "--net=tap=nosuch0".to_owned(),
    ];
    let flags = [vec![kernel()?], nics.to_vec()].concat();
    let words = [
        "net[0].mtu: 1400 is below",
        "1500",
        "ip link set bhm",
        "net[1].tap",
    ];
    says(
        Run::by(command, tempfile::tempdir()?, &flags)?,
        exit_code::ERROR,
        &words,
    )
}

/// The launcher with `fd` as its descriptor [`FD`], and as many NICs on that.
fn inheriting(fd: Option<OwnedFd>, nics: usize, words: &[&str]) -> Result<()> {
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    if let Some(fd) = fd {
        inherit_at(&mut command, fd, FD)?;
    }
    let mut flags = vec![kernel()?];
    flags.extend(std::iter::repeat_n(format!("--net=tap-fd={FD}"), nics));
    says(
        Run::by(command, tempfile::tempdir()?, &flags)?,
        exit_code::ERROR,
        words,
    )
}

fn kernel() -> Result<String> {
    Ok(format!("--kernel={}", artifact(Artifact::TinyGuest)?.display()))
}
