//! What the guest is told about its link, and what it tells the device on the control queue.

use crate::frames::{Path, pattern};
use crate::guest::{DEADLINE, Guest, MERGEABLE};
use crate::host::Host;
use crate::namespace::{TestTap, ip};
use crate::{Case, Device, metrics};
use anyhow::{Context, Result, ensure};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::time::{ClockId, clock_gettime};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vhost_net::header::NetHeader;

pub const ALL: &[Case] = &[
    ("the_launcher_takes_the_link_down_and_up", down_and_up),
    (
        "frames_that_wait_do_not_pass_a_link_that_is_down",
        frames_that_wait,
    ),
    ("a_tap_that_vanishes_takes_the_link_down", a_tap_that_vanishes),
    ("orders_are_answered_until_nobody_gives_them", orders),
    ("orders_are_heard_between_front_ends", between_front_ends),
    ("the_driver_chooses_what_it_receives", the_driver_chooses),
    ("the_driver_changes_its_address", the_driver_changes_its_address),
    ("what_the_kernel_refuses_is_not_done", what_the_kernel_refuses),
    (
        "the_front_end_hears_of_what_the_driver_changes",
        the_front_end_hears,
    ),
    (
        "a_guest_with_too_few_buffers_loses_the_frame_only",
        too_few_buffers,
    ),
];

const EVERYTHING: u64 = !0;
/// Of a device with one pair.
const CONTROL: usize = 2;
const OK: u8 = 0;
const ERROR: u8 = 1;
pub const LINK_UP: u8 = 1;
const ANNOUNCE: u8 = 2;
/// Between two looks at what has no event.
const LOOK: Duration = Duration::from_millis(5);

pub fn wait_status(guest: &mut Guest, wanted: u8) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    loop {
        let status = guest.session.config(6, 2)?;
        if status == [wanted, 0] {
            return Ok(());
        }
        ensure!(Instant::now() < end, "status {status:?}, not {wanted}");
        std::thread::sleep(LOOK);
    }
}

