//! Frames through a TAP and back.

use anyhow::{Context, Result, ensure};
use guest_contract::{FRAME_LENGTH, GUEST_FRAMES, HOST_FRAMES, frame_number, write_frame};
use integration_tests::{
    artifacts::Artifact,
    frontend_harness::{DEADLINE, NetDriver, Options, Session, virtio},
    process::{Process, inherit_at},
    suite::{artifact, seccomp_flag, test},
    tiny::Tap,
};
use libtest_mimic::Trial;
use std::process::Command;

const FRAMES: u64 = 500;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// VIRTIO_NET_F_MAC: without the offloads and mergeable buffers, a frame is one plain buffer.
const FEATURE_MAC: u64 = 1 << 5;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("net::echo_plain", || echo(0)),
        test("net::echo_event_idx", || echo(virtio::EVENT_IDX)),
        test("net::echo_indirect", || echo(virtio::INDIRECT_DESC)),
    ]
}

/// The command line of a process that serves this TAP, without the socket.
pub(crate) fn command(tap: &Tap) -> Result<Command> {
    let mut command = Command::new(artifact(Artifact::VhostUserNet)?);
    command.arg(seccomp_flag());
    command.args(["--tap-fd=4", "--mac=02:00:00:00:00:02"]);
    inherit_at(&mut command, tap.fd.try_clone()?, 4)?;
    Ok(command)
}

/// Both queues, with these ring features.
pub(crate) fn options(features: u64) -> Options {
    Options {
        queues: 2,
        features: FEATURE_MAC | features,
        ..Options::default()
    }
}

/// Sends a test frame; once the device has taken it, it works.
pub(crate) fn send(driver: &mut NetDriver, number: u64) -> Result<()> {
    let mut frame = [0; FRAME_LENGTH];
    write_frame(&mut frame, [0xFF; 6], MAC, GUEST_FRAMES, number);
    driver.send(&frame, DEADLINE)
}

fn echo(features: u64) -> Result<()> {
    let tap = Tap::new()?;
    let echo = tap.echo()?;
    let mut command = command(&tap)?;
    command.arg("--fd=3");
    let (mut process, socket) = Process::start_with_socket(command)?;
    let options = options(features);
    let session = Session::start(socket, &options)
        .with_context(|| format!("stderr: {}", process.stderr().unwrap_or_default()))?;
    ensure!(
        session.features & features == features,
        "ring features are not offered"
    );
    let mut driver = NetDriver::new(session)?;
    ensure!(driver.session.config(0, 6)? == MAC, "another MAC");
    for number in 0..FRAMES {
        send(&mut driver, number)?;
        // The host's own traffic (IPv6 discovery) may come between.
        while frame_number(&driver.receive(DEADLINE)?, HOST_FRAMES) != Some(number) {}
    }
    let (count, _) = echo.stop()?;
    ensure!(count == FRAMES, "{count} frames came to the host");
    drop(driver);
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    Ok(())
}
