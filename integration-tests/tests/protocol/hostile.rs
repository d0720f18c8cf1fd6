//! What a hostile guest writes into its rings, and what a broken front end sends.

use crate::fixture::{DISK, Disk, Kind, Target, read_block, write_block};
use anyhow::{Context, Result, ensure};
use guest_contract::holds;
use integration_tests::{
    frontend_harness::{
        BASE, Connection, DEADLINE, INDIRECT, Memory, NEXT, Options, STATUS_IOERR, Segment, Session, WRITE,
        request, virtio,
    },
    process::{Process, connect},
    suite::test,
};
use libtest_mimic::Trial;
use std::{os::fd::AsFd, sync::Arc, time::Duration};

type Break = fn(&mut Session) -> Result<()>;
type Attack = fn(&mut Connection) -> Result<()>;

pub(crate) fn tests() -> Vec<Trial> {
    let mut tests: Vec<_> = RINGS
        .into_iter()
        .map(|(name, damage, fault)| test(format!("hostile::ring::{name}"), move || ring(damage, fault)))
        .collect();
    tests.push(test("hostile::ring::header_too_short", short_header));
    tests.push(test("hostile::ring::used_length", lengths));
    for (name, attack) in MESSAGES {
        for (prefix, target) in [("", Target::Disk), ("net::", Target::Nic)] {
            let name = format!("hostile::message::{prefix}{name}");
            tests.push(test(name, move || message(attack, target)));
        }
    }
    tests
}

/// What a driver does to queue 1, and what the device says of it.
const RINGS: [(&str, Break, &str); 18] = [
    (
        "head_out_of_range",
        |session| session.rings[1].offer(5000),
        "chain head 5000 is outside",
    ),
    (
        "head_twice",
        |session| {
            // The entries of a new ring are zeros: both at once.
            describe(session, &[(DATA, 16, NEXT, 1), (DATA, 1, WRITE, 0)])?;
            session.rings[1].set_available_index(2)
        },
        "chain head 0 was made available twice",
    ),
    (
        "available_index_ahead",
        |session| session.rings[1].set_available_index(9000),
        "available index 9000 is more than 128 ahead of 0",
    ),
    (
        "available_index_behind",
        |session| session.rings[1].set_available_index(u16::MAX),
        "available index 65535 is more than 128 ahead of 0",
    ),
    (
        "loop",
        |session| chain(session, &[(DATA, 16, NEXT, 1), (DATA, 512, NEXT, 0)]),
        "head 0 is longer than its table",
    ),
    (
        "next_out_of_range",
        |session| chain(session, &[(DATA, 16, NEXT, 4000)]),
        "goes on at descriptor 4000",
    ),
    (
        "buffer_below_memory",
        |session| chain(session, &[(0, 16, NEXT, 1), (DATA, 1, WRITE, 0)]),
        "are not guest memory",
    ),
    (
        "buffer_wraps",
        |session| chain(session, &[(u64::MAX - 8, 4096, NEXT, 1), (DATA, 1, WRITE, 0)]),
        "are not guest memory",
    ),
    (
        "buffer_past_memory",
        |session| {
            chain(
                session,
                &[
                    (DATA, 16, NEXT, 1),
                    (DATA, u32::MAX - 16, NEXT | WRITE, 2),
                    (DATA, 1, WRITE, 0),
                ],
            )
        },
        "are not guest memory",
    ),
    (
        "four_gib",
        |session| {
            // Of 64 MiB each, all of it guest memory.
            let whole = session.memory.size() as u32;
            let mut long = vec![(BASE, whole, NEXT | WRITE, 0); 100];
            for (index, descriptor) in (1..).zip(&mut long) {
                descriptor.3 = index;
            }
            chain(session, &long)
        },
        "has 4 GiB or more",
    ),
    (
        "no_status",
        |session| chain(session, &[(DATA, 16, 0, 0)]),
        "no room for its status",
    ),
    (
        "status_not_writable",
        |session| {
            chain(
                session,
                &[(DATA, 16, NEXT, 1), (DATA, 512, NEXT, 2), (DATA, 1, 0, 0)],
            )
        },
        "no room for its status",
    ),
    (
        "status_of_no_bytes",
        |session| chain(session, &[(DATA, 16, NEXT, 1), (DATA, 0, WRITE, 0)]),
        "no room for its status",
    ),
    (
        "writable_first",
        |session| chain(session, &[(DATA, 512, WRITE | NEXT, 1), (DATA, 16, 0, 0)]),
        "a readable buffer behind a writable one",
    ),
    (
        "indirect_too_long",
        |session| chain(session, &[(DATA, 1025 * 16, INDIRECT, 0)]),
        "an indirect table that is not allowed",
    ),
    (
        "indirect_of_odd_length",
        |session| chain(session, &[(DATA, 17, INDIRECT, 0)]),
        "an indirect table that is not allowed",
    ),
    (
        "indirect_nested",
        |session| indirect(session, INDIRECT, 0),
        "an indirect table that is not allowed",
    ),
    (
        "indirect_loop",
        |session| indirect(session, NEXT, 0),
        "head 0 is longer than its table",
    ),
];

