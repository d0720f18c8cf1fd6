use super::DeviceEvent;
use super::layout::DEVICE;
use super::rig::{Rig, script, spec};
use crate::frontend::fake_backend::{FakeBackend, Gate, Quirk, Script, deadlines};
use crate::frontend::{Deadlines, Error};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vhost::vhost_user::message::{FrontendReq as Req, VhostUserProtocolFeatures as Protocol};
use vm_spec::control::DeviceConfig;

const NEEDS_RESET: u8 = 0x40;
/// `writeback` of a disk (virtio 1.3, 5.2.4).
const WRITEBACK: u64 = 32;

#[test]
fn a_successor_takes_over_after_a_crash() {
    let rig = Rig::new(script());
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    let region = rig.fake.fd(Req::SET_INFLIGHT_FD, 1);
    region.write_all_at(b"in flight", 0).unwrap();
    let ram = File::from(rig.memory.memfd().try_clone_to_owned().unwrap());
    ram.write_all_at(&[5, 1], Rig::used_index(1)).unwrap();
    rig.fake.kill();
    assert!(matches!(rig.event(), DeviceEvent::BackendLost { .. }));
    // One that lacks a feature is refused, and another may be tried.
    let (_poor, sockets) = FakeBackend::start(Script {
        features: 1 << 32 | 1 << 30,
        ..script()
    });
    let refused = rig.replace(sockets).unwrap_err();
    assert!(matches!(refused, Error::Successor(_)), "{refused:?}");
    let (heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    assert_eq!(rig.status(), 15, "the guest sees nothing");
    assert_eq!(
        heir.look(Req::SET_VRING_BASE, 2, |seen| seen.payload.clone()),
        [1, 0, 0, 0, 5, 1, 0, 0]
    );
    let mut kept = [0; 9];
    heir.fd(Req::SET_INFLIGHT_FD, 1)
        .read_exact_at(&mut kept, 0)
        .unwrap();
    assert_eq!(&kept, b"in flight");
    assert!(!heir.requests().contains(&Req::GET_INFLIGHT_FD));
    let mut count = [0; 8];
    heir.fd(Req::SET_VRING_KICK, 2).read_exact(&mut count).unwrap();
    assert_eq!(
        rig.interrupts.injected(2),
        1,
        "one interrupt for what was completed unsaid"
    );
    // The driver's reset empties the region.
    rig.set_status(0);
    rig.wait_for("the reset", |rig| rig.status() == 0);
    region.read_exact_at(&mut kept, 0).unwrap();
    assert_eq!(kept, [0; 9]);
}

#[test]
fn a_successor_is_heard_at_once_whatever_its_predecessor_did_to_its_channel() {
    let shut = |channel: &UnixStream| channel.shutdown(std::net::Shutdown::Both);
    let half = |mut channel: &UnixStream| channel.write_all(&[2, 0, 0, 0, 1]);
    for misuse in [shut, half] {
        let rig = Rig::new(script());
        rig.drive();
        rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
        let channel = UnixStream::from(OwnedFd::from(rig.fake.fd(Req::SET_BACKEND_REQ_FD, 1)));
        misuse(&channel).unwrap();
        rig.fake.kill();
        assert!(matches!(rig.event(), DeviceEvent::BackendLost { .. }));
        let heirs = script();
        let config = heirs.config.clone();
        let (heir, sockets) = FakeBackend::start(heirs);
        rig.replace(sockets).unwrap();
        assert_eq!((rig.config(0), rig.interrupts.injected(0)), (8, 0));
        config.lock().unwrap()[0] = 16;
        let mut requests = UnixStream::from(OwnedFd::from(heir.fd(Req::SET_BACKEND_REQ_FD, 1)));
        tell_of_a_change(&requests, WANTS_REPLY);
        rig.wait_for("the interrupt", |rig| rig.interrupts.injected(0) == 1);
        assert_eq!(rig.config(0), 16);
        requests.set_nonblocking(true).unwrap();
        let mut answers = [0; 40];
        assert_eq!(
            requests.read(&mut answers).unwrap(),
            20,
            "to its own request alone"
        );
    }
}

/// CONFIG_CHANGE_MSG of version 1, with more flags.
fn tell_of_a_change(mut requests: impl Write, flags: u8) {
    requests
        .write_all(&[2, 0, 0, 0, 1 | flags, 0, 0, 0, 0, 0, 0, 0])
        .unwrap();
}

const WANTS_REPLY: u8 = 1 << 3;

#[test]
fn a_successor_that_fails_as_it_starts_may_have_served_a_ring() {
    let rig = Rig::new(Script {
        bases: vec![3, 4],
        ..script()
    });
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    let ram = File::from(rig.memory.memfd().try_clone_to_owned().unwrap());
    let mut enabled = 0;
    let quirk = move |at| {
        enabled += u8::from(at == Req::SET_VRING_ENABLE);
        if enabled < 2 {
            return Quirk::Normal;
        }
        ram.write_all_at(&[9], Rig::used_index(1)).unwrap();
        Quirk::Close
    };
    let (_poor, sockets) = FakeBackend::start(Script {
        quirk: Box::new(quirk),
        ..script()
    });
    rig.replace(sockets).unwrap_err();
    assert!(matches!(rig.event(), DeviceEvent::BackendLost { .. }));
    let (heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    assert_eq!(
        heir.look(Req::SET_VRING_BASE, 2, |seen| seen.payload[4]),
        9,
        "where it stands now, not where it was drained"
    );
}

/// A slow disk under the successor of a dead process is no hang; a build that does not answer is one.
#[test]
fn a_successor_of_the_dead_may_wait_for_the_disk() {
    let first_answer = Duration::from_millis(200);
    let times = Deadlines {
        first_answer,
        ..deadlines()
    };
    let rig = Rig::with_deadlines(script(), times);
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    let late = |gate: &Gate| {
        let gate = gate.clone();
        FakeBackend::start(Script {
            features: script().features,
            config: script().config,
            ..Script::quirk_at(Req::GET_FEATURES, move || Quirk::Wait(gate.clone()))
        })
    };
    let shut = Gate::default();
    let (_build, sockets) = late(&shut);
    rig.replace(sockets).unwrap_err();
    shut.open();
    rig.fake.kill();
    assert!(matches!(rig.event(), DeviceEvent::BackendLost { .. }));
    let gate = Gate::default();
    let (_heir, sockets) = late(&gate);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(2 * first_answer);
            gate.open();
        });
        rig.replace(sockets).unwrap();
    });
}

