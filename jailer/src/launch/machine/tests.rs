use super::*;

fn refusal(keys: &str) -> Option<String> {
    let text = format!("{keys}\n[boot]\nkernel = \"/k\"\n");
    let spec: VmSpec = toml::from_str(&text).expect(keys);
    check_machine(&spec).err().map(|failure| failure.to_string())
}

#[test]
fn a_kernel_is_missed_once_flags_have_had_their_say() {
    for text in ["", "[boot]\ncmdline = \"x\"\n"] {
        let refusal = check_machine(&toml::from_str(text).unwrap()).unwrap_err();
        assert!(
            refusal.to_string().contains("boot.kernel: no kernel is given"),
            "{refusal}"
        );
    }
}

#[test]
fn limits_leave_room_for_the_vm() {
    let with = |limit: &str| refusal(&format!("memory = \"64M\"\nlimits = {{ {limit} }}"));
    for limit in ["memory = \"64M\"", "cpu-percent = 1", "pids = 1"] {
        assert_eq!(with(limit), None, "{limit}");
    }
    for (limit, words) in [
        ("memory = 0", "limits.memory: 0 is less than the 64M"),
        ("memory = \"63M\"", "limits.memory: 63M is less than the 64M"),
        ("cpu-percent = 0", "limits.cpu-percent: must be at least 1"),
        ("pids = 0", "limits.pids: must be at least 1"),
        ("io-bytes-per-second = 0", "limits.io-bytes-per-second: must be"),
        (
            "io-operations-per-second = 0",
            "limits.io-operations-per-second: must be",
        ),
    ] {
        let refusal = with(limit).expect(limit);
        assert!(refusal.contains(words), "{refusal}");
    }
}

fn other(keys: &str) -> Result<Device, String> {
    let text = format!("socket = \"/s\"\n{keys}");
    check_vhost_user(0, 2, &toml::from_str(&text).expect(keys)).map_err(|failure| failure.to_string())
}

#[test]
fn a_queue_has_a_power_of_two_of_entries() {
    let size = |size: u16| other(&format!("type = \"fs\"\nqueue-size = {size}"));
    for sound in [2, 64, 1024] {
        let numbers = [FdNumber::NONE; 3];
        assert_eq!(
            size(sound).expect("sound").config(numbers).queue_size,
            Some(sound)
        );
    }
    for unsound in [0, 1, 96, 2048] {
        let words = size(unsound).expect_err("unsound");
        assert!(words.contains("vhost-user[0].queue-size"), "{words}");
    }
}

#[test]
fn queues_are_told_where_the_type_leaves_them_open() {
    let queues = |kind: &str| other(&format!("type = \"{kind}\"\nnum-queues = 2"));
    for open in ["blk", "scsi", "crypto", "9p", "63"] {
        assert_eq!(queues(open).expect(open).num_queues, Some(2));
    }
    for own in [
        "net", "console", "rng", "vsock", "snd", "fs", "pmem", "i2c", "gpio", "spi", "26",
    ] {
        let words = queues(own).expect_err(own);
        assert!(words.contains("vhost-user[0].num-queues"), "{words}");
    }
}

#[test]
fn types_that_cannot_work_are_refused_with_the_reason() {
    for (name, number, why) in [("gpu", 16, "display"), ("input", 18, "waits")] {
        for kind in [name.to_owned(), number.to_string()] {
            let text = format!("type = \"{kind}\"\nsocket = \"/s\"");
            let failure = check_vhost_user(0, 2, &toml::from_str(&text).expect("sound")).expect_err(name);
            let words = format!("{failure:?}");
            assert!(
                words.contains("vhost-user[0].type") && words.contains(why),
                "{words}"
            );
        }
    }
    other("type = \"sound\"").expect("works");
}

#[test]
fn slots_for_hotplug_go_with_limits_but_those_of_a_block_device() {
    for keys in [
        "",
        "hotplug = 2",
        "limits = { memory = \"1G\", cpu-percent = 50, pids = 32 }\nhotplug = 2",
        "limits = { io-bytes-per-second = \"1M\" }",
    ] {
        assert_eq!(refusal(keys), None, "{keys}");
    }
    for limit in ["io-bytes-per-second = \"1M\"", "io-operations-per-second = 9"] {
        let words = refusal(&format!("hotplug = 2\nlimits = {{ {limit} }}")).expect(limit);
        assert!(words.contains("limits.io-"), "{words}");
    }
    let words = refusal(&format!("hotplug = {}", MOST_HOTPLUG + 1)).expect("too many");
    assert!(words.contains("hotplug"), "{words}");
}

#[test]
fn slots_for_hotplug_do_not_go_with_a_vm_that_ends_with_its_devices() {
    let words = refusal("hotplug = 1\non-device-death = \"end\"").expect("both");
    assert!(
        words.contains("hotplug: does not go with on-device-death"),
        "{words}"
    );
    assert_eq!(refusal("on-device-death = \"end\""), None);
}
