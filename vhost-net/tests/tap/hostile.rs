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
    ("foreign_addresses_are_dropped", foreign_addresses_are_dropped),
    ("descriptors_of_no_bytes_are_passed_over", descriptors_of_no_bytes),
    ("flags_are_checked", flags_are_checked),
];

const EVERYTHING: u64 = !0;
const RX: usize = 0;
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
    let start = guest.session.data_start();
    give_back(&mut guest, TX, &[buffer(start, 0, false)])?;
    still_sends(&mut guest, &host, &device, 101)?;
    // Eight, the crumbs, four short ones, the long one and the one of no bytes.
    let dropped = device.dropped("transmit", "header")?;
    ensure!(dropped == 15, "{dropped} are counted");
    ensure!(device.process.alive()?);
    Ok(())
}

/// Makes a chain available and waits until the device has used it; the length that it says.
fn give_back(guest: &mut Guest, ring: usize, chain: &[Segment]) -> Result<u32> {
    let ring = &mut guest.session.rings[ring];
    let head = ring.push(chain)?;
    ring.notify()?;
    let (used, length) = ring.wait_used(DEADLINE)?;
    ensure!(used == head, "head {used}, not {head}");
    Ok(length)
}

/// Breaks one ring of a new front end in one way, then shows that a new one works.
fn broken_by(
    device: &mut Device,
    ring: usize,
    what: &str,
    damage: impl Fn(&mut Guest) -> Result<()>,
) -> Result<()> {
    let mut guest = Guest::connect(device.connect()?, EVERYTHING, MERGEABLE)?;
    damage(&mut guest)?;
    guest.session.rings[ring].force_kick()?;
    let told = guest.wait_error(ring);
    told.map_err(|error| error.context(format!("no error signal for {what} in ring {ring}")))?;
    // The other queue goes on.
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    if ring == RX {
        still_sends(&mut guest, &host, device, 6)?;
    } else {
        guest.post(MERGEABLE.count)?;
        let sent = Path::to_guest(&device.tap).udp([1, 2], &pattern(100, 1), true);
        host.send(&[0; 10], &sent)?;
        ensure!(
            guest.receive(DEADLINE)?.1 == sent,
            "the receive queue after {what}"
        );
    }
    drop(guest);
    let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
    still_sends(&mut guest, &host, device, 7)?;
    ensure!(device.process.alive()?, "process after {what} in ring {ring}");
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
    for ring in [RX, TX] {
        let flag = if ring == RX { WRITE } else { 0 };
        // A chain of these, as far as they are buffers for this ring.
        let chain = |segments: fn(u64) -> Vec<(u64, u32)>| {
            move |guest: &mut Guest| {
                let segments = segments(guest.session.data_start()).into_iter();
                let chain = segments.map(|(address, length)| buffer(address, length, ring == RX));
                guest.session.rings[ring]
                    .push(&chain.collect::<Vec<_>>())
                    .map(drop)
            }
        };
        let first = |length: u32, flags: u16, next: u16| {
            move |guest: &mut Guest| {
                let start = guest.session.data_start();
                let ring = &mut guest.session.rings[ring];
                ring.write_descriptor(0, buffer(start, length, false), flags, next)?;
                ring.offer(0)
            }
        };
        broken_by(
            device,
            ring,
            "memory outside the table",
            chain(|_| vec![(1 << 40, 100)]),
        )?;
        broken_by(
            device,
            ring,
            "a buffer past the end of memory",
            chain(|_| vec![(u64::MAX - 50, 100)]),
        )?;
        broken_by(
            device,
            ring,
            "a second buffer outside the table",
            chain(|start| vec![(start, 2000), (1 << 40, 100)]),
        )?;
        broken_by(device, ring, "an index that jumps", |guest| {
            guest.session.rings[ring].set_available_index(1000)
        })?;
        broken_by(device, ring, "a loop", first(64, NEXT | flag, 0))?;
        broken_by(device, ring, "a head outside the table", |guest| {
            guest.session.rings[ring].offer(999)
        })?;
        broken_by(
            device,
            ring,
            "a next outside the table",
            first(64, NEXT | flag, 60000),
        )?;
        broken_by(
            device,
            ring,
            "an indirect table of an odd size",
            first(17, INDIRECT, 0),
        )?;
        broken_by(
            device,
            ring,
            "an indirect table of no bytes",
            first(0, INDIRECT, 0),
        )?;
        broken_by(
            device,
            ring,
            "a buffer of the other kind",
            first(2000, WRITE ^ flag, 0),
        )?;
        broken_by(device, ring, "readable behind writable", |guest| {
            let start = guest.session.data_start();
            let ring = &mut guest.session.rings[ring];
            ring.write_descriptor(0, buffer(start, 64, true), NEXT | WRITE, 1)?;
            ring.write_descriptor(1, buffer(start, 64, false), 0, 0)?;
            ring.offer(0)
        })?;
    }
    broken_by(device, RX, "writable behind readable", |guest| {
        let start = guest.session.data_start();
        guest.session.rings[RX]
            .push(&[buffer(start, 2000, false), buffer(start + 4096, 2000, true)])
            .map(drop)
    })?;
    broken_by(device, RX, "a buffer of no bytes", |guest| {
        let start = guest.session.data_start();
        guest.session.rings[RX].push(&[buffer(start, 0, true)]).map(drop)
    })
}

fn descriptors_of_no_bytes() -> Result<()> {
    let device = Device::start(&[])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let mut guest = Guest::connect(device.connect()?, EVERYTHING, MERGEABLE)?;
    let at = guest.session.data_start();
    let chain = |length: u32, writable| {
        let parts = [(at, 0), (at, 12), (at, 0), (at + 12, length), (at, 0)];
        parts.map(|(address, length)| buffer(address, length, writable))
    };
    let sent = Path::to_host(&device.tap).udp([1, 2], &pattern(200, 1), true);
    guest.session.memory.write(at, &[&[0; 12][..], &sent].concat())?;
    give_back(&mut guest, TX, &chain(sent.len() as u32, false))?;
    ensure!(host.receive(DEADLINE)?.1 == sent, "sent");
    let sent = Path::to_guest(&device.tap).udp([1, 2], &pattern(300, 2), true);
    host.send(&[0; 10], &sent)?;
    let length = give_back(&mut guest, RX, &chain(2000, true))?;
    ensure!(length as usize == 12 + sent.len(), "{length} bytes");
    ensure!(
        guest.session.memory.read(at + 12, sent.len())? == sent,
        "received"
    );
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
    ensure!(device.dropped("transmit", "guard")? == 4);
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
