use super::layout::{DEVICE, ISR, NOTIFY, PBA, TABLE};
use super::rig::{BAR, CONFIG, Rig, script, spec};
use crate::frontend::fake_backend::{Quirk, Script, Seen};
use vhost::vhost_user::message::FrontendReq;
use vm_spec::control::DeviceConfig;
use vm_spec::machine::VIRTIO_BAR_SIZE;

fn config_word(rig: &Rig, offset: u64) -> u32 {
    let mut data = [0; 4];
    rig.bus.ecam_read(CONFIG + offset, &mut data);
    u32::from_le_bytes(data)
}

fn set_bar(rig: &Rig, address: u64) {
    rig.bus.ecam_write(CONFIG + 0x10, &(address as u32).to_le_bytes());
    rig.bus
        .ecam_write(CONFIG + 0x14, &((address >> 32) as u32).to_le_bytes());
}

#[test]
fn says_what_it_is() {
    let rig = Rig::new(script());
    assert_eq!(config_word(&rig, 0), 0x1042_1AF4);
    assert_eq!(config_word(&rig, 8), 0x0180_0001);
    assert_eq!(config_word(&rig, 0x2C), 0x1042_1AF4);
    assert_eq!(config_word(&rig, 0x3C) >> 8 & 0xFF, 0, "no INTx pin");
    for kind in 1..=5 {
        rig.capability(9, Some(kind));
    }
    let msix = rig.capability(0x11, None);
    assert_eq!(
        config_word(&rig, msix.into()) >> 16,
        2,
        "three vectors: two queues, configuration"
    );
    let notify = u64::from(rig.capability(9, Some(2)));
    assert_eq!(config_word(&rig, notify + 16), 4, "notify_off_multiplier");
    assert_eq!(config_word(&rig, 0x100), u32::MAX, "a conventional function");
}

#[test]
fn the_bar_is_sized_and_moved() {
    let rig = Rig::new(script());
    assert_eq!(config_word(&rig, 0x10), BAR as u32 | 4);
    assert!(
        !rig.bus.mmio_read(BAR, &mut [0]),
        "memory decode is off at power-on"
    );
    set_bar(&rig, u64::MAX);
    assert_eq!(
        u64::from(config_word(&rig, 0x10) & !0xF),
        !(VIRTIO_BAR_SIZE - 1) & 0xFFFF_FFFF
    );
    assert_eq!(config_word(&rig, 0x14), !0);
    set_bar(&rig, BAR);
    rig.drive();
    let bells = |bar: u64| vec![bar + NOTIFY.start, bar + NOTIFY.start + 4];
    assert_eq!(rig.doorbells.attached(), bells(BAR));
    rig.set_command(0);
    assert!(rig.doorbells.attached().is_empty());
    assert!(!rig.bus.mmio_write(BAR, &[0; 4]));
    let high = 0x12_3400_0000;
    set_bar(&rig, high);
    assert!(rig.doorbells.attached().is_empty());
    rig.set_command(2);
    assert_eq!(rig.doorbells.attached(), bells(high));
    let mut queues = [0; 2];
    assert!(rig.bus.mmio_read(high + 18, &mut queues));
    assert_eq!(queues, [2, 0]);
    assert!(!rig.bus.mmio_read(BAR, &mut queues));
    set_bar(&rig, BAR);
    assert_eq!(rig.doorbells.attached(), bells(BAR), "moved while decoded");
    rig.bus.reset();
    assert!(rig.doorbells.attached().is_empty());
    assert_eq!(config_word(&rig, 0x10), BAR as u32 | 4);
}

#[test]
fn the_top_of_the_address_space_is_no_trap() {
    let rig = Rig::new(script());
    rig.drive();
    set_bar(&rig, u64::MAX);
    let top = !(VIRTIO_BAR_SIZE - 1);
    let mut data = [0; 8];
    assert!(rig.bus.mmio_read(u64::MAX - 3, &mut data));
    assert_eq!(data, [0xFF; 8], "crosses the end of the BAR");
    assert!(rig.bus.mmio_read(top + 18, &mut data[..2]));
    assert_eq!(data[..2], [2, 0]);
    rig.bus.ecam_read(u64::MAX, &mut data);
}

