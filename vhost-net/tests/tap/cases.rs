//! Frames both ways: checksums, segmentation, merged buffers, back-pressure, sessions.

use crate::frames::{L4, Path, UDP, checksum_is_right, pattern};
use crate::guest::{DEADLINE, Guest, LARGE, MERGEABLE};
use crate::host::Host;
use crate::namespace::ip;
use crate::{Case, Device};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;
use vhost_net::header::{F_NEEDS_CSUM, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NetHeader};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};

pub const ALL: &[Case] = &[
    ("plain_frames_both_ways", plain_frames_both_ways),
    ("checksums_both_ways", checksums_both_ways),
    ("ten_thousand_frames_each_way", ten_thousand_frames_each_way),
    (
        "ten_thousand_frames_with_event_idx_and_indirect",
        ten_thousand_frames_with_event_idx,
    ),
    ("super_frames_to_the_host", super_frames_to_the_host),
    (
        "the_longest_super_frame_to_the_host",
        the_longest_super_frame_to_the_host,
    ),
    ("udp_super_frames_both_ways", udp_super_frames_both_ways),
    ("super_frames_to_merged_buffers", super_frames_to_merged_buffers),
    ("super_frames_to_one_long_chain", super_frames_to_one_long_chain),
    (
        "without_offloads_the_kernel_finishes_frames",
        without_offloads_the_kernel_finishes_frames,
    ),
    ("frames_wait_for_buffers", frames_wait_for_buffers),
    (
        "a_frame_waits_for_enough_buffers",
        a_frame_waits_for_enough_buffers,
    ),
    (
        "what_only_the_driver_before_takes_is_dropped",
        what_only_the_driver_before_takes,
    ),
    ("no_frame_is_longer_than_the_mtu", no_frame_is_longer_than_the_mtu),
    ("configuration_space", configuration_space),
    ("one_front_end_after_another", one_front_end_after_another),
    (
        "a_multi_queue_tap_with_one_queue",
        a_multi_queue_tap_with_one_queue,
    ),
];

/// No ring features, and no offloads.
const PLAIN: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
/// All that the device has, save ring features.
const OFFLOADS: u64 = !((1 << 28) | (1 << 29));
const EVERYTHING: u64 = !0;
const MSS: u16 = 1448;

fn plain() -> NetHeader {
    NetHeader::default()
}

fn needs_checksum() -> NetHeader {
    NetHeader {
        flags: F_NEEDS_CSUM,
        csum_start: (L4 as u16).into(),
        csum_offset: 6.into(),
        ..NetHeader::default()
    }
}

pub fn tcp_segments() -> NetHeader {
    NetHeader {
        flags: F_NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: (L4 as u16 + 20).into(),
        gso_size: MSS.into(),
        csum_start: (L4 as u16).into(),
        csum_offset: 16.into(),
        ..NetHeader::default()
    }
}

fn host(device: &Device) -> Result<Host> {
    Host::new(&device.tap.name, device.tap.host_mac())
}

pub fn short(header: &NetHeader) -> [u8; 10] {
    let bytes = zerocopy::IntoBytes::as_bytes(header);
    std::array::from_fn(|at| bytes[at])
}

fn plain_frames_both_ways() -> Result<()> {
    let device = Device::start(&[])?;
    let host = host(&device)?;
    let mut guest = Guest::start(device.connect()?, PLAIN, MERGEABLE)?;
    for length in [18, 100, 1472] {
        let sent = Path::to_host(&device.tap).udp([1, 2], &pattern(length, 1), true);
        guest.send(plain(), &sent)?;
        ensure!(host.receive(DEADLINE)?.1 == sent, "{length} to the host");
        let sent = Path::to_guest(&device.tap).udp([3, 4], &pattern(length, 2), true);
        host.send(&[0; 10], &sent)?;
        let (header, frame) = guest.receive(DEADLINE)?;
        ensure!(frame == sent, "{length} to the guest");
        ensure!(
            header
                == NetHeader {
                    num_buffers: 1.into(),
                    ..plain()
                },
            "{header:?}"
        );
    }
    Ok(())
}

