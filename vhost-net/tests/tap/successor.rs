//! A process takes the place of one that died: what the launcher and the driver said once still holds.

use crate::cases::{short, tcp_segments};
use crate::frames::{Path, pattern};
use crate::guest::{DEADLINE, Guest, MERGEABLE};
use crate::host::Host;
use crate::link::{LINK_UP, arrives, wait_carrier, wait_status};
use crate::namespace::{TestTap, ip, text};
use crate::queues::{FEW, arriving, pairs_set};
use crate::{BINARY, Case};
use anyhow::{Context, Result, ensure};
use integration_tests::frontend_harness::request;
use integration_tests::process::{Process, inherit_at};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use vhost_net::header::NetHeader;
use vhost_net::tap::Tap;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

pub const ALL: &[Case] = &[
    ("a_successor_keeps_the_link_down", keeps_the_link_down),
    ("a_successor_keeps_the_pairs_in_use", keeps_the_pairs),
    (
        "a_successor_filters_by_what_it_is_told_alone",
        filters_by_what_it_is_told,
    ),
    ("a_successor_keeps_the_drivers_address", keeps_the_address),
    (
        "a_successor_finds_what_waits_for_its_driver_alone",
        finds_what_waits,
    ),
    ("a_successor_needs_no_tap", needs_no_tap),
    ("a_state_that_may_shrink_is_refused", a_state_that_may_shrink),
];

const EVERYTHING: u64 = !0;
const OK: u8 = 0;

/// What a launcher keeps between two processes.
struct Launcher {
    tap: TestTap,
    queues: Vec<Tap>,
    state: OwnedFd,
    guarded: bool,
}

impl Launcher {
    /// For a NIC of one pair, whose driver may choose another address.
    fn unguarded() -> Result<Self> {
        Ok(Self {
            guarded: false,
            ..Self::new(1)?
        })
    }

    fn new(pairs: usize) -> Result<Self> {
        let tap = TestTap::new(if pairs > 1 { " multi_queue" } else { "" })?;
        Ok(Self {
            queues: Tap::open(&tap.name, pairs)?,
            tap,
            state: page(SealFlag::F_SEAL_SHRINK)?,
            guarded: true,
        })
    }

    /// Starts a process on what there is; `orders` is for `--link-fd`.
    fn start(&self, orders: Option<OwnedFd>) -> Result<(Process, UnixStream)> {
        let mut command = Command::new(BINARY.get().context("no binary")?);
        let mac = text(&self.tap.guest_mac());
        command.args(["--fd=3", "--state-fd=4", &format!("--mac={mac}")]);
        command.arg(format!("--num-queues={}", 2 * self.queues.len()));
        inherit_at(&mut command, self.state.try_clone()?, 4)?;
        if !self.guarded {
            command.arg("--guard=off");
        }
        if let Some(orders) = orders {
            command.arg("--link-fd=5");
            inherit_at(&mut command, orders, 5)?;
        }
        for (number, queue) in (6..).zip(&self.queues) {
            command.arg(format!("--tap-fd={number}"));
            inherit_at(&mut command, queue.as_fd().try_clone_to_owned()?, number)?;
        }
        Process::start_with_socket(command)
    }

    /// The process dies; the driver goes on with another.
    fn replace(&self, process: Process, guest: Guest) -> Result<(Process, Guest)> {
        drop(process);
        let (process, socket) = self.start(None)?;
        Ok((process, guest.resume(socket)?))
    }
}

fn page(seals: SealFlag) -> Result<OwnedFd> {
    let fd = memfd_create("state", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&fd, 4096)?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(fd)
}