#[test]
fn every_width_reads_and_only_the_right_one_writes() {
    let rig = Rig::new(script());
    rig.set_command(2);
    let bytes: Vec<u8> = (0..0x40).map(|at| rig.read::<1>(at)[0]).collect();
    for width in [2usize, 4, 8] {
        for at in 0..=0x40 - width {
            let mut data = vec![0; width];
            assert!(rig.bus.mmio_read(BAR + at as u64, &mut data));
            assert_eq!(data, bytes[at..at + width], "{width} bytes at {at}");
        }
    }
    rig.write(32, &[0x10; 2]);
    rig.write(33, &[0x10; 4]);
    rig.write(34, &[0x10; 4]);
    rig.write(36, &[0x10; 8]);
    rig.write(20, &[1; 4]);
    rig.write(24, &[1]);
    assert_eq!(
        rig.read::<64>(0).as_slice(),
        bytes,
        "writes of a wrong width change nothing"
    );
    rig.write(32, &[0x10; 8]);
    assert_eq!(rig.read::<8>(32), [0x10; 8]);
    rig.write(36, &[0x20; 4]);
    assert_eq!(
        rig.read::<8>(32),
        [0x10, 0x10, 0x10, 0x10, 0x20, 0x20, 0x20, 0x20]
    );
    // Accesses that leave a structure, or hit none, read as zero and write nothing.
    for offset in [
        0x3D,
        0x800,
        ISR.start + 1,
        DEVICE.end - 3,
        TABLE.end - 3,
        PBA.end,
        NOTIFY.end,
        0x7_FFFC,
    ] {
        rig.write(offset, &[0xFF; 4]);
        assert_eq!(rig.read::<4>(offset), [0; 4], "{offset:#x}");
    }
}

#[test]
fn features_are_judged_from_what_was_offered() {
    let rig = Rig::new(script());
    rig.set_command(2);
    let offered = rig.offered();
    assert_eq!(
        offered,
        1 << 32 | 1 << 12,
        "packed rings and ring reset are not offered"
    );
    for (features, accepted) in [
        (offered & !(1 << 32), false),
        (offered | 1 << 5, false),
        (1 << 32, true),
        (offered, true),
    ] {
        rig.set_status(0);
        rig.set_status(3);
        rig.accept_features(features);
        rig.set_status(11);
        assert_eq!(rig.status() & 8 != 0, accepted, "{features:#x}");
        if !accepted {
            rig.set_status(15);
            assert_eq!(rig.status() & 4, 0, "no DRIVER_OK without FEATURES_OK");
        }
    }
    rig.accept_features(0);
    rig.write(8, &1u32.to_le_bytes());
    assert_eq!(
        rig.read::<4>(12),
        [1, 0, 0, 0],
        "features are fixed after FEATURES_OK"
    );
    rig.set_status(0);
    rig.set_status(3);
    rig.accept_features(offered);
    rig.write(8, &2u32.to_le_bytes());
    rig.write(12, &1u32.to_le_bytes());
    rig.set_status(11);
    assert_eq!(rig.status(), 3, "a feature past 64 is unknown");
    rig.write(8, &3u32.to_le_bytes());
    rig.write(12, &0u32.to_le_bytes());
    rig.set_status(11);
    assert_eq!(rig.status(), 3, "none of another word");
    rig.write(8, &2u32.to_le_bytes());
    rig.write(12, &0u32.to_le_bytes());
    rig.set_status(11);
    assert_eq!(rig.status(), 11, "taken back");
}