fn checksums_both_ways() -> Result<()> {
    let device = Device::start(&[])?;
    let server = UdpSocket::bind((Ipv4Addr::from(device.tap.host_ip()), 7000))?;
    server.set_read_timeout(Some(DEADLINE))?;
    let mut guest = Guest::start(device.connect()?, OFFLOADS, MERGEABLE)?;
    // The kernel's own UDP finishes and checks what the guest left open.
    let sent = pattern(1000, 3);
    let path = Path {
        to_ip: device.tap.host_ip(),
        ..Path::to_host(&device.tap)
    };
    let frame = path.udp([7001, 7000], &sent, false);
    guest.send(needs_checksum(), &frame)?;
    let mut received = [0; 2000];
    let (length, from) = server.recv_from(&mut received)?;
    ensure!(received[..length] == sent, "payload to the host");
    ensure!(from.port() == 7001, "{from}");
    // And leaves open what the guest can finish.
    server.send_to(&sent, (Ipv4Addr::from(device.tap.guest_ip()), 7001))?;
    let (header, frame) = guest.receive(DEADLINE)?;
    ensure!(header.flags == F_NEEDS_CSUM, "{header:?}");
    ensure!(
        (header.csum_start.get(), header.csum_offset.get()) == (34, 6),
        "{header:?}"
    );
    let pseudo = Path::to_guest(&device.tap).pseudo(UDP, 1008);
    ensure!(frame[40..42] == pseudo.to_be_bytes(), "no pseudo header sum");
    ensure!(frame[42..] == sent, "payload to the guest");
    Ok(())
}

fn exchange(features: u64) -> Result<()> {
    const FRAMES: u32 = 10_000;
    const WINDOW: u32 = 50;
    let device = Device::start(&[])?;
    let host = host(&device)?;
    let mut guest = Guest::start(device.connect()?, features, MERGEABLE)?;
    let (up, down) = (Path::to_host(&device.tap), Path::to_guest(&device.tap));
    let frame = |path: &Path, number: u32| {
        let payload = [
            &number.to_le_bytes()[..],
            &pattern(number as usize % 1400 + 14, number),
        ]
        .concat();
        path.udp([1, 2], &payload, true)
    };
    for first in (0..FRAMES).step_by(WINDOW as usize) {
        for number in first..first + WINDOW {
            guest.queue(plain(), &frame(&up, number), number as usize % 3 + 1)?;
        }
        guest.flush()?;
        for number in first..first + WINDOW {
            ensure!(
                host.receive(DEADLINE)?.1 == frame(&up, number),
                "{number} to the host"
            );
        }
        for number in first..first + WINDOW {
            host.send(&[0; 10], &frame(&down, number))?;
        }
        for number in first..first + WINDOW {
            ensure!(
                guest.receive(DEADLINE)?.1 == frame(&down, number),
                "{number} to the guest"
            );
        }
    }
    Ok(())
}

fn ten_thousand_frames_each_way() -> Result<()> {
    exchange(OFFLOADS)
}

fn ten_thousand_frames_with_event_idx() -> Result<()> {
    exchange(EVERYTHING)
}

fn super_frames_to_the_host() -> Result<()> {
    let device = Device::start(&[])?;
    let host = host(&device)?;
    let features = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4;
    let mut guest = Guest::start(device.connect()?, features | PLAIN, MERGEABLE)?;
    let path = Path::to_host(&device.tap);
    for (length, parts) in [(3000, 1), (20_000, 3), (60_000, 15)] {
        let sent = path.tcp(1, &pattern(length, 5));
        guest.queue(tcp_segments(), &sent, parts)?;
        guest.flush()?;
        let (header, frame) = host.receive(DEADLINE)?;
        ensure!(header[1] == GSO_TCPV4, "{length}: arrived as {header:?}");
        ensure!(frame[L4 + 20..] == sent[L4 + 20..], "{length}: payload");
    }
    Ok(())
}

