use super::rig::{self, Rig, script, spec};
use super::{DeviceEvent, DeviceParts};
use crate::frontend::fake_backend::{FakeBackend, Gate, Quirk, Script, deadlines, memory};
use crate::frontend::{Deadlines, Error, QueueState, SharedEvent};
use crate::pci::fakes::{FakeDoorbells, FakeInterrupts};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::FrontendReq as Req;
use vm_spec::control::{DeviceConfig, Loss};

const NEEDS_RESET: u8 = 0x40;

fn signal(mut event: File) {
    event.write_all(&1u64.to_ne_bytes()).unwrap();
}

/// The script, stopped at each GET_VRING_BASE until the gate opens.
fn gated() -> (Gate, Script) {
    let gate = Gate::default();
    let pass = gate.clone();
    let quirk = move |at| match at {
        Req::GET_VRING_BASE => Quirk::Wait(pass.clone()),
        _ => Quirk::Normal,
    };
    (
        gate,
        Script {
            quirk: Box::new(quirk),
            ..script()
        },
    )
}

#[test]
fn a_driver_starts_the_rings_and_gets_their_interrupts() {
    let rig = Rig::new(script());
    assert!(!rig.device.driven());
    rig.drive();
    let call = rig.fake.fd(Req::SET_VRING_CALL, 2);
    let enabled = rig.fake.look(Req::SET_VRING_ENABLE, 2, |seen| seen.payload[0]);
    assert_eq!(enabled, 1);
    assert!(rig.device.driven());
    signal(call);
    // GSIs are given in the order of vectors: queue 1 has vector 2.
    assert_eq!([0, 1, 2].map(|gsi| rig.interrupts.injected(gsi)), [0, 0, 1]);
    // A doorbell that KVM did not take reaches the back end all the same.
    let mut kick = rig.fake.fd(Req::SET_VRING_KICK, 2);
    rig.write(super::layout::NOTIFY.start + 4, &1u16.to_le_bytes());
    let mut count = [0; 8];
    rig.wait_for("the kick", |_| kick.read_exact(&mut count).is_ok());
    assert_eq!(count[0], 1);
}

#[test]
fn a_reset_in_flight_reads_as_not_done_until_drained() {
    let (gate, script) = gated();
    let rig = Rig::new(script);
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    let began = Instant::now();
    rig.set_status(0);
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "the vCPU does not wait for the drain"
    );
    rig.fake.look(Req::GET_VRING_BASE, 1, |_| ());
    assert_eq!(rig.status(), 15);
    // Whatever the driver does meanwhile has no effect.
    rig.set_status(0);
    rig.set_status(1);
    rig.set_up_queue(0, 1);
    assert_eq!(rig.status(), 15);
    assert!(rig.doorbells.attached().is_empty());
    gate.open();
    rig.wait_for("the reset", |rig| rig.status() == 0);
    assert!(!rig.queue_enabled(0));
    let base = rig.fake.look(Req::SET_VRING_BASE, 3, |seen| seen.payload[4]);
    assert_eq!(base, 0);
    assert_eq!(rig.interrupts.attached(), 0);
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 4, |_| ());
    assert_eq!(
        rig.fake
            .requests()
            .iter()
            .filter(|r| **r == Req::SET_FEATURES)
            .count(),
        2
    );
}

#[test]
fn a_reset_begins_the_rings_anew_that_were_started() {
    let rig = Rig::new(script());
    rig.set_command(6);
    rig.set_status(3);
    rig.accept_features(rig.offered());
    rig.set_status(11);
    rig.set_up_queue(1, 1);
    rig.set_status(15);
    rig.fake.look(Req::SET_VRING_ENABLE, 1, |_| ());
    rig.set_status(0);
    rig.wait_for("the reset", |rig| rig.status() == 0);
    let last = rig
        .fake
        .look(Req::SET_VRING_BASE, 2, |seen| (seen.payload[0], seen.payload[4]));
    assert_eq!(last, (1, 0));
    let requests = rig.fake.requests();
    assert_eq!(requests.iter().filter(|r| **r == Req::SET_VRING_BASE).count(), 2);
}

