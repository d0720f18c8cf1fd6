//! Rate limits, against the clock.

use crate::frames::{L4, Path, pattern};
use crate::guest::{DEADLINE, Guest, MERGEABLE};
use crate::host::Host;
use crate::namespace::TestTap;
use crate::{Case, Device};
use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};
use vhost_net::header::{F_NEEDS_CSUM, GSO_TCPV4, NetHeader};
use zerocopy::IntoBytes;

pub const ALL: &[Case] = &[
    ("transmit_keeps_its_packet_rate", transmit_keeps_its_packet_rate),
    ("each_packet_of_a_super_frame_counts", each_packet_counts),
    ("one_pair_of_two_has_the_whole_rate", one_pair_of_two),
    ("transmit_keeps_its_byte_rate", transmit_keeps_its_byte_rate),
    ("receive_keeps_its_packet_rate", receive_keeps_its_packet_rate),
    ("receive_keeps_its_byte_rate", receive_keeps_its_byte_rate),
];

/// At least what the rate takes, and not much more on a busy machine.
fn took(start: Instant, wanted: Duration) -> Result<()> {
    let elapsed = start.elapsed();
    ensure!(
        elapsed >= wanted.mul_f64(0.98),
        "{elapsed:?} is faster than {wanted:?}"
    );
    ensure!(
        elapsed <= wanted.mul_f64(1.5),
        "{elapsed:?} is slower than {wanted:?}"
    );
    Ok(())
}

const PACKETS: &str = "--transmit-limit=packets=500,packets-burst=10";

fn transmit_keeps_its_packet_rate() -> Result<()> {
    let device = Device::start(&[PACKETS])?;
    let guest = Guest::start(device.connect()?, !0, MERGEABLE)?;
    sends_at_its_rate(&device, guest)
}

fn each_packet_counts() -> Result<()> {
    let device = Device::start(&[PACKETS])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let mut guest = Guest::start(device.connect()?, !0, MERGEABLE)?;
    let (header, frame) = super_frame(Path::to_host(&device.tap));
    let start = Instant::now();
    for _ in 0..26 {
        guest.queue(header, &frame, 1)?;
    }
    guest.flush()?;
    // 20 packets each; the burst has paid for ten, and the debt of the last is not waited for.
    took(start, Duration::from_millis(490 * 2))?;
    for _ in 0..26 {
        host.receive(DEADLINE)?;
    }
    Ok(())
}

/// Of 20 packets.
fn super_frame(path: Path) -> (NetHeader, Vec<u8>) {
    let header = NetHeader {
        flags: F_NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54.into(),
        gso_size: 100.into(),
        csum_start: (L4 as u16).into(),
        csum_offset: 16.into(),
        ..NetHeader::default()
    };
    (header, path.tcp(1, &pattern(2000, 1)))
}

fn one_pair_of_two() -> Result<()> {
    let device = Device::on(TestTap::new(" multi_queue")?, &["--num-queues=4", PACKETS])?;
    let guest = Guest::with_queues(device.connect()?, !0, MERGEABLE, 4)?;
    sends_at_its_rate(&device, guest)
}

fn sends_at_its_rate(device: &Device, mut guest: Guest) -> Result<()> {
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let frame = Path::to_host(&device.tap).udp([1, 2], &pattern(100, 1), true);
    let start = Instant::now();
    for _ in 0..13 {
        for _ in 0..40 {
            guest.queue(NetHeader::default(), &frame, 1)?;
        }
        guest.flush()?;
    }
    took(start, Duration::from_millis(510 * 2))?;
    for _ in 0..520 {
        host.receive(DEADLINE)?;
    }
    Ok(())
}

fn transmit_keeps_its_byte_rate() -> Result<()> {
    let device = Device::start(&["--transmit-limit=bytes=200000,bytes-burst=2000"])?;
    let mut guest = Guest::start(device.connect()?, !0, MERGEABLE)?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let frame = Path::to_host(&device.tap).udp([1, 2], &pattern(958, 1), true);
    ensure!(frame.len() == 1000);
    let start = Instant::now();
    for _ in 0..6 {
        for _ in 0..34 {
            guest.queue(NetHeader::default(), &frame, 1)?;
        }
        guest.flush()?;
    }
    // The debt of the last is not waited for.
    took(start, Duration::from_millis(201 * 5))?;
    for _ in 0..204 {
        host.receive(DEADLINE)?;
    }
    Ok(())
}

/// Frames of one packet, and of several.
fn receive_keeps_its_packet_rate() -> Result<()> {
    let device = Device::start(&["--receive-limit=packets=500,packets-burst=10"])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let mut guest = Guest::start(device.connect()?, !0, MERGEABLE)?;
    let path = Path::to_guest(&device.tap);
    let whole = path.udp([1, 2], &pattern(100, 1), true);
    let (header, frame) = super_frame(path);
    let start = Instant::now();
    for _ in 0..250 {
        host.send(&[0; 10], &whole)?;
    }
    for _ in 0..13 {
        host.send(header.as_bytes().first_chunk().context("a header")?, &frame)?;
    }
    for _ in 0..250 + 13 {
        guest.receive(DEADLINE)?;
    }
    // 20 packets of each of the last; the burst has paid for ten, and the debt of the last is not waited for.
    took(start, Duration::from_millis((250 + 12 * 20 - 10) * 2))
}

fn receive_keeps_its_byte_rate() -> Result<()> {
    let device = Device::start(&["--receive-limit=bytes=200000,bytes-burst=2000"])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let mut guest = Guest::start(device.connect()?, !0, MERGEABLE)?;
    let frame = Path::to_guest(&device.tap).udp([1, 2], &pattern(958, 1), true);
    ensure!(frame.len() == 1000);
    let start = Instant::now();
    for _ in 0..202 {
        host.send(&[0; 10], &frame)?;
    }
    for _ in 0..202 {
        guest.receive(DEADLINE)?;
    }
    took(start, Duration::from_secs(1))
}
