//! What the vmm and devices' processes, which may have been broken into, can have us say and keep.

use super::helpers::heard;
use super::*;
use vm_spec::events::{MOST_TOLD, TOLD_PERIOD};

/// The vmm says so, and is heard.
fn says(play: &mut Play, message: FromVmm, now: Instant) {
    send_message(play.vmm.as_fd(), 0, message).unwrap();
    play.supervisor.hear_vmm(1, now);
}

fn fault(device: &str, reason: &str) -> FromVmm {
    FromVmm::DeviceFault {
        device: device.to_owned(),
        reason: reason.to_owned(),
    }
}

#[test]
fn it_has_one_line_at_a_time_and_not_in_our_name() {
    let mut play = Play::begin("one-line");
    let _log = nic(&mut play);
    let listener = play.listener(Channel::Log).unwrap();
    let now = Instant::now();
    says(&mut play, fault("net0", "x\nthe guest powered off"), now);
    says(&mut play, fault("net0", &"\n".repeat(60_000)), now);
    says(&mut play, FromVmm::Failed("no\nthe guest reset".to_owned()), now);
    says(&mut play, fault("else", "nobody knows it"), now);
    let said = heard(&mut play, &listener);
    assert!(said.lines().all(|line| line.starts_with("bulkhead: ")), "{said}");
    assert_eq!(said.lines().count(), 3, "{said}");
    assert!(!said.contains("bulkhead: the guest"), "{said}");
    let failed = FromVmm::Error {
        what: "no\nthe guest powered off".to_owned(),
        cause: "\n".repeat(60_000),
        hint: String::new(),
    };
    says(&mut play, failed, now);
    let said = heard(&mut play, &listener);
    assert_eq!(said.lines().count(), 2, "{said}");
}

#[test]
fn it_is_heard_no_more_often_than_is_of_use() {
    let mut play = Play::begin("quota");
    let _log = nic(&mut play);
    let listener = play.listener(Channel::Log).unwrap();
    let now = Instant::now();
    for _ in 0..10 * VMM_LINES {
        says(&mut play, fault("net0", "again"), now);
        says(&mut play, FromVmm::Failed("again".to_owned()), now);
    }
    let mut said = String::new();
    loop {
        match &*heard(&mut play, &listener) {
            "" => break,
            more => said.push_str(more),
        }
    }
    assert_eq!(said.lines().count() as u32, VMM_LINES + 1, "{said}");
    assert_eq!(said.matches("too much").count(), 1, "{said}");
    assert_eq!(told(&play).len() as u32, VMM_LINES / 2);
    says(&mut play, fault("net0", "later"), now + VMM_PERIOD);
    assert!(heard(&mut play, &listener).contains("later"));
    assert_eq!(told(&play), ["NeedsReset"]);
}

#[test]
fn the_guest_runs_once() {
    let mut play = Play::begin("runs");
    for _ in 0..3 {
        let running = FromVmm::Running {
            started_ns: 1,
            first_instruction_ns: 2,
        };
        says(&mut play, running, Instant::now());
    }
    assert_eq!(left::<FromSupervisor>(&play.spawner), 1);
}

#[test]
fn only_a_slot_that_was_taken_is_empty() {
    let mut play = Play::begin("slots");
    let _log = nic(&mut play);
    for slot in [1, 1, 0, 3, 200] {
        says(&mut play, FromVmm::Detached { slot }, Instant::now());
    }
    assert_eq!(play.supervisor.plugs.free(), "1, 3, 4");
}

#[test]
fn a_process_tells_of_so_much_and_the_rest_is_counted() {
    let mut play = Play::begin("told");
    let log = nic(&mut play);
    let now = Instant::now();
    let line = b"event: no-space: nothing is left\n";
    for _ in 0..200 {
        nix::unistd::write(&log, line).unwrap();
    }
    play.settle();
    play.supervisor.note_told(now);
    let most = MOST_TOLD as usize;
    assert_eq!(told(&play), vec!["NoSpace"; most]);
    let more = |play: &mut Play, now| {
        nix::unistd::write(&log, line).unwrap();
        // Lines have their own bound.
        play.supervisor.processes[0]
            .log
            .read(&mut play.supervisor.log, now);
        play.supervisor.note_told(now);
    };
    more(&mut play, now + TOLD_PERIOD / 2);
    assert_eq!(told(&play), [""; 0]);
    more(&mut play, now + TOLD_PERIOD);
    let next = receive_message::<FromSupervisor>(play.spawner.as_fd());
    assert!(
        matches!(&next, Ok(Received::Message(_, FromSupervisor::Event(event))) if event.count == 202),
        "{next:?}"
    );
}
