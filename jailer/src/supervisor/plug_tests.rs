//! Devices that are attached and detached, with the spawner, the vmm and a client played.

use super::tests::{Play, pair, sockets, told};
use super::*;
use crate::wire_fds::{receive_with_fds, send_with_fds};
use nix::sys::socket::{Shutdown, SockType, shutdown};
use std::os::fd::{AsRawFd, BorrowedFd};
use vm_spec::client::{Answer, Attachment, Refusal, Request};
use vm_spec::control::{BACKEND_FDS, DeviceConfig, FromVmm, Loss};
use vm_spec::run_state::{FdState, Kept, ProcessRole};
use vm_spec::supervise::{AddedProcess, ExitStatus};

fn config(id: &str) -> DeviceConfig {
    DeviceConfig {
        id: id.into(),
        slot: 0,
        device_type: 2,
        socket: FdNumber::NONE,
        requests: FdNumber::NONE,
        requests_peer: FdNumber::NONE,
        num_queues: None,
        queue_size: None,
        config: Vec::new(),
        config_features: 0,
        ours: false,
        in_order: false,
    }
}

/// A disk with one descriptor besides its streams and its socket.
fn disk(id: &str) -> Attachment {
    let fds = (0..5).map(|number| FdState {
        number,
        what: String::new(),
        kept: Kept::Always,
    });
    Attachment {
        device: config(id),
        process: Some(AddedProcess {
            name: id.into(),
            role: ProcessRole::Disk,
            arguments: vec!["--fd=3".into(), "--blk-fd=4".into()],
            fds: fds.collect(),
            socket: FdNumber(3),
            made: Vec::new(),
            watches: 1,
        }),
    }
}

fn someones(id: &str) -> Attachment {
    Attachment {
        device: config(id),
        process: None,
    }
}

/// A VM that runs, and a client of it.
fn running(name: &str) -> (Play, OwnedFd) {
    let mut play = Play::begin(name);
    play.supervisor.guest_runs = true;
    let client = play.client();
    assert_eq!(play.ask(&client, Request::Hello), Some(Answer::Hello));
    (play, client)
}

/// Sends a request, with as many descriptors.
fn ask(play: &mut Play, client: &OwnedFd, request: Request, count: usize) {
    let (fd, _) = pair(SockType::Stream);
    let fds: Vec<BorrowedFd<'_>> = (0..count).map(|_| fd.as_fd()).collect();
    send_with_fds(client.as_fd(), 7, request, &fds).unwrap();
    play.supervisor.hear_clients(Instant::now());
}

fn attach(play: &mut Play, client: &OwnedFd, attachment: Attachment) {
    let count = attachment
        .process
        .as_ref()
        .map_or(BACKEND_FDS, |process| 2 + process.descriptors());
    ask(play, client, Request::Attach(Box::new(attachment)), count);
}

fn detach(play: &mut Play, client: &OwnedFd, device: &str) {
    let device = device.to_owned();
    ask(play, client, Request::Detach { device }, 0);
}

fn answer(client: &OwnedFd) -> Option<Answer> {
    match receive_message(client.as_fd()) {
        Ok(Received::Message(7, answer)) => Some(answer),
        _ => None,
    }
}

fn failed(client: &OwnedFd) -> String {
    match answer(client) {
        Some(Answer::Failed(why)) => why,
        other => panic!("{other:?}"),
    }
}

fn refused(client: &OwnedFd) -> String {
    match answer(client) {
        Some(Answer::Refused(Refusal::Because(why))) => why,
        other => panic!("{other:?}"),
    }
}

/// What the vmm was asked, and by which request.
fn asked(play: &Play) -> Option<(u64, ToVmm, usize)> {
    match receive_with_fds(play.vmm.as_fd()) {
        Ok((Received::Message(id, message), fds)) => Some((id, message, fds.len())),
        _ => None,
    }
}

fn vmm_says(play: &mut Play, id: u64, message: FromVmm) {
    send_message(play.vmm.as_fd(), id, message).unwrap();
    play.supervisor.hear_vmm(8, Instant::now());
}