/// What a front end says once it has negotiated.
const MESSAGES: [(&str, Attack); 21] = [
    ("unknown_request", |socket| socket.tell(0x7FFF, &[0; 8], &[])),
    ("huge_message", |socket| {
        socket.send_raw(&header(request::SET_FEATURES, 1, u32::MAX), &[])
    }),
    ("version_0", |socket| {
        socket.send_raw(&header(request::GET_FEATURES, 0, 0), &[])
    }),
    ("half_a_header", |socket| socket.send_raw(&[1, 0, 0], &[])),
    ("half_a_payload", |socket| {
        socket.send_raw(&header(request::SET_FEATURES, 1, 8), &[])
    }),
    ("memory_without_fd", |socket| {
        socket.tell(request::SET_MEM_TABLE, &table(1 << 20), &[])
    }),
    ("memory_past_its_file", |socket| {
        let memory = Memory::new(1 << 20)?;
        socket.tell(request::SET_MEM_TABLE, &table(1 << 30), &[memory.fd()])
    }),
    ("ring_of_3", |socket| {
        socket.tell(request::SET_VRING_NUM, &pair(0, 3), &[])
    }),
    ("ring_of_65536", |socket| {
        socket.tell(request::SET_VRING_NUM, &pair(0, 65536), &[])
    }),
    ("queue_9999", |socket| {
        socket.tell(request::SET_VRING_NUM, &pair(9999, 128), &[])
    }),
    ("address_of_queue_9999", |socket| {
        let mut payload = vec![0; 40];
        payload[..4].copy_from_slice(&9999_u32.to_le_bytes());
        socket.tell(request::SET_VRING_ADDR, &payload, &[])
    }),
    ("new_base_of_queue_9999", |socket| {
        socket.tell(request::SET_VRING_BASE, &pair(9999, 0), &[])
    }),
    ("call_of_queue_200", |socket| {
        let file = tempfile::tempfile()?;
        socket.tell(request::SET_VRING_CALL, &200_u64.to_le_bytes(), &[file.as_fd()])
    }),
    ("error_of_queue_200", |socket| {
        let file = tempfile::tempfile()?;
        socket.tell(request::SET_VRING_ERR, &200_u64.to_le_bytes(), &[file.as_fd()])
    }),
    ("kick_of_queue_200", |socket| {
        let file = tempfile::tempfile()?;
        socket.tell(request::SET_VRING_KICK, &200_u64.to_le_bytes(), &[file.as_fd()])
    }),
    ("enable_queue_9999", |socket| {
        socket.tell(request::SET_VRING_ENABLE, &pair(9999, 1), &[])
    }),
    ("base_of_queue_9999", |socket| {
        socket.ask(request::GET_VRING_BASE, &pair(9999, 0), &[]).map(drop)
    }),
    ("kick_that_is_no_eventfd", |socket| {
        let file = tempfile::tempfile()?;
        socket.tell(request::SET_VRING_KICK, &0_u64.to_le_bytes(), &[file.as_fd()])
    }),
    ("inflight_asked_for_without_sizes", |socket| {
        socket.ask(request::GET_INFLIGHT_FD, &[], &[]).map(drop)
    }),
    ("inflight_for_9999_queues", |socket| {
        let mut payload = vec![0; 24];
        payload[16..18].copy_from_slice(&9999_u16.to_le_bytes());
        payload[18..20].copy_from_slice(&128_u16.to_le_bytes());
        socket.ask(request::GET_INFLIGHT_FD, &payload, &[]).map(drop)
    }),
    ("inflight_without_fd", |socket| {
        socket.tell(request::SET_INFLIGHT_FD, &[0xFF; 20], &[])
    }),
];

/// In the data area of a session with two queues of 128.
const DATA: u64 = BASE + (8 << 20);

fn header(request: u32, version: u32, size: u32) -> Vec<u8> {
    [request.to_le_bytes(), version.to_le_bytes(), size.to_le_bytes()].concat()
}

fn pair(index: u32, value: u32) -> Vec<u8> {
    [index.to_le_bytes(), value.to_le_bytes()].concat()
}

/// A memory table of one region of `size` bytes.
fn table(size: u64) -> Vec<u8> {
    [1, BASE, size, 0x7000_0000, 0].map(u64::to_le_bytes).concat()
}

/// Makes descriptors 0, 1 and so on of queue 1.
fn describe(session: &mut Session, descriptors: &[(u64, u32, u16, u16)]) -> Result<()> {
    for (index, (address, length, flags, next)) in (0..).zip(descriptors) {
        let segment = Segment {
            address: *address,
            length: *length,
            writable: false,
        };
        session.rings[1].write_descriptor(index, segment, *flags, *next)?;
    }
    Ok(())
}

/// As [`describe`], and offers descriptor 0.
fn chain(session: &mut Session, descriptors: &[(u64, u32, u16, u16)]) -> Result<()> {
    describe(session, descriptors)?;
    session.rings[1].offer(0)
}