fn the_longest_super_frame_to_the_host() -> Result<()> {
    let device = Device::start(&[])?;
    let host = host(&device)?;
    let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
    let header = NetHeader {
        gso_type: GSO_TCPV6,
        hdr_len: 74.into(),
        csum_start: 54.into(),
        ..tcp_segments()
    };
    let sent = Path::to_host(&device.tap).tcp6(&pattern(65_515, 1));
    guest.send(header, &sent)?;
    let (received, frame) = host.receive(DEADLINE)?;
    ensure!(
        received[1] == GSO_TCPV6
            && frame[..14 + 40 + 16] == sent[..14 + 40 + 16]
            && frame[74..] == sent[74..],
        "{} bytes arrived, {received:?}",
        frame.len()
    );
    Ok(())
}

fn udp_super_frames_both_ways() -> Result<()> {
    let device = Device::start(&[])?;
    let host = host(&device)?;
    let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
    if guest.session.features & (1 << VIRTIO_NET_F_HOST_USO) == 0 {
        // A kernel before 6.2: then neither direction may be offered.
        let uso = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
        ensure!(guest.session.features & uso == 0, "half of USO");
        return Ok(());
    }
    let header = NetHeader {
        gso_type: GSO_UDP_L4,
        gso_size: 1000.into(),
        hdr_len: (L4 as u16 + 8).into(),
        ..needs_checksum()
    };
    let sent = Path::to_host(&device.tap).udp([1, 2], &pattern(20_000, 1), false);
    guest.queue(header, &sent, 4)?;
    guest.flush()?;
    let (received, frame) = host.receive(DEADLINE)?;
    ensure!(
        received[1] == GSO_UDP_L4 && frame[42..] == sent[42..],
        "to the host: {received:?}"
    );
    let sent = Path::to_guest(&device.tap).udp([1, 2], &pattern(20_000, 2), false);
    host.send(&short(&header), &sent)?;
    let (received, frame) = guest.receive(DEADLINE)?;
    ensure!(
        received.gso_type == GSO_UDP_L4 && frame == sent,
        "to the guest: {received:?}"
    );
    Ok(())
}

/// Sends a super-frame to the guest: one frame, in as many buffers as it takes.
fn super_frame_to(guest: &mut Guest, host: &Host, device: &Device, length: usize) -> Result<NetHeader> {
    let sent = Path::to_guest(&device.tap).tcp(1, &pattern(length, length as u32));
    host.send(&short(&tcp_segments()), &sent)?;
    let (header, frame) = guest.receive(DEADLINE)?;
    ensure!(
        header.gso_type == GSO_TCPV4 && header.flags == F_NEEDS_CSUM,
        "{header:?}"
    );
    ensure!(header.gso_size.get() == MSS, "{header:?}");
    ensure!(frame == sent, "{length} bytes of payload");
    Ok(header)
}

fn super_frames_to_merged_buffers() -> Result<()> {
    let device = Device::start(&[])?;
    let host = host(&device)?;
    let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
    for round in 0..20 {
        for length in [1449, 4000, 30_000, 65_000, 2000] {
            let header = super_frame_to(&mut guest, &host, &device, length)
                .with_context(|| format!("round {round}"))?;
            let buffers = (12 + L4 + 20 + length).div_ceil(1536);
            ensure!(usize::from(header.num_buffers.get()) == buffers, "{header:?}");
        }
    }
    Ok(())
}

fn super_frames_to_one_long_chain() -> Result<()> {
    let device = Device::start(&[])?;
    let host = host(&device)?;
    let features = EVERYTHING & !(1 << VIRTIO_NET_F_MRG_RXBUF);
    let mut guest = Guest::start(device.connect()?, features, LARGE)?;
    // Long ones after many short ones find chains that were read no further than short ones need.
    let short = |count| std::iter::repeat_n(1449, count);
    for length in short(1)
        .chain([30_000, 65_000])
        .chain(short(100))
        .chain([40_000, 1449])
    {
        let header = super_frame_to(&mut guest, &host, &device, length)?;
        ensure!(header.num_buffers.get() == 1, "{header:?}");
    }
    Ok(())
}