/// The spawner makes the process that it was asked for; the request by which the vmm is given its socket.
fn spawned(play: &mut Play, index: usize, pid: i32) -> u64 {
    let now = Instant::now();
    play.supervisor.judge_devices(now);
    let words = told(play);
    assert!(words.last().is_some_and(|word| word == "respawn"), "{words:?}");
    play.supervisor.device_spawned(index, pid, &sockets(), now);
    let (id, message, fds) = asked(play).unwrap();
    assert!(
        matches!(&message, ToVmm::Attach(device) if device.ours),
        "{message:?}"
    );
    assert_eq!(fds, BACKEND_FDS);
    id
}

fn ends(play: &mut Play, index: usize) {
    let status = ExitStatus::Code(0);
    play.supervisor.process_ended(index, status, Instant::now());
}

fn removed(play: &mut Play, process: u16) {
    send_message(play.spawner.as_fd(), 0, ToSupervisor::Removed { process }).unwrap();
    play.supervisor.hear_spawner(Instant::now()).unwrap();
}

#[test]
fn a_device_comes_is_replaced_like_any_other_and_goes() {
    let (mut play, client) = running("comes");
    attach(&mut play, &client, disk("disk1"));
    let words = told(&play);
    assert!(words.iter().any(|word| word.starts_with("Add ")), "{words:?}");
    let id = spawned(&mut play, 0, 40);
    assert_eq!(answer(&client), None, "the guest cannot see it yet");
    vmm_says(&mut play, id, FromVmm::Done);
    let wanted = Answer::Attached {
        slot: 3,
        pid: Some(40),
    };
    assert_eq!(answer(&client), Some(wanted));
    assert_eq!(told(&play), ["Attached"]);

    // Its process dies: the vmm goes on with another.
    let now = Instant::now();
    play.supervisor.process_ended(0, ExitStatus::Signal(9), now);
    play.supervisor.judge_devices(now + Duration::from_secs(1));
    assert_eq!(told(&play), ["Died", "respawn"]);
    play.supervisor.device_spawned(0, 41, &sockets(), now);
    let (id, message, fds) = asked(&play).unwrap();
    let (slot, generation) = (3, 1);
    assert_eq!(
        (message, fds),
        (ToVmm::ReplaceBackend { slot, generation }, BACKEND_FDS)
    );
    vmm_says(&mut play, id, FromVmm::Done);
    assert_eq!(told(&play), ["Restarted"]);

    detach(&mut play, &client, "disk1");
    let (id, message, _) = asked(&play).unwrap();
    assert_eq!(message, ToVmm::Detach { slot: 3 });
    vmm_says(&mut play, id, FromVmm::Done);
    vmm_says(&mut play, 0, FromVmm::Detached { slot: 3 });
    assert_eq!(answer(&client), None, "its process has not flushed");
    ends(&mut play, 0);
    assert_eq!(answer(&client), None, "the spawner holds its image");
    removed(&mut play, 0);
    assert_eq!(answer(&client), Some(Answer::Detached));
    let words = told(&play);
    assert_eq!(words[0], "Detached");
    assert!(
        words[1].starts_with("Remove") && words[1].contains("disk1"),
        "{words:?}"
    );
    assert_eq!(words.len(), 2, "nobody starts it again: {words:?}");

    // Its name, its slot and its place are free.
    attach(&mut play, &client, disk("disk1"));
    let id = spawned(&mut play, 0, 42);
    vmm_says(&mut play, id, FromVmm::Done);
    assert!(matches!(answer(&client), Some(Answer::Attached { slot: 3, .. })));
}