#[test]
fn queues_are_checked_when_enabled() {
    let rig = Rig::new(script());
    rig.set_command(2);
    rig.set_up_queue(0, 0xFFFF);
    assert!(!rig.queue_enabled(0), "not before FEATURES_OK");
    rig.set_status(3);
    rig.accept_features(rig.offered());
    rig.set_status(11);
    for area in [0x1_0008u64, 0xC000_0000] {
        rig.write(22, &0u16.to_le_bytes());
        rig.write(32, &area.to_le_bytes());
        rig.write(28, &1u16.to_le_bytes());
        assert!(!rig.queue_enabled(0), "at {area:#x}");
    }
    for (size, kept) in [(128u16, 128u16), (63, 128), (512, 128), (0, 128), (256, 256)] {
        rig.write(24, &size.to_le_bytes());
        assert_eq!(rig.read::<2>(24), kept.to_le_bytes(), "{size} entries");
    }
    rig.set_up_queue(0, 1);
    assert!(rig.queue_enabled(0));
    rig.write(24, &32u16.to_le_bytes());
    assert_eq!(rig.read::<2>(24), [64, 0], "an enabled queue is fixed");
    rig.write(22, &2u16.to_le_bytes());
    assert_eq!(
        rig.read::<8>(24),
        [0, 0, 0xFF, 0xFF, 0, 0, 0, 0],
        "there is no queue 2"
    );
    rig.write(26, &0u16.to_le_bytes());
    rig.write(28, &1u16.to_le_bytes());
    rig.write(16, &3u16.to_le_bytes());
    assert_eq!(rig.read::<2>(16), [0xFF, 0xFF], "there is no vector 3");
}

#[test]
fn configuration_access_through_the_capability() {
    let rig = Rig::new(script());
    let capability = CONFIG + u64::from(rig.capability(9, Some(5)));
    let set = |offset: u32, length: u32| {
        rig.bus.ecam_write(capability + 8, &offset.to_le_bytes());
        rig.bus.ecam_write(capability + 12, &length.to_le_bytes());
    };
    let read = |width: usize| {
        let mut data = vec![0; width];
        rig.bus.ecam_read(capability + 16, &mut data);
        data
    };
    set(18, 2);
    assert_eq!(read(2), [2, 0], "num_queues, with memory decode off");
    set(20, 1);
    rig.bus.ecam_write(capability + 16, &[3]);
    assert_eq!(read(1), [3]);
    for (offset, length) in [(20, 4), (19, 2), (0x7_FFFE, 4), (u32::MAX - 3, 4), (0, 3)] {
        set(offset, length);
        rig.bus.ecam_write(capability + 16, &[0xFF; 4]);
        read(4);
    }
    set(20, 1);
    assert_eq!(read(1), [3], "misfits wrote nothing");
    // Accesses of other widths, which the field's bytes make one of the right width.
    let write = |at: u64, data: &[u8]| rig.bus.ecam_write(capability + 16 + at, data);
    rig.set_command(2);
    set(22, 2);
    write(0, &[1, 0, 9, 9]);
    assert_eq!(rig.read::<2>(22), [1, 0], "queue_select");
    write(1, &[2]);
    assert_eq!(rig.read::<2>(22), [1, 2]);
    set(16, 2);
    let mut high = [0];
    rig.bus.ecam_read(capability + 17, &mut high);
    assert_eq!(high, [0xFF], "config_msix_vector");
    assert_eq!(read(4), [0xFF, 0xFF, 9, 9], "what is past the length stays");
}

#[test]
fn of_an_unknown_type_no_more_is_read_than_the_spec_gives() {
    let other = |config: Vec<u8>| {
        // Of a back end that has no bound, and is asked once.
        let answer = [vec![0; 4], vec![8, 0, 0, 0], vec![0; 4], vec![7; 8]].concat();
        let script = Script::quirk_at(FrontendReq::GET_CONFIG, move || Quirk::Payload(answer.clone()));
        let spec = DeviceConfig {
            device_type: 63,
            config,
            ..spec()
        };
        let rig = Rig::with(spec, script);
        rig.set_command(2);
        rig
    };
    let asked = |rig: &Rig| {
        rig.fake
            .requests()
            .iter()
            .filter(|r| **r == FrontendReq::GET_CONFIG)
            .count()
    };
    let rig = other(vec![1; 8]);
    assert_eq!(
        rig.fake
            .look(FrontendReq::GET_CONFIG, 1, |seen| seen.payload.len()),
        12 + 8
    );
    assert_eq!(asked(&rig), 1);
    assert_eq!(rig.read::<8>(DEVICE.start), [7; 8]);
    assert_eq!(asked(&other(Vec::new())), 0);
}

