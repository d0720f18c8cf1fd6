use super::DeviceEvent;
use super::bus_master::PAUSE;
use super::layout::{NOTIFY, PBA};
use super::rig::{Rig, script};
use crate::frontend::Error;
use crate::frontend::fake_backend::{FakeBackend, Gate, Quirk, Script};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::time::Instant;
use vhost::vhost_user::message::FrontendReq as Req;

const OFF: u16 = 2;
const ON: u16 = 6;
const NEEDS_RESET: u8 = 0x40;

/// A device whose rings run and stop at 3 and 4.
fn running() -> Rig {
    running_with(Box::new(|_| Quirk::Normal))
}

fn running_with(quirk: Box<dyn FnMut(Req) -> Quirk + Send>) -> Rig {
    let rig = Rig::new(Script {
        bases: vec![3, 4],
        quirk,
        ..script()
    });
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    rig
}

/// The same, then stopped.
fn stopped() -> Rig {
    let rig = running();
    rig.set_command(OFF);
    settle(&rig);
    assert_eq!(count(&rig.fake, Req::GET_VRING_BASE), 2);
    rig
}

/// Waits until the device's thread has seen all that was left for it.
fn settle(rig: &Rig) {
    rig.device.resume().unwrap();
}

fn count(fake: &FakeBackend, request: Req) -> usize {
    fake.requests().iter().filter(|seen| **seen == request).count()
}

fn signal(mut event: File) {
    event.write_all(&1u64.to_ne_bytes()).unwrap();
}

#[test]
fn rings_and_messages_stop_and_go_on() {
    let rig = stopped();
    signal(rig.fake.fd(Req::SET_VRING_CALL, 2));
    rig.write(NOTIFY.start + 4, &1u16.to_le_bytes());
    settle(&rig);
    assert_eq!(rig.interrupts.injected(2), 0);
    assert_eq!(rig.read::<1>(PBA.start), [0b100]);
    assert_eq!(
        count(&rig.fake, Req::SET_VRING_KICK),
        2,
        "nor does the control thread start them"
    );
    rig.set_command(ON);
    assert_ne!(rig.interrupts.injected(2), 0, "what was pending");
    assert_eq!(rig.fake.look(Req::SET_VRING_BASE, 4, |seen| seen.payload[4]), 4);
    rig.fake.look(Req::SET_VRING_ENABLE, 4, |_| ());
    let mut rung = [0; 8];
    rig.fake.fd(Req::SET_VRING_KICK, 4).read_exact(&mut rung).unwrap();
    assert_eq!(rig.status(), 15);
    assert!(rig.events.try_recv().is_err(), "nothing was lost");
}

#[test]
fn a_broken_device_is_told_once_it_is_on() {
    let rig = stopped();
    signal(rig.fake.fd(Req::SET_VRING_ERR, 1));
    assert!(matches!(rig.event(), DeviceEvent::NeedsReset { .. }));
    assert_eq!(rig.interrupts.injected(0), 0);
    rig.set_command(ON);
    assert_eq!(rig.interrupts.injected(0), 1);
    assert_eq!(rig.status(), 15 | NEEDS_RESET);
}

#[test]
fn a_reset_is_done_and_the_next_start_waits() {
    let rig = stopped();
    rig.set_status(0);
    rig.wait_for("the reset", |rig| rig.status() == 0);
    rig.set_up_with(!0);
    assert_eq!(rig.status(), 15);
    settle(&rig);
    assert_eq!(count(&rig.fake, Req::SET_VRING_KICK), 2);
    rig.set_command(ON);
    assert_eq!(
        rig.fake.look(Req::SET_VRING_BASE, 6, |seen| seen.payload[4]),
        0,
        "as of a start"
    );
    rig.fake.look(Req::SET_VRING_ENABLE, 4, |_| ());
}

/// As a kernel does that another one has started by kexec.
#[test]
fn rings_that_are_reset_do_not_go_on_first() {
    let gate = Gate::default();
    let pass = gate.clone();
    let rig = running_with(Box::new(move |at| match at {
        Req::GET_VRING_BASE => Quirk::Wait(pass.clone()),
        _ => Quirk::Normal,
    }));
    rig.set_command(OFF);
    rig.fake.look(Req::GET_VRING_BASE, 1, |_| ());
    rig.set_command(ON);
    rig.set_status(0);
    gate.open();
    rig.wait_for("the reset", |rig| rig.status() == 0);
    assert_eq!(count(&rig.fake, Req::SET_VRING_KICK), 2);

    let rig = stopped();
    let began = Instant::now();
    rig.set_command(ON);
    settle(&rig);
    rig.set_status(0);
    let in_time = began.elapsed() < PAUSE;
    rig.wait_for("the reset", |rig| rig.status() == 0);
    // This thread may have had no CPU for so long.
    assert!(!in_time || count(&rig.fake, Req::SET_VRING_KICK) == 2);
    let kicks = count(&rig.fake, Req::SET_VRING_KICK);
    rig.drive();
    rig.fake.look(Req::SET_VRING_KICK, kicks + 2, |_| ());
}

