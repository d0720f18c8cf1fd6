//! What a guest may do wrong: each costs it the frame or the ring, and nothing else.

use crate::frames::{L4, Path, pattern};
use crate::guest::{DEADLINE, Guest, MERGEABLE};
use crate::host::Host;
use crate::{Case, Device};
use anyhow::{Result, ensure};
use integration_tests::frontend_harness::{INDIRECT, NEXT, Segment, WRITE};
use std::time::Duration;
use vhost_net::header::{F_NEEDS_CSUM, GSO_TCPV4, NetHeader};

pub const ALL: &[Case] = &[
    ("malformed_headers_are_dropped", malformed_headers_are_dropped),
    (
        "malformed_chains_break_the_ring_only",
        malformed_chains_break_the_ring_only,
    ),
    (
        "a_readable_receive_buffer_breaks_the_ring_only",
        a_readable_receive_buffer,
    ),
    ("foreign_addresses_are_dropped", foreign_addresses_are_dropped),
    ("flags_are_checked", flags_are_checked),
];

const EVERYTHING: u64 = !0;
const TX: usize = 1;

/// A good frame reaches the host, and it is the next one there.
fn still_sends(guest: &mut Guest, host: &Host, device: &Device, seed: u32) -> Result<()> {
    let sent = Path::to_host(&device.tap).udp([1, 2], &pattern(200, seed), true);
    guest.send(NetHeader::default(), &sent)?;
    ensure!(
        host.receive(DEADLINE)?.1 == sent,
        "frame {seed} is not the next one"
    );
    Ok(())
}

fn malformed_headers_are_dropped() -> Result<()> {
    let mut device = Device::start(&[])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
    let frame = Path::to_host(&device.tap).tcp(1, &pattern(3000, 1));
    let good = NetHeader {
        flags: F_NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54.into(),
        gso_size: 1448.into(),
        csum_start: (L4 as u16).into(),
        csum_offset: 16.into(),
        ..NetHeader::default()
    };
    let bad = [
        NetHeader { gso_type: 3, ..good },
        NetHeader {
            gso_type: 0x42,
            ..good
        },
        NetHeader {
            gso_size: 0.into(),
            ..good
        },
        NetHeader { flags: 0, ..good },
        NetHeader {
            csum_start: 65535.into(),
            ..good
        },
        NetHeader {
            csum_offset: 65535.into(),
            ..good
        },
        NetHeader {
            csum_start: 0.into(),
            ..good
        },
        NetHeader {
            csum_start: 3053.into(),
            ..good
        },
    ];
    for (seed, header) in (0..).zip(bad) {
        guest.send(header, &frame)?;
        still_sends(&mut guest, &host, &device, seed)?;
    }
    // A hint, which nobody relies on.
    for hdr_len in [0, 65535] {
        let hint = NetHeader {
            hdr_len: hdr_len.into(),
            ..good
        };
        guest.send(hint, &frame)?;
        ensure!(
            host.receive(DEADLINE)?.1[L4 + 20..] == frame[L4 + 20..],
            "{hint:?}"
        );
    }
    let whole = Path::to_host(&device.tap).tcp(1, &pattern(60_000, 1));
    let crumbs = NetHeader {
        gso_size: 1.into(),
        ..good
    };
    guest.send(crumbs, &whole)?;
    still_sends(&mut guest, &host, &device, 50)?;
    for length in [1, 11, 12, 25] {
        guest.queue_bytes(&vec![0; length], 1)?;
        guest.flush()?;
        still_sends(&mut guest, &host, &device, length as u32)?;
    }
    guest.queue_bytes(&vec![0; 68 << 10], 1)?;
    guest.flush()?;
    still_sends(&mut guest, &host, &device, 100)?;
    ensure!(device.process.alive()?);
    Ok(())
}

/// Breaks the transmit ring of a new front end in one way, then shows that a new one works.
fn broken_by(device: &mut Device, what: &str, damage: fn(&mut Guest) -> Result<()>) -> Result<()> {
    let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
    damage(&mut guest)?;
    guest.session.rings[TX].force_kick()?;
    let told = guest.wait_error(TX);
    told.map_err(|error| error.context(format!("no error signal for {what}")))?;
    // The other queue goes on.
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let sent = Path::to_guest(&device.tap).udp([1, 2], &pattern(100, 1), true);
    host.send(&[0; 10], &sent)?;
    ensure!(
        guest.receive(DEADLINE)?.1 == sent,
        "the receive queue after {what}"
    );
    drop(guest);
    let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
    still_sends(&mut guest, &host, device, 7)?;
    ensure!(device.process.alive()?, "process after {what}");
    Ok(())
}

fn buffer(address: u64, length: u32, writable: bool) -> Segment {
    Segment {
        address,
        length,
        writable,
    }
}