fn without_offloads_the_kernel_finishes_frames() -> Result<()> {
    let device = Device::start(&[])?;
    let host = host(&device)?;
    let mut guest = Guest::start(device.connect()?, PLAIN, MERGEABLE)?;
    let sent = pattern(10_000, 9);
    host.send(
        &short(&tcp_segments()),
        &Path::to_guest(&device.tap).tcp(1, &sent),
    )?;
    let mut received: Vec<u8> = Vec::new();
    while received.len() < sent.len() {
        let (header, frame) = guest.receive(DEADLINE)?;
        ensure!(header.flags == 0 && header.gso_type == GSO_NONE, "{header:?}");
        ensure!(frame.len() <= 1514, "a frame of {} bytes", frame.len());
        ensure!(
            checksum_is_right(&frame),
            "checksum after {} bytes",
            received.len()
        );
        received.extend(&frame[L4 + 20..]);
    }
    ensure!(received == sent, "payload");
    // A later driver that can take them gets them whole: the TAP follows.
    drop(guest);
    let features = PLAIN | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let mut guest = Guest::start(device.connect()?, features, MERGEABLE)?;
    super_frame_to(&mut guest, &host, &device, 10_000).map(drop)
}

fn frames_wait_for_buffers() -> Result<()> {
    let device = Device::start(&[])?;
    let host = host(&device)?;
    let mut guest = Guest::connect(device.connect()?, EVERYTHING, MERGEABLE)?;
    let path = Path::to_guest(&device.tap);
    let frame = |number| path.udp([1, 2], &pattern(1000, number), true);
    // Fewer than the TAP's queue holds (1000 frames), more than there are buffers for.
    for number in 0..300 {
        host.send(&[0; 10], &frame(number))?;
    }
    guest.post(7)?;
    for number in 0..300 {
        let (_, received) = guest
            .receive(DEADLINE)
            .with_context(|| format!("frame {number}"))?;
        ensure!(received == frame(number), "frame {number}");
    }
    Ok(())
}

fn a_frame_waits_for_enough_buffers() -> Result<()> {
    let device = Device::start(&[])?;
    let host = host(&device)?;
    let mut guest = Guest::connect(device.connect()?, EVERYTHING, MERGEABLE)?;
    guest.post(3)?;
    let sent = Path::to_guest(&device.tap).tcp(1, &pattern(40_000, 1));
    host.send(&short(&tcp_segments()), &sent)?;
    let behind = Path::to_guest(&device.tap).udp([1, 2], &pattern(100, 2), true);
    host.send(&[0; 10], &behind)?;
    ensure!(
        guest.receive(Duration::from_millis(300)).is_err(),
        "a frame without room for it"
    );
    guest.post(10)?;
    ensure!(
        guest.receive(Duration::from_millis(300)).is_err(),
        "a frame without room for it"
    );
    guest.post(20)?;
    ensure!(guest.receive(DEADLINE)?.1 == sent, "the long frame");
    ensure!(guest.receive(DEADLINE)?.1 == behind, "the frame behind it");
    Ok(())
}