#[test]
fn off_and_on_again_unseen_stops_the_rings_all_the_same() {
    let gate = Gate::default();
    let pass = gate.clone();
    let rig = running_with(Box::new(move |at| match at {
        Req::SET_CONFIG => Quirk::Wait(pass.clone()),
        _ => Quirk::Normal,
    }));
    rig.write(super::layout::DEVICE.start + 32, &[1]);
    rig.fake.look(Req::SET_CONFIG, 1, |_| ());
    rig.set_command(OFF);
    rig.set_command(ON);
    rig.set_status(0);
    gate.open();
    rig.wait_for("the reset", |rig| rig.status() == 0);
    assert_eq!(count(&rig.fake, Req::SET_VRING_KICK), 2);
    let rig = running();
    rig.set_command(OFF);
    rig.set_command(ON);
    rig.fake.look(Req::GET_VRING_BASE, 2, |_| ());
    rig.fake.look(Req::SET_VRING_ENABLE, 4, |_| ());
}

#[test]
fn a_successor_starts_no_ring_before() {
    let rig = stopped();
    let (heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    settle(&rig);
    assert_eq!(count(&heir, Req::SET_VRING_KICK), 0);
    rig.set_command(ON);
    assert_eq!(heir.look(Req::SET_VRING_BASE, 2, |seen| seen.payload[4]), 4);
    heir.look(Req::SET_VRING_ENABLE, 2, |_| ());
    assert!(rig.events.try_recv().is_err(), "nothing was lost");
}

#[test]
fn successors_of_the_dead_keep_what_is_in_flight() {
    let rig = running();
    let region = rig.fake.fd(Req::SET_INFLIGHT_FD, 1);
    region.write_all_at(b"in flight", 0).unwrap();
    rig.fake.kill();
    assert!(matches!(rig.event(), DeviceEvent::BackendLost { .. }));
    rig.set_command(OFF);
    let (heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    let (_without_record, sockets) = FakeBackend::start(Script {
        protocol: script().protocol & !(1 << 12),
        ..script()
    });
    let refused = rig.replace(sockets).unwrap_err();
    assert!(matches!(refused, Error::Successor(_)), "{refused:?}");
    let (next, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    settle(&rig);
    assert_eq!(count(&heir, Req::GET_VRING_BASE), 0, "it never had rings");
    assert_eq!(count(&next, Req::SET_VRING_KICK), 0);
    rig.set_command(ON);
    next.look(Req::SET_VRING_ENABLE, 2, |_| ());
    let mut kept = [0; 9];
    next.fd(Req::SET_INFLIGHT_FD, 1)
        .read_exact_at(&mut kept, 0)
        .unwrap();
    assert_eq!(&kept, b"in flight");
}

#[test]
fn one_that_does_not_stop_is_lost_and_its_successor_goes_on() {
    let rig = running_with(Box::new(|at| match at {
        Req::GET_VRING_BASE => Quirk::Close,
        _ => Quirk::Normal,
    }));
    rig.set_command(OFF);
    assert!(matches!(rig.event(), DeviceEvent::BackendLost { .. }));
    rig.set_command(ON);
    let (heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    heir.look(Req::SET_VRING_ENABLE, 2, |_| ());
    assert_eq!(rig.status(), 15);
}

#[test]
fn a_driver_that_never_switches_it_on_is_served() {
    let rig = Rig::new(script());
    rig.set_command(OFF);
    rig.set_up_with(!0);
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    rig.set_command(0);
    rig.set_command(OFF);
    signal(rig.fake.fd(Req::SET_VRING_CALL, 2));
    assert_eq!(rig.interrupts.injected(2), 1);
    rig.set_command(ON);
    settle(&rig);
    assert_eq!(count(&rig.fake, Req::GET_VRING_BASE), 0);
}

#[test]
fn the_machines_reset_forgets_that_it_was_off() {
    let rig = stopped();
    rig.bus.reset();
    rig.set_command(OFF);
    rig.set_up_with(!0);
    rig.fake.look(Req::SET_VRING_ENABLE, 4, |_| ());
    signal(rig.fake.fd(Req::SET_VRING_CALL, 4));
    assert_eq!(rig.interrupts.injected(2), 1);
    settle(&rig);
    assert_eq!(rig.status(), 15);
}