fn keeps_the_link_down() -> Result<()> {
    let launcher = Launcher::new(1)?;
    let (theirs, ours): (OwnedFd, OwnedFd) = nix::unistd::pipe()?;
    let (process, socket) = launcher.start(Some(theirs.try_clone()?))?;
    let mut guest = Guest::start(socket, EVERYTHING, MERGEABLE)?;
    wait_status(&mut guest, LINK_UP)?;
    nix::unistd::write(&ours, b"0")?;
    wait_status(&mut guest, 0)?;
    drop(process);
    // As it is when a launcher opens the TAP again.
    if let Some(queue) = launcher.queues.first() {
        queue.set_carrier(true)?;
    }
    let (_process, socket) = launcher.start(Some(theirs))?;
    let mut guest = Guest::start(socket, EVERYTHING, MERGEABLE)?;
    ensure!(
        guest.session.config(6, 2)? == [0, 0],
        "the link came up by itself"
    );
    wait_carrier(&launcher.tap, false)?;
    let path = Path::to_host(&launcher.tap);
    guest.send(NetHeader::default(), &path.udp([1, 2], &pattern(100, 1), true))?;
    nix::unistd::write(&ours, b"1")?;
    wait_carrier(&launcher.tap, true)?;
    let host = Host::new(&launcher.tap.name, launcher.tap.host_mac())?;
    let sent = path.udp([1, 2], &pattern(100, 2), true);
    guest.send(NetHeader::default(), &sent)?;
    ensure!(
        host.receive(DEADLINE)?.1 == sent,
        "a frame that was sent while the link was down"
    );
    Ok(())
}

fn keeps_the_pairs() -> Result<()> {
    const CONTROL: usize = 4;
    let launcher = Launcher::new(2)?;
    let (process, socket) = launcher.start(None)?;
    let mut guest = Guest::with_queues(socket, EVERYTHING, FEW, 5)?;
    launcher.tap.wait_up()?;
    let host = Host::new(&launcher.tap.name, launcher.tap.host_mac())?;
    let path = Path::to_guest(&launcher.tap);
    guest.post(FEW.count)?;
    ensure!(guest.control(CONTROL, &pairs_set(1))? == OK);
    // The queue that the first process detached is still detached.
    let (process, mut guest) = launcher.replace(process, guest)?;
    ensure!(
        arriving(&mut guest, &host, &path, 50)? == 50,
        "all flows to the only pair in use"
    );
    ensure!(guest.control(CONTROL, &pairs_set(2))? == OK);
    let before = arriving(&mut guest, &host, &path, 50)?;
    ensure!(
        (1..50).contains(&before),
        "{before} of 50 flows on the first pair"
    );
    let (_process, mut guest) = launcher.replace(process, guest)?;
    let after = arriving(&mut guest, &host, &path, 50)?;
    ensure!((1..50).contains(&after), "{after} of 50 flows on the first pair");
    guest.use_pair(1);
    guest.post(FEW.count)?;
    let second = arriving(&mut guest, &host, &path, 0)?;
    ensure!(after + second == 50, "{after} and {second} of 50 flows");
    Ok(())
}

fn filters_by_what_it_is_told() -> Result<()> {
    const CONTROL: usize = 2;
    let launcher = Launcher::unguarded()?;
    let (process, socket) = launcher.start(None)?;
    let mut guest = Guest::with_queues(socket, EVERYTHING, MERGEABLE, 3)?;
    launcher.tap.wait_up()?;
    guest.post(MERGEABLE.count)?;
    let host = Host::new(&launcher.tap.name, launcher.tap.host_mac())?;
    let chosen = [2, 7, 7, 7, 7, 7];
    let own = Path {
        to_mac: chosen,
        ..Path::to_guest(&launcher.tap)
    };
    let foreign = [2, 9, 9, 9, 9, 9];
    let set = |mac: [u8; 6]| [&[1, 1], &mac[..]].concat();
    let promiscuous_off = [0, 0, 0];
    ensure!(guest.control(CONTROL, &set(chosen))? == OK);
    ensure!(guest.control(CONTROL, &promiscuous_off)? == OK);
    ensure!(
        !arrives(&mut guest, &host, &own, foreign, 1)?,
        "a foreign address"
    );
    // What the first process filtered passes: nobody knows what the driver asked for.
    let (_process, mut guest) = launcher.replace(process, guest)?;
    ensure!(
        arrives(&mut guest, &host, &own, foreign, 2)?,
        "a filter that nobody asked this process for"
    );
    // It knows the address that the driver chose, which is not the one that it was given.
    ensure!(guest.control(CONTROL, &promiscuous_off)? == OK);
    ensure!(
        !arrives(&mut guest, &host, &own, foreign, 3)?,
        "a foreign address once there is a filter"
    );
    Ok(())
}