/// A passphrase is tried for longer than a process may take to answer that is no process of ours.
#[test]
fn the_first_process_of_ours_may_open_its_files() {
    let first_answer = Duration::from_millis(200);
    let times = Deadlines {
        first_answer,
        ..deadlines()
    };
    let gate = Gate::default();
    let quirk = gate.clone();
    let late = Script {
        features: script().features,
        config: script().config,
        ..Script::quirk_at(Req::GET_FEATURES, move || Quirk::Wait(quirk.clone()))
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(2 * first_answer);
            gate.open();
        });
        Rig::with_deadlines(late, times).drive();
    });
}

#[test]
fn a_live_back_end_is_drained_before_it_is_replaced() {
    let rig = Rig::new(Script {
        bases: vec![3, 4],
        ..script()
    });
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    let (_legacy, sockets) = FakeBackend::start(Script {
        features: 1 << 30,
        ..script()
    });
    let refused = rig.replace(sockets).unwrap_err();
    assert!(matches!(refused, Error::NoVersion1));
    // The old one goes on from where it was drained.
    assert_eq!(rig.fake.look(Req::SET_VRING_BASE, 4, |seen| seen.payload[4]), 4);
    rig.fake.look(Req::SET_VRING_ENABLE, 4, |_| ());
    let (heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    assert_eq!(heir.look(Req::SET_VRING_BASE, 2, |seen| seen.payload[4]), 4);
    assert!(rig.events.try_recv().is_err(), "nothing was lost");
}

#[test]
fn what_a_drained_back_end_left_in_its_record_is_only_for_one_that_reads_it() {
    let rig = Rig::new(Script {
        bases: vec![3, 4],
        ..script()
    });
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    let ram = File::from(rig.memory.memfd().try_clone_to_owned().unwrap());
    let complete = |queue, index: u16| {
        ram.write_all_at(&index.to_le_bytes(), Rig::used_index(queue))
            .unwrap();
    };
    let without_record = || {
        FakeBackend::start(Script {
            protocol: script().protocol & !Protocol::INFLIGHT_SHMFD.bits(),
            ..script()
        })
    };
    complete(0, 3);
    complete(1, 2);
    let (_forgetful, sockets) = without_record();
    let refused = rig.replace(sockets).unwrap_err();
    assert!(
        matches!(refused, Error::Successor(why) if why.contains("in flight")),
        "{refused:?}"
    );
    // The old one takes them up itself.
    rig.fake.look(Req::SET_INFLIGHT_FD, 2, |_| ());
    rig.fake.look(Req::SET_VRING_ENABLE, 4, |_| ());
    complete(1, 4);
    let (heir, sockets) = without_record();
    rig.replace(sockets).unwrap();
    let agreed = heir.look(Req::SET_PROTOCOL_FEATURES, 1, |seen| seen.payload.clone());
    let agreed = u64::from_le_bytes(agreed.try_into().unwrap());
    assert_eq!(
        agreed & Protocol::GET_VRING_BASE_INFLIGHT.bits(),
        0,
        "it would leave requests in a record that it has not"
    );
}

#[test]
fn the_next_driver_is_not_offered_what_a_successor_lacks() {
    const VERSION_1: u64 = 1 << 32;
    let rig = Rig::new(script());
    rig.drive_with(VERSION_1);
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    let offered = rig.offered();
    assert_ne!(offered, VERSION_1);
    let (_poor, sockets) = FakeBackend::start(Script {
        features: VERSION_1 | 1 << 30,
        ..script()
    });
    rig.replace(sockets).unwrap();
    assert_eq!(rig.offered(), offered, "not while this one runs");
    rig.set_status(0);
    rig.wait_for("the reset", |rig| rig.status() == 0);
    assert_eq!(rig.offered(), VERSION_1);
}

#[test]
fn a_device_with_no_record_is_not_restarted_blindly() {
    let rig = Rig::new(Script {
        protocol: script().protocol & !(1 << 12),
        ..script()
    });
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    rig.fake.kill();
    rig.event();
    let (heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    assert!(matches!(rig.event(), DeviceEvent::NeedsReset { reason, .. } if reason.contains("no record")));
    assert_eq!(rig.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(
        heir.requests()
            .iter()
            .filter(|request| **request == Req::SET_VRING_KICK)
            .count(),
        0,
        "its rings are not started before the driver's reset"
    );
    rig.set_status(0);
    rig.wait_for("the reset", |rig| rig.status() == 0);
    rig.drive();
    heir.look(Req::SET_VRING_ENABLE, 2, |_| ());
}

#[test]
fn what_a_drained_back_end_had_taken_is_lost_with_it() {
    for (used, resumed) in [(4u8, true), (2, false)] {
        let vsock = DeviceConfig {
            device_type: 19,
            ours: false,
            ..spec()
        };
        let without_record = || Script {
            protocol: script().protocol & !Protocol::INFLIGHT_SHMFD.bits(),
            config: Arc::new(Mutex::new(vec![0; 8])),
            bases: vec![0, 4],
            ..Script::default()
        };
        let rig = Rig::with(vsock, without_record());
        rig.drive();
        rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
        let ram = File::from(rig.memory.memfd().try_clone_to_owned().unwrap());
        ram.write_all_at(&[used], Rig::used_index(1)).unwrap();
        rig.device.drain().unwrap();
        kill(&rig);
        let (heir, sockets) = FakeBackend::start(without_record());
        rig.replace(sockets).unwrap();
        if resumed {
            assert_eq!(heir.look(Req::SET_VRING_BASE, 2, |seen| seen.payload[4]), 4);
        } else {
            assert!(matches!(rig.event(), DeviceEvent::NeedsReset { .. }));
        }
    }
}

#[test]
fn a_device_that_completes_in_order_needs_no_record() {
    let without_record = || Script {
        protocol: script().protocol & !(1 << 12),
        ..script()
    };
    let config = DeviceConfig {
        ours: false,
        in_order: true,
        ..spec()
    };
    let rig = Rig::with(config, without_record());
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    rig.fake.kill();
    rig.event();
    let (heir, sockets) = FakeBackend::start(without_record());
    rig.replace(sockets).unwrap();
    heir.look(Req::SET_VRING_ENABLE, 2, |_| ());
    assert_eq!(rig.status() & NEEDS_RESET, 0);
}

/// A disk that begins with a cache (VIRTIO_BLK_F_CONFIG_WCE) and takes the order to do without.
fn with_cache() -> Script {
    let script = script();
    let config = script.config.clone();
    config.lock().unwrap()[WRITEBACK as usize] = 1;
    let quirk = move |at| {
        if at == Req::SET_CONFIG {
            config.lock().unwrap()[WRITEBACK as usize] = 0;
        }
        Quirk::Normal
    };
    Script {
        features: script.features | 1 << 11,
        quirk: Box::new(quirk),
        ..script
    }
}

/// One that refuses it.
fn stubborn() -> Script {
    let quirk = |at| match at {
        Req::SET_CONFIG => Quirk::Payload(vec![1, 0, 0, 0, 0, 0, 0, 0]),
        _ => Quirk::Normal,
    };
    Script {
        quirk: Box::new(quirk),
        ..with_cache()
    }
}

/// The cache of a back end that runs is turned off.
fn without_cache() -> Rig {
    let rig = Rig::new(with_cache());
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    rig.write(DEVICE.start + WRITEBACK, &[0]);
    rig.wait_for("the back end's own word for it", |rig| rig.config(WRITEBACK) == 0);
    rig.wait_for("the interrupt", |rig| rig.interrupts.injected(0) == 1);
    rig
}

fn kill(rig: &Rig) {
    rig.fake.kill();
    assert!(matches!(rig.event(), DeviceEvent::BackendLost { .. }));
}

/// What the back end was told of its configuration, and whether its rings ran before.
fn told(fake: &FakeBackend) -> (Vec<u8>, bool) {
    let payload = fake.look(Req::SET_CONFIG, 1, |seen| seen.payload.clone());
    let requests = fake.requests();
    let first = |request| requests.iter().position(|r| *r == request);
    let late = first(Req::SET_VRING_KICK).is_some_and(|kick| Some(kick) < first(Req::SET_CONFIG));
    (payload, late)
}

const CACHE_OFF: [u8; 13] = [WRITEBACK as u8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn a_successor_is_configured_as_the_driver_left_its_predecessor() {
    let rig = without_cache();
    kill(&rig);
    let (_unfit, sockets) = FakeBackend::start(stubborn());
    let refused = rig.replace(sockets).unwrap_err();
    assert!(matches!(refused, Error::Successor(_)), "{refused:?}");
    let (heir, sockets) = FakeBackend::start(with_cache());
    rig.replace(sockets).unwrap();
    heir.look(Req::SET_VRING_ENABLE, 2, |_| ());
    assert_eq!(told(&heir), (CACHE_OFF.to_vec(), false));
    assert_eq!(rig.config(WRITEBACK), 0);
    assert_eq!(rig.interrupts.injected(0), 1, "nothing has changed");
}

/// One that dies of the order to do without a cache.
fn fragile(protocol: u64) -> Script {
    let close = |at| match at {
        Req::SET_CONFIG => Quirk::Close,
        _ => Quirk::Normal,
    };
    Script {
        protocol,
        quirk: Box::new(close),
        ..with_cache()
    }
}

/// It has died of it.
fn killed_by_a_write(protocol: u64) -> Rig {
    let rig = Rig::new(fragile(protocol));
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    rig.write(DEVICE.start + WRITEBACK, &[0]);
    assert!(matches!(rig.event(), DeviceEvent::BackendLost { .. }));
    rig.device.drain().unwrap_err();
    rig
}

#[test]
fn a_write_that_a_back_end_died_of_reaches_its_successor() {
    let rig = killed_by_a_write(script().protocol);
    assert_eq!(rig.config(WRITEBACK), 1, "the driver flushes until it need not");
    let (heir, sockets) = FakeBackend::start(with_cache());
    rig.replace(sockets).unwrap();
    assert_eq!(told(&heir), (CACHE_OFF.to_vec(), false));
    assert_eq!(rig.config(WRITEBACK), 0);
}

#[test]
fn a_write_that_two_back_ends_died_of_reaches_no_third() {
    let all = script().protocol;
    for protocol in [all, all & !Protocol::REPLY_ACK.bits()] {
        let rig = killed_by_a_write(protocol);
        let (second, sockets) = FakeBackend::start(fragile(protocol));
        rig.replace(sockets).unwrap_err();
        second.look(Req::SET_CONFIG, 1, |_| ());
        let (third, sockets) = FakeBackend::start(fragile(protocol));
        rig.replace(sockets).unwrap();
        third.look(Req::SET_VRING_ENABLE, 2, |_| ());
        assert!(!third.requests().contains(&Req::SET_CONFIG));
        assert_eq!(rig.config(WRITEBACK), 1);
    }
}

#[test]
fn what_the_first_to_hear_of_it_refuses_is_forgotten() {
    let rig = Rig::new(stubborn());
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    kill(&rig);
    // As it is already, and another.
    rig.write(DEVICE.start + WRITEBACK, &[1]);
    rig.write(DEVICE.start + WRITEBACK + 1, &[1]);
    for _ in 0..2 {
        let (heir, sockets) = FakeBackend::start(stubborn());
        rig.replace(sockets).unwrap();
        assert_eq!([0, 1].map(|at| rig.config(WRITEBACK + at)), [1, 0]);
        heir.kill();
        assert!(matches!(rig.event(), DeviceEvent::BackendLost { .. }));
    }
}

#[test]
fn a_successor_is_not_told_what_its_predecessor_did_not_take() {
    let rig = Rig::new(script());
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    rig.write(DEVICE.start + WRITEBACK, &[1]);
    rig.fake.look(Req::SET_CONFIG, 1, |_| ());
    rig.device.drain().unwrap();
    assert_eq!(rig.config(WRITEBACK), 0);
    rig.device.resume().unwrap();
    kill(&rig);
    let (heir, sockets) = FakeBackend::start(script());
    rig.replace(sockets).unwrap();
    assert!(!heir.requests().contains(&Req::SET_CONFIG));
}

#[test]
fn a_successor_is_as_a_reset_left_its_predecessor() {
    for undone in [false, true] {
        let script = with_cache();
        let config = script.config.clone();
        let mut inner = script.quirk;
        let quirk = move |at| {
            if at == Req::RESET_DEVICE && undone {
                config.lock().unwrap()[WRITEBACK as usize] = 1;
            }
            inner(at)
        };
        let rig = Rig::new(Script {
            quirk: Box::new(quirk),
            ..script
        });
        rig.drive();
        rig.write(DEVICE.start + WRITEBACK, &[0]);
        rig.fake.look(Req::SET_CONFIG, 1, |_| ());
        rig.set_status(0);
        rig.wait_for("the reset", |rig| rig.status() == 0);
        assert_eq!(rig.config(WRITEBACK), u8::from(undone));
        kill(&rig);
        let (heir, sockets) = FakeBackend::start(with_cache());
        rig.replace(sockets).unwrap();
        assert_eq!(heir.requests().contains(&Req::SET_CONFIG), !undone);
        assert_eq!(rig.config(WRITEBACK), u8::from(undone));
    }
}