#[test]
fn starts_and_resets_in_quick_succession_end_in_the_last() {
    let rig = Rig::new(script());
    for _ in 0..50 {
        rig.drive();
        rig.set_status(0);
        rig.wait_for("the reset", |rig| rig.status() == 0);
    }
    rig.drive();
    let enabled = |rig: &Rig| {
        let requests = rig.fake.requests();
        requests.ends_with(&[Req::SET_VRING_ENABLE, Req::SET_VRING_ENABLE])
    };
    rig.wait_for("the start", enabled);
    assert_eq!(rig.status(), 15);
}

#[test]
fn the_machine_resets_its_devices() {
    let rig = Rig::new(script());
    for boot in 1..=3 {
        rig.drive();
        rig.fake.look(Req::SET_VRING_ENABLE, 2 * boot, |_| ());
        assert!(rig.device.driven());
        rig.bus.reset();
        assert!(!rig.device.driven(), "not in this boot");
        rig.set_command(2);
        assert_eq!(rig.status(), 0);
        assert_eq!(
            (rig.interrupts.attached(), rig.doorbells.attached().len()),
            (0, 0)
        );
    }
}

#[test]
fn a_broken_ring_is_told_to_driver_and_supervisor() {
    let rig = Rig::new(script());
    rig.drive();
    signal(rig.fake.fd(Req::SET_VRING_ERR, 1));
    assert!(matches!(rig.event(), DeviceEvent::NeedsReset { device, .. } if device == "disk0"));
    assert_eq!(rig.status(), 15 | NEEDS_RESET);
    assert_eq!(rig.interrupts.injected(0), 1);
    assert_eq!(rig.read::<1>(super::layout::ISR.start), [2]);
    assert_eq!(rig.read::<1>(super::layout::ISR.start), [0], "reading clears");
    rig.set_status(0);
    rig.wait_for("the reset", |rig| rig.status() == 0);
}