fn keeps_the_address() -> Result<()> {
    const CONTROL: usize = 2;
    let launcher = Launcher::unguarded()?;
    let (process, socket) = launcher.start(None)?;
    let mut guest = Guest::with_queues(socket, EVERYTHING, MERGEABLE, 3)?;
    let chosen = [2, 7, 7, 7, 7, 7];
    ensure!(guest.control(CONTROL, &[&[1, 1], &chosen[..]].concat())? == OK);
    let (mut process, mut guest) = launcher.replace(process, guest)?;
    ensure!(guest.session.config(0, 6)? == chosen, "after a kill");
    process.signal(Signal::SIGTERM)?;
    process.wait(DEADLINE)?;
    let (process, mut guest) = launcher.replace(process, guest)?;
    ensure!(guest.session.config(0, 6)? == chosen, "after a session's end");
    // The next driver has the address that was given, with this process and with another.
    guest.session.connection.tell(request::RESET_DEVICE, &[], &[])?;
    ensure!(guest.session.config(0, 6)? == launcher.tap.guest_mac());
    drop(process);
    let (_process, socket) = launcher.start(None)?;
    let mut guest = Guest::with_queues(socket, EVERYTHING, MERGEABLE, 3)?;
    ensure!(guest.session.config(0, 6)? == launcher.tap.guest_mac());
    Ok(())
}

fn finds_what_waits() -> Result<()> {
    let launcher = Launcher::new(1)?;
    let (process, socket) = launcher.start(None)?;
    let guest = Guest::connect(socket, EVERYTHING, MERGEABLE)?;
    launcher.tap.wait_up()?;
    let host = Host::new(&launcher.tap.name, launcher.tap.host_mac())?;
    let path = Path::to_guest(&launcher.tap);
    let long = path.tcp(1, &pattern(10_000, 1));
    let send_long = || host.send(&short(&tcp_segments()), &long);
    send_long()?;
    let (process, mut guest) = launcher.replace(process, guest)?;
    guest.post(10)?;
    ensure!(guest.receive(DEADLINE)?.1 == long, "what waited for the driver");
    // Another driver, which does not take it.
    drop(guest);
    drop(process);
    send_long()?;
    let (_process, socket) = launcher.start(None)?;
    let features = 1 << VIRTIO_NET_F_MRG_RXBUF;
    let mut guest = Guest::start(socket, features, MERGEABLE)?;
    let behind = path.udp([1, 2], &pattern(100, 2), true);
    host.send(&[0; 10], &behind)?;
    let frame = guest.receive(DEADLINE)?.1;
    ensure!(frame == behind, "{} bytes arrived", frame.len());
    Ok(())
}

/// The TAP vanishes while nobody serves: the successor tells, and offers what its predecessor did.
fn needs_no_tap() -> Result<()> {
    for pairs in [1, 2] {
        let launcher = Launcher::new(pairs)?;
        let (process, socket) = launcher.start(None)?;
        let mut guest = Guest::start(socket, EVERYTHING, FEW)?;
        let promised = guest.session.features;
        wait_status(&mut guest, LINK_UP)?;
        drop(process);
        ip(&format!("link delete {}", launcher.tap.name))?;
        for _ in 0..2 {
            let (process, socket) = launcher.start(None)?;
            let mut guest = Guest::start(socket, EVERYTHING, FEW)?;
            ensure!(guest.session.features == promised, "other features");
            wait_status(&mut guest, 0)?;
            let path = Path::to_host(&launcher.tap);
            guest.send(NetHeader::default(), &path.udp([1, 2], &pattern(100, 1), true))?;
            let said = process.stderr()?;
            ensure!(said.contains("event: tap-lost: "), "{said}");
        }
        // The first process of a NIC is wrong where it has no TAP.
        let first = Launcher {
            state: page(SealFlag::F_SEAL_SHRINK)?,
            ..launcher
        };
        let (mut process, _socket) = first.start(None)?;
        ensure!(process.wait(DEADLINE)?.code() == Some(1));
        let said = process.stderr()?;
        ensure!(said.contains("no interface"), "{said}");
    }
    Ok(())
}

fn a_state_that_may_shrink() -> Result<()> {
    let launcher = Launcher {
        state: page(SealFlag::F_SEAL_GROW)?,
        ..Launcher::new(1)?
    };
    let (mut process, _socket) = launcher.start(None)?;
    let status = process.wait(DEADLINE)?;
    let log = process.stderr()?;
    ensure!(
        status.code() == Some(1) && log.contains("--state-fd: is not sealed"),
        "{status}: {log}"
    );
    Ok(())
}
