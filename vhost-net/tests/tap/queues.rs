//! Several queues, and a TAP that comes as an open file descriptor.

use crate::frames::{Path, pattern};
use crate::guest::{Buffers, DEADLINE, Guest, MERGEABLE};
use crate::host::Host;
use crate::namespace::{TestTap, ip, text};
use crate::{BINARY, Case, Device};
use anyhow::{Context, Result, ensure};
use integration_tests::process::{Process, inherit_at};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};
use vhost_net::header::NetHeader;
use vhost_net::tap::Tap;
use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_ERR, VIRTIO_NET_F_MQ, VIRTIO_NET_OK};

pub const ALL: &[Case] = &[
    (
        "each_pair_carries_frames_once_it_is_asked_for",
        each_pair_carries_frames,
    ),
    (
        "without_a_control_queue_all_pairs_are_used",
        without_a_control_queue,
    ),
    (
        "a_driver_of_one_pair_finds_its_control_queue",
        a_driver_of_one_pair,
    ),
    (
        "a_frame_that_waits_does_not_reach_a_pair_given_up",
        a_frame_that_waits,
    ),
    (
        "a_driver_that_changes_pairs_or_address_for_ever_is_slowed",
        changes_for_ever,
    ),
    ("an_inherited_tap_and_socket", an_inherited_tap_and_socket),
    ("an_inherited_fd_that_is_no_tap", an_inherited_fd_that_is_no_tap),
];

const EVERYTHING: u64 = !0;
const CONTROL: usize = 4;
/// Without a frame for so long, no more are on their way.
const GAP: Duration = Duration::from_millis(700);
pub const FEW: Buffers = Buffers {
    count: 64,
    ..MERGEABLE
};

pub fn pairs_set(pairs: u16) -> Vec<u8> {
    let mut command = vec![VIRTIO_NET_CTRL_MQ as u8, 0];
    command.extend(pairs.to_le_bytes());
    command
}

/// Sends flows of many ports to the guest; how many of their frames arrive on the pair in use.
pub fn arriving(guest: &mut Guest, host: &Host, path: &Path, flows: u16) -> Result<u16> {
    for port in 0..flows {
        host.send(
            &[0; 10],
            &path.udp([1000 + port, 7], &pattern(100, port.into()), true),
        )?;
    }
    let mut count = 0;
    while guest.receive(GAP).is_ok() {
        count += 1;
    }
    Ok(count)
}

fn each_pair_carries_frames() -> Result<()> {
    let device = Device::on(TestTap::new(" multi_queue")?, &["--num-queues=4"])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let mut guest = Guest::with_queues(device.connect()?, EVERYTHING, FEW, 5)?;
    let config = guest.session.config(8, 2)?;
    ensure!(config == [2, 0], "max_virtqueue_pairs {config:?}");
    guest.post(FEW.count)?;
    let path = Path::to_guest(&device.tap);
    ensure!(
        arriving(&mut guest, &host, &path, 50)? == 50,
        "all flows to the only pair in use"
    );
    for bad in [
        pairs_set(0),
        pairs_set(3),
        vec![4, 0, 1],
        vec![9, 9, 9, 9],
        vec![],
    ] {
        let bad = if bad.is_empty() { vec![0] } else { bad };
        ensure!(
            u32::from(guest.control(CONTROL, &bad)?) == VIRTIO_NET_ERR,
            "{bad:?}"
        );
    }
    ensure!(u32::from(guest.control(CONTROL, &pairs_set(2))?) == VIRTIO_NET_OK);
    let first = arriving(&mut guest, &host, &path, 50)?;
    ensure!((1..50).contains(&first), "{first} of 50 flows on the first pair");
    // The other flows' frames wait for buffers on the second.
    guest.use_pair(1);
    guest.post(FEW.count)?;
    let second = arriving(&mut guest, &host, &path, 0)?;
    ensure!(first + second == 50, "{first} and {second} of 50 flows");
    let sent = Path::to_host(&device.tap).udp([1, 2], &pattern(100, 1), true);
    guest.send(NetHeader::default(), &sent)?;
    ensure!(host.receive(DEADLINE)?.1 == sent, "transmit on the second pair");
    // Back to one pair and to two again, with no kick in between.
    ensure!(u32::from(guest.control(CONTROL, &pairs_set(1))?) == VIRTIO_NET_OK);
    ensure!(
        arriving(&mut guest, &host, &path, 20)? == 0,
        "a flow on a pair not in use"
    );
    ensure!(u32::from(guest.control(CONTROL, &pairs_set(2))?) == VIRTIO_NET_OK);
    let second = arriving(&mut guest, &host, &path, 50)?;
    ensure!(
        (1..50).contains(&second),
        "{second} of 50 flows on the second pair"
    );
    Ok(())
}

fn a_driver_of_one_pair() -> Result<()> {
    let device = Device::on(TestTap::new(" multi_queue")?, &["--num-queues=4"])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let path = Path::to_guest(&device.tap);
    let features = EVERYTHING & !(1 << VIRTIO_NET_F_MQ);
    let mut guest = Guest::with_queues(device.connect()?, features, FEW, 3)?;
    guest.post(FEW.count)?;
    let promiscuous_off = guest.control(2, &[0, 0, 0])?;
    ensure!(u32::from(promiscuous_off) == VIRTIO_NET_OK);
    ensure!(arriving(&mut guest, &host, &path, 50)? == 50, "all flows");
    // The next driver may take all pairs.
    drop(guest);
    let mut guest = Guest::with_queues(device.connect()?, EVERYTHING, FEW, 5)?;
    guest.use_pair(1);
    guest.post(FEW.count)?;
    ensure!(u32::from(guest.control(CONTROL, &pairs_set(2))?) == VIRTIO_NET_OK);
    let second = arriving(&mut guest, &host, &path, 50)?;
    ensure!(
        (1..50).contains(&second),
        "{second} of 50 flows on the second pair"
    );
    Ok(())
}