#[test]
fn net_takes_its_configuration_from_the_spec() {
    let net = DeviceConfig {
        id: "net0".into(),
        device_type: 1,
        num_queues: None,
        config: vec![2, 0, 0, 0, 0, 9, 1, 0, 1, 0, 0xDC, 5],
        config_features: 1 << 5 | 1 << 3,
        ..spec()
    };
    // MQ and CTRL_RX without CTRL_VQ.
    let script = Script {
        features: Script::default().features | 1 << 22 | 1 << 18,
        ..Script::default()
    };
    *script.config.lock().unwrap() = vec![0xEE; 10];
    let rig = Rig::with(net, script);
    rig.set_command(2);
    assert_eq!(rig.offered(), 1 << 32 | 1 << 5 | 1 << 3);
    assert_eq!(rig.read::<2>(18), [2, 0], "one pair");
    let config = rig.read::<16>(DEVICE.start);
    assert_eq!(
        config,
        [2, 0, 0, 0, 0, 9, 0xEE, 0xEE, 0xEE, 0xEE, 0xDC, 5, 0, 0, 0, 0]
    );
}

#[test]
fn a_net_feature_comes_with_its_field() {
    const CONFIG: u64 = 1 << 9;
    let [mtu, mac, status, speed, rss] = [3, 5, 16, 63, 60].map(|bit| 1u64 << bit);
    let offered = |config_features, length: usize, protocol| {
        let net = DeviceConfig {
            device_type: 1,
            num_queues: None,
            config: vec![0; 12],
            config_features,
            ours: false,
            ..spec()
        };
        let features = mtu | mac | status | speed | rss | 1 << 17;
        let script = Script {
            features: Script::default().features | features,
            protocol,
            ..Script::default()
        };
        *script.config.lock().unwrap() = vec![0; length];
        let rig = Rig::with(net, script);
        rig.set_command(2);
        rig.offered() & !(1 << 32 | 1 << 17)
    };
    let all = Script::default().protocol;
    assert_eq!(offered(0, 24, all & !CONFIG), 0);
    assert_eq!(offered(mac | status, 24, all & !CONFIG), mac | status);
    assert_eq!(offered(0, 10, all), mac | status);
    assert_eq!(offered(mtu, 10, all), mac | status | mtu);
    assert_eq!(offered(0, 24, all), mtu | mac | status | speed | rss);
}

#[test]
fn a_control_queue_needs_a_back_end_that_serves_it() {
    const CONFIG: u64 = 1 << 9;
    const CTRL_VQ: u64 = 1 << 17;
    // CTRL_GUEST_OFFLOADS, CTRL_RX, CTRL_RX_EXTRA, GUEST_ANNOUNCE, MQ, HASH_TUNNEL, VQ_NOTF_COAL, NOTF_COAL.
    let needs_it = [2, 18, 20, 21, 22, 51, 52, 53]
        .iter()
        .fold(0, |all, bit| all | 1 << bit);
    let others = |protocol| {
        let net = DeviceConfig {
            device_type: 1,
            num_queues: None,
            ours: false,
            ..spec()
        };
        let script = Script {
            features: Script::default().features | CTRL_VQ | needs_it,
            protocol,
            ..Script::default()
        };
        let mut config = vec![0; 10];
        config[8] = 2;
        *script.config.lock().unwrap() = config;
        let rig = Rig::with(net, script);
        rig.set_command(2);
        (rig.offered(), rig.read::<2>(18)[0])
    };
    let all = Script::default().protocol;
    assert_eq!(others(all & !CONFIG), (1 << 32, 2));
    assert_eq!(others(all), (1 << 32 | CTRL_VQ | needs_it, 5), "two pairs");
}

#[test]
fn block_queues_are_clamped() {
    for (asked, queues, expected) in [(Some(2), 4, 2), (Some(32), 3, 3), (None, 64, 4), (Some(4), 1, 1)] {
        let script = Script { queues, ..script() };
        let rig = Rig::with(
            DeviceConfig {
                num_queues: asked,
                ..spec()
            },
            script,
        );
        rig.set_command(2);
        assert_eq!(rig.read::<2>(18), [expected, 0], "{asked:?} of {queues}");
        assert_eq!(rig.config(34), expected);
        assert_eq!(rig.offered() >> 12 & 1 != 0, expected > 1);
    }
}