pub fn wait_carrier(tap: &TestTap, wanted: bool) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    let has = || -> Result<bool> {
        let running = InterfaceFlags::IFF_RUNNING;
        Ok(getifaddrs()?.any(|one| one.interface_name == tap.name && one.flags.contains(running)))
    };
    while has()? != wanted {
        ensure!(Instant::now() < end, "the carrier stays {}", !wanted);
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn down_and_up() -> Result<()> {
    let (theirs, ours): (OwnedFd, OwnedFd) = nix::unistd::pipe()?;
    let device = Device::with(TestTap::new("")?, &["--link-fd=5"], [(theirs, 5)])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let mut guest = Guest::with_queues(device.connect()?, EVERYTHING, MERGEABLE, 3)?;
    guest.post(MERGEABLE.count)?;
    let order = |byte: &[u8]| nix::unistd::write(ours.as_fd(), byte).map(drop);
    wait_status(&mut guest, LINK_UP)?;
    order(b"0\n")?;
    wait_status(&mut guest, 0)?;
    wait_carrier(&device.tap, false)?;
    let path = Path::to_host(&device.tap);
    guest.send(NetHeader::default(), &path.udp([1, 2], &pattern(100, 1), true))?;
    order(b"1")?;
    wait_status(&mut guest, LINK_UP | ANNOUNCE)?;
    ensure!(guest.control(CONTROL, &[3, 0])? == OK, "ANNOUNCE_ACK");
    wait_status(&mut guest, LINK_UP)?;
    wait_carrier(&device.tap, true)?;
    let sent = path.udp([1, 2], &pattern(100, 2), true);
    guest.send(NetHeader::default(), &sent)?;
    ensure!(
        host.receive(DEADLINE)?.1 == sent,
        "a frame that was sent while the link was down"
    );
    order(b"a")?;
    wait_status(&mut guest, LINK_UP | ANNOUNCE)?;
    // The launcher's end closes: the link stays as it is, and the process does not spin or end.
    drop(ours);
    ensure!(guest.control(CONTROL, &[3, 0])? == OK, "ANNOUNCE_ACK");
    wait_status(&mut guest, LINK_UP)?;
    guest.send(NetHeader::default(), &sent)?;
    ensure!(host.receive(DEADLINE)?.1 == sent);
    Ok(())
}

fn frames_that_wait() -> Result<()> {
    let (theirs, ours): (OwnedFd, OwnedFd) = nix::unistd::pipe()?;
    let device = Device::with(TestTap::new("")?, &["--link-fd=5"], [(theirs, 5)])?;
    let mut guest = Guest::connect(device.connect()?, EVERYTHING, MERGEABLE)?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let path = Path::to_guest(&device.tap);
    let send = |seed: u32| -> Result<Vec<u8>> {
        let frame = path.udp([1, 2], &pattern(100, seed), true);
        host.send(&[0; 10], &frame)?;
        Ok(frame)
    };
    // It waits in the TAP, as the guest has no buffers yet.
    send(1)?;
    nix::unistd::write(&ours, b"0")?;
    wait_status(&mut guest, 0)?;
    guest.post(MERGEABLE.count)?;
    let end = Instant::now() + DEADLINE;
    while !device
        .process
        .stderr()?
        .contains("frame dropped: the link is down")
    {
        ensure!(
            Instant::now() < end,
            "the frame that waited is not dropped: {:?}",
            guest.receive(Duration::ZERO)
        );
        std::thread::sleep(LOOK);
    }
    nix::unistd::write(&ours, b"1")?;
    // The kernel drops what it is given between the carrier and the queue's start: until one passes.
    let end = Instant::now() + DEADLINE;
    loop {
        let sent = send(2)?;
        match guest.receive(LOOK) {
            Ok((_, frame)) => {
                ensure!(frame == sent, "another frame");
                return Ok(());
            }
            Err(error) => ensure!(Instant::now() < end, "no frame once the link is up: {error}"),
        }
    }
}

fn a_tap_that_vanishes() -> Result<()> {
    for (options, flags) in [
        ("", &[][..]),
        ("", &["--receive-limit=packets=1000,packets-burst=10"][..]),
        (" multi_queue", &["--num-queues=4"][..]),
    ] {
        let device = Device::on(TestTap::new(options)?, flags)?;
        let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
        let frame = Path::to_host(&device.tap).udp([1, 2], &pattern(100, 1), true);
        guest.send(NetHeader::default(), &frame)?;
        wait_status(&mut guest, LINK_UP)?;
        ip(&format!("link delete {}", device.tap.name))?;
        wait_status(&mut guest, 0)?;
        // Its frames are dropped, and it goes on: with buffers that no frame will fill, and idle.
        guest.send(NetHeader::default(), &frame)?;
        is_idle(&device).with_context(|| format!("without its TAP, with {flags:?}"))?;
    }
    Ok(())
}

fn is_idle(device: &Device) -> Result<()> {
    let before = cpu_time(device)?;
    std::thread::sleep(Duration::from_millis(500));
    let used = cpu_time(device)?.saturating_sub(before);
    ensure!(used < Duration::from_millis(50), "{used:?} of a CPU for nothing");
    Ok(())
}

fn orders() -> Result<()> {
    let (theirs, mut ours) = UnixStream::pair()?;
    ours.set_read_timeout(Some(DEADLINE))?;
    // Whoever makes a successor has it, too.
    let _copy = theirs.try_clone()?;
    let device = Device::with(TestTap::new("")?, &["--control-fd=5"], [(theirs.into(), 5)])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let mut guest = Guest::connect(device.connect()?, EVERYTHING, MERGEABLE)?;
    let sent = Path::to_host(&device.tap).udp([1, 2], &pattern(100, 1), true);
    guest.send(NetHeader::default(), &sent)?;
    ensure!(host.receive(DEADLINE)?.1 == sent);
    let bytes = format!(
        "bulkhead_net_bytes_total{{direction=\"transmit\"}} {}",
        sent.len()
    );
    let end = Instant::now() + DEADLINE;
    loop {
        let metrics = metrics(&ours)?;
        let tells = |line: &str| metrics.lines().any(|told| told == line);
        ensure!(tells("bulkhead_net_link_up 1"), "{metrics}");
        // A frame is counted a moment after it has passed.
        if tells(&bytes) {
            break;
        }
        ensure!(Instant::now() < end, "no {bytes:?} in {metrics}");
    }
    ours.write_all(b"size 1\n")?;
    let mut answer = String::new();
    BufReader::new(&ours).read_line(&mut answer)?;
    ensure!(answer.contains("\"size 1\" is no order"), "{answer}");
    drop(ours);
    is_idle(&device).context("without anybody who gives orders")?;
    guest.send(NetHeader::default(), &sent)?;
    ensure!(host.receive(DEADLINE)?.1 == sent);
    Ok(())
}

/// Before the first front end, and between two.
fn between_front_ends() -> Result<()> {
    let (theirs, control) = UnixStream::pair()?;
    control.set_read_timeout(Some(DEADLINE))?;
    let (orders, ours): (OwnedFd, OwnedFd) = nix::unistd::pipe()?;
    let flags = ["--control-fd=5", "--link-fd=6", "--log-level=info"];
    let device = Device::with(TestTap::new("")?, &flags, [(theirs.into(), 5), (orders, 6)])?;
    device.tap.wait_up()?;
    for round in 1..=2 {
        for (order, up) in [(b"0", false), (b"1", true)] {
            nix::unistd::write(&ours, order)?;
            wait_carrier(&device.tap, up)?;
            let metrics = metrics(&control)?;
            let line = format!("bulkhead_net_link_up {}", u8::from(up));
            ensure!(metrics.contains(&line), "round {round}: {metrics}");
        }
        let mut guest = Guest::connect(device.connect()?, EVERYTHING, MERGEABLE)?;
        wait_status(&mut guest, LINK_UP)?;
        drop(guest);
        // The last that a session does.
        let end = Instant::now() + DEADLINE;
        while device.process.stderr()?.matches("totals").count() < 2 * round {
            ensure!(Instant::now() < end, "the session does not end");
            std::thread::sleep(LOOK);
        }
    }
    Ok(())
}

/// What the device process has used so far.
fn cpu_time(device: &Device) -> Result<Duration> {
    let clock = ClockId::pid_cpu_clock_id(device.process.pid())?;
    Ok(clock_gettime(clock)?.into())
}

/// Whether the guest receives a frame to `mac`; it does receive one behind it on `own`.
pub fn arrives(guest: &mut Guest, host: &Host, own: &Path, mac: [u8; 6], seed: u32) -> Result<bool> {
    let to = Path { to_mac: mac, ..*own };
    let sent = to.udp([1, 2], &pattern(100, seed), true);
    let behind = own.udp([1, 2], &pattern(50, seed), true);
    host.send(&[0; 10], &sent)?;
    host.send(&[0; 10], &behind)?;
    let first = guest.receive(DEADLINE)?.1;
    if first == sent {
        ensure!(guest.receive(DEADLINE)?.1 == behind);
        return Ok(true);
    }
    ensure!(first == behind, "neither frame");
    Ok(false)
}

fn the_driver_chooses() -> Result<()> {
    let device = Device::start(&[])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let mut guest = Guest::with_queues(device.connect()?, EVERYTHING, MERGEABLE, 3)?;
    guest.post(MERGEABLE.count)?;
    let own = Path::to_guest(&device.tap);
    let (foreign, group) = ([2, 9, 9, 9, 9, 9], [0x33, 0x33, 0, 0, 0, 9]);
    let arrives = |guest: &mut Guest, mac, seed| arrives(guest, &host, &own, mac, seed);
    ensure!(arrives(&mut guest, foreign, 1)?, "everything at first");
    ensure!(guest.control(CONTROL, &[0, 0, 0])? == OK, "promiscuous mode off");
    ensure!(!arrives(&mut guest, foreign, 2)?, "a foreign address");
    ensure!(!arrives(&mut guest, group, 3)?, "a group that was not asked for");
    ensure!(arrives(&mut guest, [0xff; 6], 4)?, "broadcast");
    let mut table = vec![1, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    table.extend(group);
    ensure!(guest.control(CONTROL, &table)? == OK, "the table");
    ensure!(arrives(&mut guest, group, 5)?, "a group from the table");
    ensure!(
        guest.control(CONTROL, &table[..table.len() - 1])? == ERROR,
        "a short table"
    );
    let mut long = vec![1, 0, 0, 0, 0, 0];
    long.extend(1000_u32.to_le_bytes());
    long.extend((0..1000_u16).flat_map(|index| [0x33, 0x33, 1, 0, (index >> 8) as u8, index as u8]));
    ensure!(guest.control(CONTROL, &long)? == OK, "a table of 1000 groups");
    ensure!(
        arrives(&mut guest, [0x33, 0x33, 1, 0, 3, 0xe7], 7)?,
        "the last of 1000 groups"
    );
    ensure!(guest.control(CONTROL, &table)? == OK, "the short table again");
    ensure!(!arrives(&mut guest, foreign, 8)?, "a foreign address again");
    long[0] = 4;
    ensure!(guest.control(CONTROL, &long)? == ERROR, "another long command");
    // The next driver starts afresh.
    drop(guest);
    let mut guest = Guest::start(device.connect()?, EVERYTHING, MERGEABLE)?;
    ensure!(arrives(&mut guest, foreign, 6)?, "everything after a reset");
    Ok(())
}

fn the_driver_changes_its_address() -> Result<()> {
    let set = |mac: [u8; 6]| [&[1, 1], &mac[..]].concat();
    let new = [2, 0, 0, 0, 9, 9];
    for (guard, expected) in [("on", ERROR), ("off", OK)] {
        let flag = format!("--guard={guard}");
        let device = Device::start(&[&flag])?;
        let mut guest = Guest::with_queues(device.connect()?, EVERYTHING, MERGEABLE, 3)?;
        let own = device.tap.guest_mac();
        ensure!(guest.control(CONTROL, &set(own))? == OK, "its own, guard {guard}");
        ensure!(
            guest.control(CONTROL, &set(new))? == expected,
            "another, guard {guard}"
        );
        ensure!(
            guest.control(CONTROL, &set([0xff; 6]))? == ERROR,
            "a group's, guard {guard}"
        );
        let config = guest.session.config(0, 6)?;
        let wanted = if expected == OK { new } else { own };
        ensure!(config == wanted, "{config:x?}, guard {guard}");
    }
    Ok(())
}

fn what_the_kernel_refuses() -> Result<()> {
    let device = Device::start(&["--guard=off"])?;
    let mut guest = Guest::with_queues(device.connect()?, EVERYTHING, MERGEABLE, 3)?;
    ensure!(guest.control(CONTROL, &[0, 0, 0])? == OK, "promiscuous mode off");
    ip(&format!("link delete {}", device.tap.name))?;
    ensure!(
        guest.control(CONTROL, &[1, 1, 2, 0, 0, 0, 9, 9])? == ERROR,
        "no TAP"
    );
    let config = guest.session.config(0, 6)?;
    ensure!(config == device.tap.guest_mac(), "{config:x?}");
    Ok(())
}

fn the_front_end_hears() -> Result<()> {
    const CONFIG_CHANGE: u32 = 2;
    let (theirs, orders): (OwnedFd, OwnedFd) = nix::unistd::pipe()?;
    let flags = ["--guard=off", "--link-fd=5"];
    let device = Device::with(TestTap::new("")?, &flags, [(theirs, 5)])?;
    let mut guest = Guest::with_queues(device.connect()?, EVERYTHING, MERGEABLE, 3)?;
    let mut channel = guest.listen()?;
    let mut hears = |what: &str| -> Result<()> {
        let mut message = [0; 12];
        channel.read_exact(&mut message).context(what.to_owned())?;
        ensure!(message[..4] == CONFIG_CHANGE.to_le_bytes(), "{message:?}");
        // One message a change.
        channel.set_nonblocking(true)?;
        let more = channel.read(&mut message).is_ok();
        channel.set_nonblocking(false)?;
        ensure!(!more, "more than one message: {what}");
        Ok(())
    };
    let set = |mac: [u8; 6]| [&[1, 1], &mac[..]].concat();
    ensure!(guest.control(CONTROL, &set(device.tap.guest_mac()))? == OK);
    ensure!(guest.control(CONTROL, &set([2, 0, 0, 0, 9, 9]))? == OK);
    hears("another address")?;
    nix::unistd::write(&orders, b"a")?;
    hears("ANNOUNCE")?;
    wait_status(&mut guest, LINK_UP | ANNOUNCE)?;
    ensure!(guest.control(CONTROL, &[3, 0])? == OK, "ANNOUNCE_ACK");
    hears("ANNOUNCE_ACK")?;
    wait_status(&mut guest, LINK_UP)
}

fn too_few_buffers() -> Result<()> {
    let device = Device::start(&[])?;
    let host = Host::new(&device.tap.name, device.tap.host_mac())?;
    let mut guest = Guest::connect(device.connect()?, EVERYTHING, MERGEABLE)?;
    guest.post(3)?;
    let path = Path::to_guest(&device.tap);
    // The kernel leaves super-frames whole: 40,000 bytes for 3 buffers of 1536.
    let long = path.tcp(1, &pattern(40_000, 1));
    for seed in 0..5 {
        host.send(&crate::cases::short(&crate::cases::tcp_segments()), &long)?;
        let behind = path.udp([1, 2], &pattern(100, seed), true);
        host.send(&[0; 10], &behind)?;
        ensure!(
            guest.receive(DEADLINE)?.1 == behind,
            "the frame behind long frame {seed}"
        );
    }
    ensure!(device.dropped("receive", "buffer")? == 5);
    Ok(())
}