fn what_only_the_driver_before_takes() -> Result<()> {
    const FEW: u64 = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_GUEST_CSUM | PLAIN;
    let device = Device::start(&[])?;
    let host = host(&device)?;
    let path = Path::to_guest(&device.tap);
    let behind = path.udp([1, 2], &pattern(100, 2), true);
    for (before, after) in [(EVERYTHING, FEW), (FEW, PLAIN)] {
        // Frames wait in the TAP, as this driver has no buffers.
        let guest = Guest::connect(device.connect()?, before, MERGEABLE)?;
        let (header, waiting) = match before {
            FEW => (needs_checksum(), path.udp([1, 2], &pattern(100, 1), false)),
            _ => (tcp_segments(), path.tcp(1, &pattern(10_000, 1))),
        };
        for _ in 0..3 {
            host.send(&short(&header), &waiting)?;
        }
        drop(guest);
        let mut guest = Guest::start(device.connect()?, after, MERGEABLE)?;
        host.send(&[0; 10], &behind)?;
        let (header, frame) = guest.receive(DEADLINE)?;
        ensure!(frame == behind, "{} bytes, {header:?}", frame.len());
    }
    Ok(())
}

fn no_frame_is_longer_than_the_mtu() -> Result<()> {
    let device = Device::start(&["--mtu=1500"])?;
    let host = host(&device)?;
    ip(&format!("link set {} mtu 9000", device.tap.name))?;
    let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
    let path = Path::to_guest(&device.tap);
    let of = |length: usize| path.udp([1, 2], &pattern(length - 42, length as u32), true);
    let with_tag = |kind: [u8; 2], frame: &[u8]| [&frame[..12], &kind, &[0, 1], &frame[12..]].concat();
    let tagged = |length: usize| with_tag([0x81, 0], &of(length - 4));
    let twice = |length: usize| with_tag([0x88, 0xa8], &tagged(length - 4));
    for (long, next) in [
        (of(2000), of(1000)),
        (of(1515), of(1514)),
        (tagged(1523), tagged(1518)),
        (twice(1523), twice(1522)),
    ] {
        host.send(&[0; 10], &long)?;
        host.send(&[0; 10], &next)?;
        let frame = guest.receive(DEADLINE)?.1;
        ensure!(frame == next, "{} bytes arrived, not {}", frame.len(), next.len());
    }
    ensure!(device.dropped("receive", "mtu")? == 4);
    super_frame_to(&mut guest, &host, &device, 10_000)?;
    // A driver that was told no MTU.
    drop(guest);
    let features = EVERYTHING & !(1 << VIRTIO_NET_F_MTU);
    let mut guest = Guest::start(device.connect()?, features, MERGEABLE)?;
    host.send(&[0; 10], &of(2000))?;
    ensure!(guest.receive(DEADLINE)?.1 == of(2000));
    Ok(())
}

fn configuration_space() -> Result<()> {
    let device = Device::start(&["--mtu=9000"])?;
    let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
    let config = guest.session.config(0, 12)?;
    let mut expected = device.tap.guest_mac().to_vec();
    expected.extend([1, 0, 1, 0, 0x28, 0x23]);
    ensure!(config == expected, "{config:x?}");
    Ok(())
}

fn one_front_end_after_another() -> Result<()> {
    let mut device = Device::start(&[])?;
    let host = host(&device)?;
    for round in 0..3 {
        let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
        let sent = Path::to_host(&device.tap).udp([1, 2], &pattern(100, round), true);
        guest.send(plain(), &sent)?;
        ensure!(host.receive(DEADLINE)?.1 == sent, "round {round}");
        let sent = Path::to_guest(&device.tap).udp([1, 2], &pattern(100, round), true);
        host.send(&[0; 10], &sent)?;
        ensure!(guest.receive(DEADLINE)?.1 == sent, "round {round}");
    }
    device.process.signal(Signal::SIGTERM)?;
    let status = device.process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", device.process.stderr()?);
    Ok(())
}

fn a_multi_queue_tap_with_one_queue() -> Result<()> {
    let tap = crate::namespace::TestTap::new(" multi_queue")?;
    let device = Device::on(tap, &[])?;
    let host = host(&device)?;
    let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
    let sent = Path::to_host(&device.tap).udp([1, 2], &pattern(100, 1), true);
    guest.send(plain(), &sent)?;
    ensure!(host.receive(DEADLINE)?.1 == sent);
    Ok(())
}
