use super::DeviceEvent;
use super::layout::DEVICE;
use super::rig::{Rig, script, spec};
use crate::frontend::fake_backend::{FakeBackend, Quirk, Script, deadlines, sockets};
use crate::frontend::{Deadlines, Error};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{FrontendReq as Req, VhostUserProtocolFeatures as Protocol};
use vm_spec::control::{DeviceConfig, Loss};

/// A device that was lost while its rings ran; its process has so long to end.
fn lost(end: Duration) -> Rig {
    lost_of(spec(), end)
}

fn lost_of(config: DeviceConfig, end: Duration) -> Rig {
    let rig = Rig::build(config, script(), Deadlines { end, ..deadlines() });
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    rig.fake.kill();
    assert!(matches!(rig.event(), DeviceEvent::BackendLost { .. }));
    rig
}

/// Longer than any test.
const LONG: Duration = Duration::from_secs(600);

/// Waits until the device's thread has seen all that was left for it.
fn settle(rig: &Rig) {
    assert_eq!(rig.device.drain().unwrap(), []);
}

#[test]
fn a_reset_is_done_once_the_lost_back_end_has_a_successor() {
    let rig = lost(LONG);
    rig.set_status(0);
    settle(&rig);
    assert_eq!(rig.status(), 15, "it may still write");
    let (heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    rig.wait_for("the reset", |rig| rig.status() == 0);
    rig.drive();
    heir.look(Req::SET_VRING_ENABLE, 2, |_| ());
    rig.set_status(0);
    rig.wait_for("the reset", |rig| rig.status() == 0);
}

#[test]
fn a_successor_is_told_of_a_reset_that_its_predecessor_did_not_hear_of() {
    let of_a_driver = [9, 0, 0, 0, 0, 0, 0, 0];
    let rig = lost(LONG);
    rig.set_status(0);
    settle(&rig);
    let heirs = script();
    let space = heirs.config.clone();
    space.lock().unwrap()[..8].copy_from_slice(&of_a_driver);
    let quirk = move |at| {
        if at == Req::RESET_DEVICE {
            space.lock().unwrap()[0] = 8;
        }
        Quirk::Normal
    };
    let (_heir, sockets) = FakeBackend::start(Script {
        quirk: Box::new(quirk),
        ..heirs
    });
    rig.replace(sockets).unwrap();
    rig.wait_for("the reset", |rig| rig.status() == 0);
    assert_eq!(rig.config(0), 8, "as after a reset");
}

#[test]
fn a_reset_is_done_once_the_device_is_given_up() {
    let rig = lost(LONG);
    rig.set_status(0);
    settle(&rig);
    assert_eq!(rig.status(), 15);
    rig.device.give_up("no successor");
    rig.wait_for("the reset", |rig| rig.status() == 0);
    assert!(matches!(rig.event(), DeviceEvent::NeedsReset { .. }));
    // Nothing is waited for any more.
    rig.bus.reset();
}

#[test]
fn a_reset_is_done_in_the_end_if_nobody_says_anything() {
    let rig = lost(Duration::from_millis(50));
    rig.set_status(0);
    rig.wait_for("the reset", |rig| rig.status() == 0);
}

#[test]
fn the_machine_hears_of_a_reset_that_was_held() {
    let rig = lost(LONG);
    rig.bus.begin_reset();
    settle(&rig);
    assert!(rig.device.is_resetting());
    let (_heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    assert_eq!(rig.event(), DeviceEvent::WasReset);
    assert!(!rig.device.is_resetting());
    rig.bus.finish_reset();
    rig.set_command(2);
    assert_eq!(rig.status(), 0);
}

#[test]
fn what_a_lost_back_end_notes_while_a_reset_is_held_is_forgotten() {
    let rig = lost(LONG);
    let region = rig.fake.fd(Req::SET_INFLIGHT_FD, 1);
    rig.set_status(0);
    settle(&rig);
    assert_eq!(rig.status(), 15);
    region.write_all_at(b"in flight", 0).unwrap();
    // The next driver is there before the next back end, which takes over that one's record.
    rig.device.give_up("no successor");
    rig.wait_for("the reset", |rig| rig.status() == 0);
    rig.drive();
    let (heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    let mut noted = [0xFF; 9];
    heir.fd(Req::SET_INFLIGHT_FD, 1)
        .read_exact_at(&mut noted, 0)
        .unwrap();
    assert!(!heir.requests().contains(&Req::GET_INFLIGHT_FD));
    assert_eq!(noted, [0; 9]);
}

#[test]
fn the_end_of_the_vm_waits_for_no_lost_back_end() {
    let rig = lost(LONG);
    rig.set_status(0);
    settle(&rig);
    let began = Instant::now();
    rig.device.refuse_successors();
    rig.bus.reset();
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn the_next_driver_finds_a_nics_configuration_as_the_reset_has_left_it() {
    let script = Script::default();
    let space = script.config.clone();
    let of_drivers = [2, 0, 0, 0, 9, 9, 3, 0];
    let after_reset = [2, 0, 0, 0, 0, 1, 1, 0];
    *space.lock().unwrap() = of_drivers.to_vec();
    let nic = DeviceConfig {
        device_type: 1,
        num_queues: None,
        ..spec()
    };
    let rig = Rig::with(nic, script);
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    assert_eq!(rig.read::<8>(DEVICE.start), of_drivers);
    *space.lock().unwrap() = after_reset.to_vec();
    rig.set_status(0);
    rig.wait_for("the reset", |rig| rig.status() == 0);
    assert_eq!(rig.read::<8>(DEVICE.start), after_reset);
}

fn others() -> DeviceConfig {
    DeviceConfig {
        ours: false,
        ..spec()
    }
}

/// A connection that a listener's backlog took, though nobody serves it.
fn unanswered(rig: &Rig) {
    let (_listener, socket) = UnixStream::pair().unwrap();
    let error = rig.replace(sockets(socket)).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[test]
fn a_connection_does_not_say_that_someone_elses_back_end_has_let_go() {
    let quirk = |at| match at {
        Req::GET_VRING_BASE => Quirk::Silent,
        _ => Quirk::Normal,
    };
    let stalled = Script {
        quirk: Box::new(quirk),
        ..script()
    };
    let times = Deadlines {
        drain: Duration::from_secs(1),
        end: LONG,
        ..deadlines()
    };
    let rig = Rig::build(others(), stalled, times);
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    rig.set_status(0);
    match rig.event() {
        DeviceEvent::BackendLost { loss, .. } => assert_eq!(loss, Loss::Silent),
        other => panic!("{other:?}"),
    }
    unanswered(&rig);
    settle(&rig);
    assert_eq!(rig.status(), 15, "the old one may still write");
    // One that answers has ended the session before.
    let (heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    rig.wait_for("the reset", |rig| rig.status() == 0);
    rig.drive();
    heir.look(Req::SET_VRING_ENABLE, 2, |_| ());
}

/// Someone else's back end that says at once where a ring stands, with 8 requests taken and 5 completed.
fn hasty(drain: Duration) -> (Rig, File) {
    let hasty = Script {
        protocol: script().protocol & !Protocol::GET_VRING_BASE_INFLIGHT.bits(),
        bases: vec![8, 0],
        ..script()
    };
    let times = Deadlines {
        drain,
        end: LONG,
        ..deadlines()
    };
    let rig = Rig::build(others(), hasty, times);
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    let ram = File::from(rig.memory.memfd().try_clone_to_owned().unwrap());
    ram.write_all_at(&[5, 0], Rig::used_index(0)).unwrap();
    rig.set_status(0);
    rig.fake.look(Req::GET_VRING_BASE, 2, |_| ());
    (rig, ram)
}

#[test]
fn a_reset_waits_for_what_someone_elses_back_end_has_taken() {
    let (rig, ram) = hasty(deadlines().drain);
    assert_eq!(rig.status(), 15, "it may still write");
    ram.write_all_at(&[8, 0], Rig::used_index(0)).unwrap();
    rig.wait_for("the reset", |rig| rig.status() == 0);
    assert!(rig.events.try_recv().is_err(), "nothing was lost");
    let (rig, _) = hasty(Duration::from_millis(200));
    match rig.event() {
        DeviceEvent::BackendLost { loss, .. } => assert_eq!(loss, Loss::Silent),
        other => panic!("{other:?}"),
    }
    settle(&rig);
    assert_eq!(rig.status(), 15, "it may still write");
    let (_heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    rig.wait_for("the reset", |rig| rig.status() == 0);
}

#[test]
fn a_reset_waits_for_someone_elses_back_end_though_nobody_can_connect_to_it() {
    let rig = lost_of(others(), LONG);
    rig.set_status(0);
    rig.device.give_up("no connector");
    assert!(matches!(rig.event(), DeviceEvent::NeedsReset { .. }));
    settle(&rig);
    assert_ne!(rig.status(), 0, "it may still write");
    let rig = lost_of(others(), Duration::from_millis(50));
    rig.device.give_up("no connector");
    rig.set_status(0);
    rig.wait_for("the reset", |rig| rig.status() == 0);
}

#[test]
fn a_connection_without_an_answer_makes_no_reset_longer() {
    let rig = lost_of(others(), Duration::from_secs(1));
    rig.set_status(0);
    let began = Instant::now();
    unanswered(&rig);
    rig.wait_for("the reset", |rig| rig.status() == 0);
    assert!(began.elapsed() < deadlines().drain / 2);
}