/// As [`chain`], one indirect table of one descriptor, of 16 bytes.
fn indirect(session: &mut Session, flags: u16, next: u16) -> Result<()> {
    let mut table = DATA.to_le_bytes().to_vec();
    table.extend(16_u32.to_le_bytes());
    table.extend(flags.to_le_bytes());
    table.extend(next.to_le_bytes());
    session.memory.write(DATA, &table)?;
    chain(session, &[(DATA, 16, INDIRECT, 0)])
}

/// A broken queue is reported, and why; it costs neither the process nor the other queue.
fn ring(damage: Break, fault: &str) -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    let options = Options {
        queues: 2,
        features: !virtio::EVENT_IDX,
        ..Options::default()
    };
    let (mut process, mut driver) = disk.drive(&options)?;
    damage(&mut driver.session)?;
    driver.session.rings[1].force_kick()?;
    let marked = driver.session.rings[1].wait_signal(DEADLINE)?;
    ensure!(marked, "the queue was not marked as broken");
    let log = process.stderr()?;
    ensure!(log.contains(fault), "the log does not say {fault:?}: {log}");
    driver.done(0, &write_block(1, 0))?;
    ensure!(holds(&driver.done(0, &read_block(0))?, 1, 0), "data differs");
    ensure!(process.alive()?, "the process has gone: {}", process.stderr()?);
    // Reset: the queue is stopped, and a new session begins from nothing.
    driver.session.stop_ring(1)?;
    drop(driver);
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    Ok(())
}

/// A request that can be answered is: with an error.
fn short_header() -> Result<()> {
    const STATUS: u64 = DATA + 4096;
    let disk = Disk::new(Kind::Raw)?;
    let (mut process, mut driver) = disk.drive(&Options::default())?;
    for length in [1, 15] {
        driver.session.memory.write(STATUS, &[0xEE])?;
        let segment = |address, length, writable| Segment {
            address,
            length,
            writable,
        };
        let ring = &mut driver.session.rings[0];
        ring.push(&[segment(DATA, length, false), segment(STATUS, 1, true)])?;
        ring.force_kick()?;
        ring.wait_used(DEADLINE)?;
        let status = driver.session.memory.read(STATUS, 1)?[0];
        ensure!(
            status == STATUS_IOERR,
            "a header of {length} bytes: status {status}"
        );
    }
    driver.done(0, &write_block(1, 0))?;
    ensure!(process.alive()?, "the process has gone: {}", process.stderr()?);
    Ok(())
}

/// The used length is what was written from the first writable byte on (virtio 1.3, 2.7.8.2), no more.
fn lengths() -> Result<()> {
    const STATUS: u64 = DATA + 4096;
    let disk = Disk::new(Kind::Raw)?;
    let (_process, mut driver) = disk.drive(&Options::default())?;
    let (read, flush, get_id) = (0_u64, 4, 8);
    for (kind, sector, room, expected) in [
        (read, 0, 512, 513),
        (read, DISK / 512, 512, 0),
        (get_id, 0, 20, 21),
        (get_id, 0, 64, 20),
        (get_id, 0, 8, 9),
        (flush, 0, 0, 1),
        (flush, 0, 8, 0),
    ] {
        let header = [kind.to_le_bytes(), sector.to_le_bytes()].concat();
        driver.session.memory.write(DATA, &header)?;
        let segment = |address, length, writable| Segment {
            address,
            length,
            writable,
        };
        let mut chain = vec![segment(DATA, 16, false)];
        if room > 0 {
            chain.push(segment(DATA + 512, room, true));
        }
        chain.push(segment(STATUS, 1, true));
        let ring = &mut driver.session.rings[0];
        ring.push(&chain)?;
        ring.force_kick()?;
        let (_, length) = ring.wait_used(DEADLINE)?;
        ensure!(
            length == expected,
            "type {kind}, sector {sector}, {room} bytes: used length {length}"
        );
    }
    Ok(())
}

/// A bad message is refused or ends its session; the next front end is served.
fn message(attack: Attack, target: Target) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("sock");
    let (mut command, _served) = target.command()?;
    command.arg(format!("--socket-path={}", path.display()));
    let mut process = Process::start(command)?;
    let memory = Arc::new(Memory::new(1 << 20)?);
    // Half a message gets no answer: that wait runs to its end.
    let options = Options {
        deadline: Duration::from_secs(2),
        ..Options::default()
    };
    let mut session = Session::negotiate(connect(&path, DEADLINE)?, &options, memory)?;
    // Where the attack gets an answer it must be a refusal; otherwise the back end hangs up, or
    // waits for the rest of the message until we do.
    let accepted = session.connection.acknowledges && attack(&mut session.connection).is_ok();
    let raw = session.connection.ask(request::GET_FEATURES, &[], &[]).is_ok();
    ensure!(
        !(accepted && raw),
        "the message was taken, and the session went on"
    );
    drop(session);
    target
        .serves(connect(&path, DEADLINE)?)
        .with_context(|| format!("the next front end: {}", process.stderr().unwrap_or_default()))?;
    ensure!(process.alive()?, "the process has gone");
    ensure!(
        !process.stderr()?.contains("panicked"),
        "a panic: {}",
        process.stderr()?
    );
    Ok(())
}