#[test]
fn what_cannot_be_attached_is_refused_before_anyone_else_hears_of_it() {
    let (mut play, client) = running("refused");
    let of_the_vmm = AddedProcess {
        role: ProcessRole::Vmm,
        ..disk("disk1").process.unwrap()
    };
    let of_the_vmm = Attachment {
        process: Some(of_the_vmm),
        ..someones("disk1")
    };
    for (attachment, word) in [
        (of_the_vmm, "none of a device"),
        (someones("../disk"), "none of a device"),
        (
            Attachment {
                device: DeviceConfig {
                    slot: 9,
                    ..config("disk1")
                },
                process: None,
            },
            "slot 9",
        ),
    ] {
        attach(&mut play, &client, attachment);
        let why = refused(&client);
        assert!(why.contains(word), "{why}");
    }
    ask(&mut play, &client, Request::Attach(Box::new(disk("disk1"))), 3);
    assert!(refused(&client).contains("descriptors"));
    assert_eq!((told(&play), asked(&play)), (vec![], None));
    // Both slots are still there, and no third.
    for id in ["a", "b"] {
        attach(&mut play, &client, someones(id));
        let (id, ..) = asked(&play).unwrap();
        vmm_says(&mut play, id, FromVmm::Done);
        assert!(matches!(
            answer(&client),
            Some(Answer::Attached { pid: None, .. })
        ));
    }
    attach(&mut play, &client, someones("a"));
    assert_eq!(answer(&client), Some(Answer::Refused(Refusal::IdTaken)));
    attach(&mut play, &client, someones("c"));
    assert!(refused(&client).contains("no PCI slot is left"));
    detach(&mut play, &client, "c");
    assert_eq!(answer(&client), Some(Answer::Refused(Refusal::NoDevice)));
}

/// The guest does not see the first yet.
#[test]
fn two_that_come_at_once_have_two_ids() {
    let (mut play, client) = running("at-once");
    attach(&mut play, &client, someones("fs0"));
    let (first, ..) = asked(&play).unwrap();
    attach(&mut play, &client, someones("fs0"));
    assert_eq!(answer(&client), Some(Answer::Refused(Refusal::IdTaken)));
    assert_eq!(asked(&play), None);
    let fs0 = || Some(Answer::Devices(vec!["fs0".to_owned()]));
    assert_eq!(play.ask(&client, Request::Devices), fs0());
    vmm_says(&mut play, first, FromVmm::Done);
    assert!(matches!(answer(&client), Some(Answer::Attached { slot: 3, .. })));
    assert_eq!(play.ask(&client, Request::Devices), fs0());
}

#[test]
fn one_that_the_vmm_cannot_use_is_ended_and_leaves_its_slot() {
    let (mut play, client) = running("useless");
    attach(&mut play, &client, disk("disk1"));
    let id = spawned(&mut play, 0, 40);
    vmm_says(&mut play, id, FromVmm::Failed("no VERSION_1".into()));
    assert_eq!(told(&play), ["kill"]);
    ends(&mut play, 0);
    let words = told(&play);
    assert!(words.len() == 1 && words[0].starts_with("Remove"), "{words:?}");
    assert_eq!(answer(&client), None, "its image is locked");
    removed(&mut play, 0);
    assert!(failed(&client).contains("no VERSION_1"));
    attach(&mut play, &client, disk("disk1"));
    let id = spawned(&mut play, 0, 41);
    vmm_says(&mut play, id, FromVmm::Done);
    assert!(matches!(answer(&client), Some(Answer::Attached { slot: 3, .. })));
}

#[test]
fn one_that_ends_at_once_fails_whoever_tells_of_it_first() {
    for vmm_first in [false, true] {
        let (mut play, client) = running(&format!("ends{vmm_first}"));
        attach(&mut play, &client, disk("disk1"));
        let id = spawned(&mut play, 0, 40);
        if vmm_first {
            vmm_says(&mut play, id, FromVmm::Failed("closed".into()));
            ends(&mut play, 0);
        } else {
            ends(&mut play, 0);
            assert_eq!(answer(&client), None, "the slot is the vmm's until it answers");
            vmm_says(&mut play, id, FromVmm::Failed("closed".into()));
        }
        removed(&mut play, 0);
        assert!(failed(&client).contains("closed"));
        let words = told(&play);
        assert!(words.last().unwrap().starts_with("Remove"), "{words:?}");
        assert!(!words.contains(&"respawn".to_owned()), "{words:?}");
    }
}