fn malformed_chains_break_the_ring_only() -> Result<()> {
    let mut device = Device::start(&[])?;
    let device = &mut device;
    broken_by(device, "memory outside the table", |guest| {
        guest.session.rings[TX]
            .push(&[buffer(1 << 40, 100, false)])
            .map(drop)
    })?;
    broken_by(device, "a buffer past the end of memory", |guest| {
        guest.session.rings[TX]
            .push(&[buffer(u64::MAX - 50, 100, false)])
            .map(drop)
    })?;
    broken_by(device, "a writable transmit buffer", |guest| {
        let start = guest.session.data_start();
        guest.session.rings[TX]
            .push(&[buffer(start, 100, true)])
            .map(drop)
    })?;
    broken_by(device, "an index that jumps", |guest| {
        guest.session.rings[TX].set_available_index(1000)
    })?;
    broken_by(device, "a loop", |guest| {
        let start = guest.session.data_start();
        let ring = &mut guest.session.rings[TX];
        ring.write_descriptor(0, buffer(start, 64, false), NEXT, 0)?;
        ring.offer(0)
    })?;
    broken_by(device, "a head outside the table", |guest| {
        guest.session.rings[TX].offer(999)
    })?;
    broken_by(device, "a next outside the table", |guest| {
        let start = guest.session.data_start();
        let ring = &mut guest.session.rings[TX];
        ring.write_descriptor(0, buffer(start, 64, false), NEXT, 60000)?;
        ring.offer(0)
    })?;
    broken_by(device, "an indirect table of an odd size", |guest| {
        let start = guest.session.data_start();
        let ring = &mut guest.session.rings[TX];
        ring.write_descriptor(0, buffer(start, 17, false), INDIRECT, 0)?;
        ring.offer(0)
    })?;
    broken_by(device, "readable behind writable", |guest| {
        let start = guest.session.data_start();
        let ring = &mut guest.session.rings[TX];
        ring.write_descriptor(0, buffer(start, 64, true), NEXT | WRITE, 1)?;
        ring.write_descriptor(1, buffer(start, 64, false), 0, 0)?;
        ring.offer(0)
    })
}

fn a_readable_receive_buffer() -> Result<()> {
    const RX: usize = 0;
    let device = Device::start(&[])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    for writable_too in [false, true] {
        let mut guest = Guest::connect(device.connect()?, EVERYTHING, MERGEABLE)?;
        let start = guest.session.data_start();
        let mut chain = vec![buffer(start, 2000, false)];
        chain.extend(writable_too.then(|| buffer(start + 4096, 2000, true)));
        guest.session.rings[RX].push(&chain)?;
        guest.session.rings[RX].force_kick()?;
        guest.wait_error(RX)?;
        still_sends(&mut guest, &host, &device, 1)?;
    }
    Ok(())
}

fn foreign_addresses_are_dropped() -> Result<()> {
    let tap = crate::namespace::TestTap::new("")?;
    let ip = format!("--ip={}", std::net::Ipv4Addr::from(tap.guest_ip()));
    let device = Device::on(tap, &[&ip])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
    let own = Path::to_host(&device.tap);
    let foreign = [
        Path {
            from_mac: [2, 9, 9, 9, 9, 9],
            ..own
        },
        Path {
            from_ip: [10, 99, 0, 1],
            ..own
        },
        Path {
            from_mac: own.to_mac,
            from_ip: own.to_ip,
            ..own
        },
    ];
    for (seed, path) in (0..).zip(foreign) {
        guest.send(NetHeader::default(), &path.udp([1, 2], &pattern(300, seed), true))?;
        still_sends(&mut guest, &host, &device, seed)?;
    }
    // Its own address, which the kernel would make another's.
    let rewritten = NetHeader {
        flags: F_NEEDS_CSUM,
        csum_start: 20.into(),
        csum_offset: 8.into(),
        ..NetHeader::default()
    };
    guest.send(rewritten, &own.udp([1, 2], &pattern(300, 9), true))?;
    still_sends(&mut guest, &host, &device, 9)?;
    let log = device.process.stderr()?;
    for refusal in [
        "source MAC address",
        "source IP address",
        "checksum to be filled in",
    ] {
        ensure!(log.contains(refusal), "{log}");
    }
    Ok(())
}

fn flags_are_checked() -> Result<()> {
    for (flag, message) in [
        ("--ip=1.2.3", "--ip"),
        ("--mtu=10", "less than 68"),
        ("--tap-fd=7", "--tap-name or --tap-fd"),
        ("--tap-name=nosuch0", "no interface 'nosuch0'"),
        ("--tap-name=lo", "'lo' is not a TAP"),
        ("--num-queues=3", "not a multiple of 2"),
        ("--num-queues=4", "2 queue(s)"),
    ] {
        let mut device = Device::start(&[flag])?;
        let status = device.process.wait(Duration::from_secs(10))?;
        let log = device.process.stderr()?;
        ensure!(
            !status.success() && log.contains(message),
            "{flag}: {status}: {log}"
        );
    }
    Ok(())
}