/// The queues that a driver finds, and its configuration space, of a device with these features.
fn queues_of(device_type: u16, features: u64, config: &[u8], limit: u64) -> (u16, Vec<u8>) {
    let device = DeviceConfig {
        device_type,
        num_queues: None,
        ..spec()
    };
    let script = Script {
        features: Script::default().features | features,
        queues: limit,
        ..Script::default()
    };
    *script.config.lock().unwrap() = config.to_vec();
    let rig = Rig::with(device, script);
    rig.set_command(2);
    assert_eq!(rig.offered(), 1 << 32 | features);
    let space = (0..config.len()).map(|at| rig.config(at as u64)).collect();
    (u16::from_le_bytes(rig.read(18)), space)
}

#[test]
fn the_type_or_the_spec_says_how_large_a_queue_may_be() {
    for (device_type, asked, expected) in [
        (2, None, 256u16),
        (8, None, 128),
        (25, None, 64),
        (36, None, 64),
        (25, Some(1024), 1024),
        (2, Some(32), 32),
        (2, Some(2048), 256),
        (2, Some(100), 256),
    ] {
        let device = DeviceConfig {
            device_type,
            queue_size: asked,
            ..spec()
        };
        let script = Script {
            queues: 8,
            ..Script::default()
        };
        let rig = Rig::with(device, script);
        rig.set_command(2);
        let tracked = |seen: &Seen| u16::from_ne_bytes([seen.payload[18], seen.payload[19]]);
        let tracked = rig.fake.look(FrontendReq::GET_INFLIGHT_FD, 1, tracked);
        let found = u16::from_le_bytes(rig.read(24));
        assert_eq!((found, tracked), (expected, expected), "{device_type} {asked:?}");
        // Also after a reset.
        rig.write(24, &2u16.to_le_bytes());
        rig.set_status(0);
        assert_eq!(u16::from_le_bytes(rig.read(24)), expected);
    }
}

#[test]
fn features_decide_how_many_queues_there_are() {
    // A console's ports, and what comes of a number that no machine has.
    let ports = |number: u32| [&[80, 0, 25, 0], number.to_le_bytes().as_slice(), &[0; 4]].concat();
    for (features, number, expected, told) in [
        (0, 31, 2, 31),
        (2, 31, 64, 31),
        (2, 0, 4, 1),
        (2, u32::MAX, 256, 127),
    ] {
        assert_eq!(
            queues_of(3, features, &ports(number), 256),
            (expected, ports(told)),
            "{features} {number}"
        );
    }
    let mut fs = vec![0; 44];
    fs[36] = 2;
    assert_eq!(queues_of(26, 0, &fs, 256).0, 3);
    assert_eq!(queues_of(26, 1, &fs, 256).0, 4, "one for notifications");
    assert_eq!(queues_of(41, 0, &[0; 8], 1).0, 1, "lines without interrupts");
    assert_eq!(queues_of(41, 1, &[0; 8], 2).0, 2);
}

#[test]
fn a_vsock_back_end_need_not_serve_the_event_queue() {
    let vsock = DeviceConfig {
        device_type: 19,
        num_queues: None,
        ..spec()
    };
    let script = Script {
        queues: 2,
        ..Script::default()
    };
    *script.config.lock().unwrap() = vec![3, 0, 0, 0, 0, 0, 0, 0];
    let rig = Rig::with(vsock, script);
    rig.drive();
    assert_eq!(rig.read::<2>(18), [3, 0], "the driver finds three queues");
    assert_eq!(rig.config(0), 3);
    rig.fake.look(FrontendReq::SET_VRING_ENABLE, 2, |seen| {
        assert_eq!(seen.payload[0], 1)
    });
}

#[test]
fn a_back_end_without_configuration_gets_the_spec_s() {
    let mut config = b"tag".to_vec();
    config.resize(36, 0);
    config.extend_from_slice(&2u32.to_le_bytes());
    let fs = DeviceConfig {
        device_type: 26,
        num_queues: None,
        config,
        ..spec()
    };
    let script = Script {
        protocol: 1 << 0 | 1 << 3 | 1 << 15,
        ..Script::default()
    };
    let rig = Rig::with(fs, script);
    rig.set_command(2);
    assert_eq!(rig.read::<3>(DEVICE.start), *b"tag");
    assert_eq!(rig.read::<2>(18), [3, 0], "hiprio and two request queues");
    rig.write(DEVICE.start, &[1]);
    assert!(!rig.fake.requests().contains(&FrontendReq::SET_CONFIG));
}