#[test]
fn one_that_is_on_its_way_when_its_device_goes_is_ended() {
    for made in [true, false] {
        let (mut play, client) = running(&format!("late{made}"));
        attach(&mut play, &client, disk("disk1"));
        let id = spawned(&mut play, 0, 40);
        vmm_says(&mut play, id, FromVmm::Done);
        answer(&client).unwrap();
        detach(&mut play, &client, "disk1");
        asked(&play).unwrap();
        let now = Instant::now();
        play.supervisor.process_ended(0, ExitStatus::Signal(9), now);
        play.supervisor.judge_devices(now + Duration::from_secs(1));
        assert_eq!(told(&play), ["Attached", "Died", "respawn"]);
        vmm_says(&mut play, 0, FromVmm::Detached { slot: 3 });
        assert_eq!(told(&play), ["Detached"], "a process may be there any moment");
        if made {
            play.supervisor.device_spawned(0, 41, &sockets(), now);
            assert_eq!(told(&play), ["kill"]);
            ends(&mut play, 0);
        } else {
            play.supervisor.device_not_spawned(0, "no memory", now);
        }
        assert!(told(&play)[0].starts_with("Remove"));
        removed(&mut play, 0);
        assert_eq!(answer(&client), Some(Answer::Detached));
        attach(&mut play, &client, disk("disk1"));
        let _ = spawned(&mut play, 0, 42);
    }
}

#[test]
fn one_that_is_made_too_late_is_removed_all_the_same() {
    let (mut play, client) = running("too-late");
    attach(&mut play, &client, disk("disk1"));
    let id = spawned(&mut play, 0, 40);
    vmm_says(&mut play, id, FromVmm::Failed("useless".into()));
    ends(&mut play, 0);
    play.supervisor.device_spawned(0, 41, &sockets(), Instant::now());
    ends(&mut play, 0);
    let words = told(&play);
    assert_eq!((&*words[0], &*words[2]), ("kill", "kill"), "{words:?}");
    assert!(words[1].starts_with("Remove") && words[3].starts_with("Remove"));
}

#[test]
fn one_that_the_spawner_cannot_make_is_not_attached() {
    let (mut play, client) = running("no-process");
    attach(&mut play, &client, disk("disk1"));
    let now = Instant::now();
    play.supervisor.judge_devices(now);
    assert_eq!(told(&play).last().map(String::as_str), Some("respawn"));
    play.supervisor.device_not_spawned(0, "no memory", now);
    let words = told(&play);
    assert!(words.len() == 1 && words[0].starts_with("Remove"), "{words:?}");
    removed(&mut play, 0);
    assert!(failed(&client).contains("no memory"));
    assert_eq!(asked(&play), None, "the vmm never heard of it");
}

#[test]
fn a_guest_that_keeps_a_device_may_let_go_of_it_later() {
    let (mut play, client) = running("keeps");
    attach(&mut play, &client, disk("disk1"));
    let id = spawned(&mut play, 0, 40);
    vmm_says(&mut play, id, FromVmm::Done);
    answer(&client).unwrap();
    detach(&mut play, &client, "disk1");
    let (id, ..) = asked(&play).unwrap();
    vmm_says(&mut play, id, FromVmm::Done);
    detach(&mut play, &client, "disk1");
    assert!(refused(&client).contains("already"));
    let later = play.supervisor.plugs_deadline().unwrap();
    play.supervisor.judge_plugs(later);
    assert!(failed(&client).contains("may do so later"));
    let _ = told(&play);
    vmm_says(&mut play, 0, FromVmm::Detached { slot: 3 });
    // It does not end by itself.
    let later = play.supervisor.plugs_deadline().unwrap();
    play.supervisor.judge_plugs(later);
    assert_eq!(told(&play), ["Detached", "kill"]);
    ends(&mut play, 0);
    assert!(told(&play)[0].starts_with("Remove"));
    assert_eq!(play.supervisor.plugs_deadline(), None);
}