#[test]
fn a_changed_configuration_is_read_and_told() {
    let script = script();
    let config = script.config.clone();
    let rig = Rig::new(script);
    rig.drive();
    let requests = rig.fake.fd(Req::SET_BACKEND_REQ_FD, 1);
    assert_eq!((rig.config(0), rig.generation()), (8, 0));
    config.lock().unwrap()[0] = 16;
    config.lock().unwrap()[34] = 9;
    (&requests)
        .write_all(&[2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
        .unwrap();
    rig.wait_for("the interrupt", |rig| rig.interrupts.injected(0) == 1);
    assert_eq!((rig.config(0), rig.generation()), (16, 1));
    assert_eq!(rig.config(34), 2, "the number of queues is fixed");
}

#[test]
fn a_driver_writes_the_configuration() {
    let rig = Rig::new(script());
    rig.drive();
    rig.write(super::layout::DEVICE.start + 32, &[1]);
    let written = rig.fake.look(Req::SET_CONFIG, 1, |seen| seen.payload.clone());
    assert_eq!(written, [32, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
    rig.write(super::layout::DEVICE.start + 59, &[1, 1]);
    rig.write(super::layout::DEVICE.start + 33, &[2]);
    let written = rig.fake.look(Req::SET_CONFIG, 2, |seen| seen.payload[0]);
    assert_eq!(written, 33, "a write past the end is not passed on");
}

/// The script, stopped at each SET_CONFIG until the gate opens.
fn deliberate() -> (Gate, Script) {
    let gate = Gate::default();
    let pass = gate.clone();
    let quirk = move |at| match at {
        Req::SET_CONFIG => Quirk::Wait(pass.clone()),
        _ => Quirk::Normal,
    };
    (
        gate,
        Script {
            quirk: Box::new(quirk),
            ..script()
        },
    )
}

#[test]
fn a_driver_reads_what_it_wrote_until_the_back_end_says_otherwise() {
    let (gate, script) = deliberate();
    let config = script.config.clone();
    let rig = Rig::new(script);
    rig.drive();
    rig.write(super::layout::DEVICE.start + 32, &[1]);
    rig.write(super::layout::DEVICE.start + 33, &[2]);
    assert_eq!([32, 33].map(|at| rig.config(at)), [1, 2]);
    config.lock().unwrap()[32] = 1;
    gate.open();
    rig.wait_for("the correction", |rig| rig.config(33) == 0);
    assert_eq!((rig.config(32), rig.generation()), (1, 1));
    rig.wait_for("the interrupt", |rig| rig.interrupts.injected(0) == 1);
}

#[test]
fn a_cache_is_shown_until_it_is_off() {
    let (gate, script) = deliberate();
    let config = script.config.clone();
    config.lock().unwrap()[32] = 1;
    let rig = Rig::new(script);
    rig.drive();
    rig.write(super::layout::DEVICE.start + 32, &[0]);
    rig.fake.look(Req::SET_CONFIG, 1, |_| ());
    assert_eq!(rig.config(32), 1, "what is written now may need a flush");
    config.lock().unwrap()[32] = 0;
    gate.open();
    rig.wait_for("the interrupt", |rig| rig.interrupts.injected(0) == 1);
    assert_eq!(rig.config(32), 0);
}

#[test]
fn scsi_s_sizes_are_not_written() {
    let script = Script::default();
    *script.config.lock().unwrap() = vec![0; 36];
    let scsi = DeviceConfig {
        device_type: 8,
        num_queues: None,
        ..spec()
    };
    let rig = Rig::with(scsi, script);
    rig.drive();
    // sense_size and cdb_size, then cmd_per_lun.
    for (offset, value) in [(20, 96u32), (24, 32), (12, 1)] {
        rig.write(super::layout::DEVICE.start + offset, &value.to_le_bytes());
    }
    rig.fake
        .look(Req::SET_CONFIG, 1, |seen| assert_eq!(seen.payload[0], 12));
    assert_eq!(
        rig.fake
            .requests()
            .iter()
            .filter(|r| **r == Req::SET_CONFIG)
            .count(),
        1
    );
    assert_eq!([20, 24].map(|at| rig.config(at)), [0; 2]);
}

#[test]
fn writes_reach_the_back_end_before_the_start_and_not_after_a_reset() {
    let (gate, script) = deliberate();
    let rig = Rig::new(script);
    rig.set_command(2);
    let field = super::layout::DEVICE.start + 32;
    rig.write(field, &[1]);
    rig.fake.look(Req::SET_CONFIG, 1, |_| ());
    rig.write(field, &[2]);
    rig.drive();
    gate.open();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    let order: Vec<_> = rig
        .fake
        .requests()
        .into_iter()
        .filter(|request| [Req::SET_CONFIG, Req::SET_FEATURES].contains(request))
        .collect();
    assert_eq!(order, [Req::SET_CONFIG, Req::SET_CONFIG, Req::SET_FEATURES]);

    let (gate, script) = deliberate();
    let rig = Rig::new(script);
    rig.drive();
    rig.write(field, &[1]);
    rig.fake.look(Req::SET_CONFIG, 1, |_| ());
    rig.write(field, &[2]);
    rig.set_status(0);
    gate.open();
    rig.wait_for("the reset", |rig| rig.status() == 0);
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 4, |_| ());
    assert_eq!(rig.config(32), 0);
    let writes = rig.fake.requests().into_iter().filter(|r| *r == Req::SET_CONFIG);
    assert_eq!(writes.count(), 1);
}

#[test]
fn a_lost_back_end_is_an_event_and_the_device_can_be_reset() {
    type Fault = fn(&FakeBackend);
    let faults: [(Fault, &str); 2] = [
        (FakeBackend::kill, "back end closed its socket"),
        (
            FakeBackend::babble,
            "back end sent a message that nobody asked for",
        ),
    ];
    for (fault, expected) in faults {
        let rig = Rig::new(script());
        rig.drive();
        rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
        rig.wait_for("the start", |rig| rig.device.drain().is_ok());
        fault(&rig.fake);
        assert!(matches!(rig.event(), DeviceEvent::BackendLost { reason, .. } if reason == expected));
        assert_eq!(rig.status(), 15, "the guest is not told: a successor may come");
        rig.set_status(0);
        rig.wait_for("the reset", |rig| rig.status() == 0);
        // The next start waits for a successor, and says so; none will come.
        rig.drive();
        assert!(matches!(rig.event(), DeviceEvent::BackendLost { .. }));
        assert_eq!(rig.status(), 15);
        rig.device.give_up("no successor");
        assert!(matches!(rig.event(), DeviceEvent::NeedsReset { .. }));
        assert_eq!(rig.status() & NEEDS_RESET, NEEDS_RESET);
    }
}

#[test]
fn drained_rings_resume_where_they_stopped() {
    let rig = Rig::new(Script {
        bases: vec![7, 9],
        ..script()
    });
    assert_eq!(rig.device.drain().unwrap(), []);
    rig.drive();
    let states = [(0, 7), (1, 9)].map(|(index, next_avail)| QueueState { index, next_avail });
    assert_eq!(rig.device.drain().unwrap(), states);
    assert_eq!(rig.device.drain().unwrap(), states);
    rig.device.resume().unwrap();
    assert_eq!(rig.fake.look(Req::SET_VRING_BASE, 4, |seen| seen.payload[4]), 9);
}

#[test]
fn a_hung_back_end_costs_its_device_only() {
    let (fake, sockets) = FakeBackend::start(Script::quirk_at(Req::SET_VRING_NUM, || Quirk::Silent));
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = events.clone();
    let mut hasty = deadlines();
    hasty.step = Duration::from_millis(200);
    let parts = DeviceParts {
        config: spec(),
        sockets,
        memory: memory(),
        interrupts: Arc::new(FakeInterrupts::default()),
        doorbells: Arc::new(FakeDoorbells::default()),
        events: Arc::new(move |event| sink.lock().unwrap().push(event)),
        deadlines: hasty,
        generation: 0,
        answered: None,
    };
    let device = rig::device(parts, Box::new(|| Ok(()))).unwrap();
    let function = device.function();
    let write = |offset, data: &[u8]| function.bar_write(offset, data);
    write(20, &[3]);
    write(8, &1u32.to_le_bytes());
    write(12, &1u32.to_le_bytes());
    write(20, &[11]);
    for (offset, area) in [(32, 0x1000u64), (40, 0x2000), (48, 0x3000)] {
        write(offset, &area.to_le_bytes());
    }
    write(28, &1u16.to_le_bytes());
    write(20, &[15]);
    fake.look(Req::SET_VRING_NUM, 1, |_| ());
    // The device's thread answers once its deadline has passed.
    assert!(matches!(device.drain().unwrap_err().cause, Error::NoBackend));
    let seen = events.lock().unwrap();
    assert!(matches!(seen[..], [DeviceEvent::BackendLost { .. }]), "{seen:?}");
}

#[test]
fn a_back_end_that_takes_smaller_queues_only_is_told_with_the_key() {
    let refusal = || Quirk::Payload(vec![1, 0, 0, 0, 0, 0, 0, 0]);
    let rig = Rig::new(Script {
        config: script().config,
        ..Script::quirk_at(Req::SET_VRING_NUM, refusal)
    });
    rig.drive();
    assert!(matches!(rig.event(), DeviceEvent::BackendLost { reason, .. } if reason.contains("queue-size")));
}

#[test]
fn failures_to_connect_are_told_with_the_device() {
    let connect = |script: Script, confine: std::io::Result<()>| {
        let (_fake, sockets) = FakeBackend::start(script);
        let parts = DeviceParts {
            config: spec(),
            sockets,
            memory: memory(),
            interrupts: Arc::new(FakeInterrupts::default()),
            doorbells: Arc::new(FakeDoorbells::default()),
            events: Arc::new(|_| ()),
            deadlines: deadlines(),
            generation: 0,
            answered: None,
        };
        rig::device(parts, Box::new(|| confine)).err().unwrap()
    };
    let error = connect(
        Script {
            features: 1 << 30,
            ..script()
        },
        Ok(()),
    );
    assert_eq!(error.to_string(), "device 'disk0' failed");
    assert!(matches!(error.cause, Error::NoVersion1));
    let error = connect(Script::quirk_at(Req::GET_FEATURES, || Quirk::Close), Ok(()));
    assert!(matches!(error.cause, Error::Gone(_)));
    let error = connect(script(), Err(std::io::ErrorKind::PermissionDenied.into()));
    assert!(matches!(error.cause, Error::Resource { .. }));
}

/// Requests wait in queue 1: an available index ahead of the used index.
fn leave_waiting(rig: &Rig) {
    let memfd = File::from(rig.memory.memfd().try_clone_to_owned().unwrap());
    memfd.write_all_at(&3u16.to_le_bytes(), 0x2_4002).unwrap();
}

#[test]
fn a_back_end_without_progress_is_kicked_while_it_answers() {
    let rig = Rig::new(script());
    rig.drive();
    let kick = rig.fake.fd(Req::SET_VRING_KICK, 2);
    leave_waiting(&rig);
    // The first is the handshake's; the answer to the second was the cause of the kick.
    rig.fake.look(Req::GET_FEATURES, 3, |_| ());
    let mut count = [0; 8];
    (&kick).read_exact(&mut count).unwrap();
    assert!(rig.device.rekicks() > 0);
    assert!(rig.events.try_recv().is_err(), "a slow disk is no hang");
}

/// A NIC of one pair and a control queue, which a driver has started.
fn nic(script: Script, alive: Duration) -> Rig {
    nic_of(true, script, alive)
}

fn nic_of(ours: bool, script: Script, alive: Duration) -> Rig {
    let nic = DeviceConfig {
        device_type: 1,
        num_queues: None,
        ours,
        ..spec()
    };
    let script = Script {
        features: Script::default().features | 1 << 17,
        ..script
    };
    *script.config.lock().unwrap() = vec![0; 12];
    let times = Deadlines { alive, ..deadlines() };
    let rig = Rig::build(nic, script, times);
    rig.set_command(6);
    rig.set_status(3);
    rig.accept_features(rig.offered());
    rig.set_status(11);
    (0..3).for_each(|queue| rig.set_up_queue(queue, queue + 1));
    rig.set_status(15);
    rig.fake.look(Req::SET_VRING_ENABLE, 3, |_| ());
    rig
}

#[test]
fn a_control_queue_without_progress_is_noticed_and_receive_buffers_are_not() {
    let rig = nic(Script::default(), deadlines().alive);
    let kicks =
        [0, 1, 2].map(|queue| SharedEvent::from(OwnedFd::from(rig.fake.fd_of(Req::SET_VRING_KICK, queue))));
    let memfd = File::from(rig.memory.memfd().try_clone_to_owned().unwrap());
    for queue in [0, 2] {
        memfd
            .write_all_at(&3u16.to_le_bytes(), 0x1_4002 + 0x1_0000 * queue)
            .unwrap();
    }
    rig.wait_for("the kick", |_| kicks[2].take() == 1);
    assert_eq!([0, 1].map(|queue: usize| kicks[queue].take()), [0, 0]);
}

#[test]
fn a_nic_that_does_not_answer_is_lost_though_nothing_waits() {
    let mut asked = 0;
    let script = Script::quirk_at(Req::GET_FEATURES, move || {
        asked += 1;
        if asked < 3 { Quirk::Normal } else { Quirk::Silent }
    });
    let rig = nic(script, Duration::from_millis(300));
    // The handshake's, and one that is answered.
    let lost = rig.events.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(matches!(
        lost,
        DeviceEvent::BackendLost {
            loss: Loss::Silent,
            outstanding: 0,
            ..
        }
    ));
}

#[test]
fn someone_elses_idle_nic_is_not_asked() {
    let rig = nic_of(false, Script::default(), deadlines().alive);
    let memfd = File::from(rig.memory.memfd().try_clone_to_owned().unwrap());
    // Receive buffers.
    memfd.write_all_at(&3u16.to_le_bytes(), 0x1_4002).unwrap();
    // One of ours is asked at the third look.
    std::thread::sleep(Duration::from_millis(3500));
    let asked = rig.fake.requests();
    assert_eq!(asked.iter().filter(|r| **r == Req::GET_FEATURES).count(), 1);
}

#[test]
fn a_back_end_without_progress_that_does_not_answer_is_lost() {
    let deaf = || {
        let mut asked = 0;
        let silent = move || {
            asked += 1;
            if asked == 1 { Quirk::Normal } else { Quirk::Silent }
        };
        Script {
            features: script().features,
            config: script().config,
            ..Script::quirk_at(Req::GET_FEATURES, silent)
        }
    };
    let times = Deadlines {
        alive: Duration::from_millis(300),
        ..deadlines()
    };
    let rig = Rig::with_deadlines(deaf(), times);
    rig.drive();
    rig.fake.look(Req::SET_VRING_ENABLE, 2, |_| ());
    leave_waiting(&rig);
    let is_lost = || match rig.event() {
        DeviceEvent::BackendLost {
            loss, outstanding, ..
        } => assert_eq!((loss, outstanding), (Loss::Silent, 3)),
        _ => panic!("not lost"),
    };
    is_lost();
    // That a successor may be slow to begin makes it no slower to be missed.
    let (_heir, sockets) = FakeBackend::start(deaf());
    rig.replace(sockets).unwrap();
    is_lost();
}