fn a_frame_that_waits() -> Result<()> {
    let device = Device::on(TestTap::new(" multi_queue")?, &["--num-queues=4"])?;
    ip(&format!("link set {} mtu 9000", device.tap.name))?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let path = Path::to_guest(&device.tap);
    let send = || {
        (0..20).try_for_each(|port| host.send(&[0; 10], &path.udp([1000 + port, 7], &pattern(4000, 1), true)))
    };
    let mut guest = Guest::with_queues(device.connect()?, EVERYTHING, FEW, 5)?;
    ensure!(u32::from(guest.control(CONTROL, &pairs_set(2))?) == VIRTIO_NET_OK);
    guest.use_pair(1);
    // A buffer that a frame does not fit in: the first on this pair waits for more.
    guest.post(1)?;
    send()?;
    ensure!(guest.receive(GAP).is_err(), "a frame without room for it");
    ensure!(u32::from(guest.control(CONTROL, &pairs_set(1))?) == VIRTIO_NET_OK);
    guest.post(10)?;
    ensure!(guest.receive(GAP).is_err(), "a frame on a pair that was given up");
    ensure!(u32::from(guest.control(CONTROL, &pairs_set(2))?) == VIRTIO_NET_OK);
    send()?;
    guest.receive(DEADLINE).map(drop)
}

fn changes_for_ever() -> Result<()> {
    let device = Device::on(TestTap::new(" multi_queue")?, &["--num-queues=4"])?;
    let mut guest = Guest::with_queues(device.connect()?, EVERYTHING, FEW, 5)?;
    let start = Instant::now();
    for pairs in [2, 1].repeat(50) {
        ensure!(u32::from(guest.control(CONTROL, &pairs_set(pairs))?) == VIRTIO_NET_OK);
    }
    // 32 of them at once, the others at 100 a second.
    let elapsed = start.elapsed();
    ensure!(
        elapsed > Duration::from_millis(600),
        "100 changes took {elapsed:?}"
    );
    // Of the address, too.
    let device = Device::start(&["--guard=off"])?;
    let mut guest = Guest::with_queues(device.connect()?, EVERYTHING, FEW, 3)?;
    let start = Instant::now();
    for last in 0..100 {
        ensure!(u32::from(guest.control(2, &[1, 1, 2, 0, 0, 0, 0, last])?) == VIRTIO_NET_OK);
    }
    let elapsed = start.elapsed();
    ensure!(
        elapsed > Duration::from_millis(600),
        "100 addresses took {elapsed:?}"
    );
    Ok(())
}

fn without_a_control_queue() -> Result<()> {
    let device = Device::on(TestTap::new(" multi_queue")?, &["--num-queues=4"])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let mut guest = Guest::with_queues(device.connect()?, EVERYTHING, FEW, 4)?;
    guest.post(FEW.count)?;
    let path = Path::to_guest(&device.tap);
    let first = arriving(&mut guest, &host, &path, 50)?;
    guest.use_pair(1);
    guest.post(FEW.count)?;
    let second = arriving(&mut guest, &host, &path, 0)?;
    ensure!(
        first + second == 50 && first > 0 && second > 0,
        "{first} and {second}"
    );
    Ok(())
}

fn an_inherited_tap_and_socket() -> Result<()> {
    let tap = TestTap::new("")?;
    let open = Tap::open(&tap.name, 1)?.pop().context("no TAP")?;
    let mut command = Command::new(BINARY.get().context("no binary")?);
    let mac = format!("--mac={}", text(&tap.guest_mac()));
    command.args(["--fd=3", "--tap-fd=4", &mac]);
    inherit_at(&mut command, open.as_fd().try_clone_to_owned()?, 4)?;
    drop(open);
    let (mut process, socket) = Process::start_with_socket(command)?;
    let mut guest = Guest::start(socket, EVERYTHING, MERGEABLE)?;
    tap.wait_up()?;
    let host = Host::new(&tap.name, tap.host_mac())?;
    let sent = Path::to_host(&tap).udp([1, 2], &pattern(100, 1), true);
    guest.send(NetHeader::default(), &sent)?;
    ensure!(host.receive(DEADLINE)?.1 == sent);
    let sent = Path::to_guest(&tap).udp([1, 2], &pattern(100, 2), true);
    host.send(&[0; 10], &sent)?;
    ensure!(guest.receive(DEADLINE)?.1 == sent);
    // The end of the socket is the end of the process.
    drop(guest);
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    Ok(())
}

fn an_inherited_fd_that_is_no_tap() -> Result<()> {
    let mut command = Command::new(BINARY.get().context("no binary")?);
    command.args(["--fd=3", "--tap-fd=4"]);
    inherit_at(&mut command, std::fs::File::open("/dev/null")?.into(), 4)?;
    let (mut process, _socket) = Process::start_with_socket(command)?;
    let status = process.wait(DEADLINE)?;
    let log = process.stderr()?;
    ensure!(
        status.code() == Some(1) && log.contains("TUNGETIFF"),
        "{status}: {log}"
    );
    Ok(())
}