#[test]
fn someone_elses_back_end_that_is_gone_is_given_up() {
    let (mut play, client) = running("remote");
    attach(&mut play, &client, someones("fs0"));
    let (id, ..) = asked(&play).unwrap();
    vmm_says(&mut play, id, FromVmm::Done);
    answer(&client).unwrap();
    let lost = FromVmm::BackendLost {
        device: "fs0".into(),
        generation: 0,
        loss: Loss::Closed,
        outstanding: 0,
        reason: "closed".into(),
    };
    vmm_says(&mut play, 0, lost);
    play.supervisor
        .judge_remotes(Instant::now() + Duration::from_secs(2));
    let (_, message, _) = asked(&play).unwrap();
    assert!(
        matches!(message, ToVmm::GiveUpBackend { slot: 3, .. }),
        "{message:?}"
    );
    detach(&mut play, &client, "fs0");
    let (id, ..) = asked(&play).unwrap();
    vmm_says(&mut play, id, FromVmm::Done);
    vmm_says(&mut play, 0, FromVmm::Detached { slot: 3 });
    assert_eq!(answer(&client), Some(Answer::Detached));
    attach(&mut play, &client, someones("fs0"));
    let (id, message, fds) = asked(&play).unwrap();
    assert!(matches!(message, ToVmm::Attach(device) if device.slot == 3));
    assert_eq!(fds, BACKEND_FDS);
    vmm_says(&mut play, id, FromVmm::Done);
    assert!(matches!(answer(&client), Some(Answer::Attached { slot: 3, .. })));
    assert_eq!(play.supervisor.remotes.len(), 1, "it has the first one's place");
}

#[test]
fn why_no_device_may_change_is_said() {
    let (mut play, client) = running("over");
    let both = |play: &mut Play, word: &str| {
        attach(play, &client, disk("disk1"));
        let why = refused(&client);
        assert!(why.contains(word), "{why}");
        detach(play, &client, "disk1");
        assert_eq!(refused(&client), why);
    };
    play.supervisor.guest_runs = false;
    both(&mut play, "the VM starts");
    play.supervisor.on_device_death = OnDeviceDeath::End;
    both(&mut play, "on-device-death");
    play.supervisor.on_device_death = OnDeviceDeath::Restart;
    play.supervisor.guest_runs = true;
    play.supervisor.power_off(Instant::now());
    play.supervisor.stop_vmm(Instant::now());
    both(&mut play, "the VM ends");
}

#[test]
fn a_vmm_that_cannot_be_told_is_not_waited_for() {
    let (mut play, client) = running("untold");
    attach(&mut play, &client, someones("fs0"));
    let (id, ..) = asked(&play).unwrap();
    vmm_says(&mut play, id, FromVmm::Done);
    answer(&client).unwrap();
    shutdown(play.vmm.as_raw_fd(), Shutdown::Both).unwrap();
    detach(&mut play, &client, "fs0");
    assert!(refused(&client).contains("the vmm cannot be told"));
    assert_eq!(play.supervisor.plugs_deadline(), None);
}

/// Only a vmm that is not itself any more, or a guest of utmost haste, does that.
#[test]
fn one_whose_slot_is_emptied_before_it_is_there_is_not_attached() {
    let (mut play, client) = running("emptied");
    attach(&mut play, &client, disk("disk1"));
    let id = spawned(&mut play, 0, 40);
    vmm_says(&mut play, 0, FromVmm::Detached { slot: 3 });
    vmm_says(&mut play, id, FromVmm::Done);
    assert_eq!(told(&play), ["kill"]);
    ends(&mut play, 0);
    removed(&mut play, 0);
    assert!(failed(&client).contains("emptied"));
    assert_eq!(play.supervisor.plugs.free(), "3, 4");
}
