//! Upgrades that come to nothing, of which whoever asked is told.

use super::helpers::heard;
use super::*;

/// A NIC whose vmm is asked to let go of its process; by which request, and who asked.
fn begin(name: &str) -> (Play, OwnedFd, u64, OwnedFd) {
    let mut play = Play::begin(name);
    let log = nic(&mut play);
    let client = play.client();
    assert_eq!(play.ask(&client, Request::Hello), Some(Answer::Hello));
    let device = "net0".to_owned();
    let (binary, _) = pair(SockType::Stream);
    send_with_fd(client.as_fd(), 7, Request::Upgrade { device }, binary.as_fd()).unwrap();
    play.supervisor.hear_clients(Instant::now());
    assert_eq!(told(&play), ["Candidate { process: 0 }"]);
    let id = play.supervisor.requests;
    (play, client, id, log)
}

/// The vmm lets go, the process ends, and the spawner is asked for one of the new build.
fn replaced(play: &mut Play, id: u64, now: Instant) {
    assert!(play.supervisor.device_answered(id, Ok(()), now));
    play.supervisor.process_ended(0, ExitStatus::Signal(9), now);
    play.supervisor.judge_devices(now);
    assert_eq!(builds(play), [Build::Candidate]);
}

/// Which builds the spawner was asked for.
fn builds(play: &Play) -> Vec<Build> {
    let next = || match receive_with_fds(play.spawner.as_fd()) {
        Ok((Received::Message(_, message), _)) => Some(message),
        _ => None,
    };
    let builds = std::iter::from_fn(next).filter_map(|message| match message {
        FromSupervisor::Respawn { build, .. } => Some(build),
        _ => None,
    });
    builds.collect()
}

fn not_upgraded(client: &OwnedFd, word: &str) {
    let answer = receive_message::<Answer>(client.as_fd());
    assert!(
        matches!(&answer, Ok(Received::Message(7, Answer::Failed(why))) if why.contains(word)),
        "{answer:?}"
    );
}

#[test]
fn one_that_the_spawner_does_not_make_is_not_tried_again() {
    let (mut play, client, id, _log) = begin("late");
    let listener = play.listener(Channel::Log).unwrap();
    let now = Instant::now();
    replaced(&mut play, id, now);
    play.supervisor.device_not_spawned(0, "no memory", now);
    not_upgraded(&client, "no memory");
    let said = heard(&mut play, &listener);
    assert!(
        said.contains("bulkhead: net0: no other process: no memory\n"),
        "{said}"
    );
    let due = play.supervisor.devices_deadline().unwrap();
    play.supervisor.judge_devices(due);
    assert_eq!(builds(&play), [Build::Current]);
}

#[test]
fn one_of_a_device_that_the_guest_lets_go_of_is_over() {
    let (mut play, client, _, _log) = begin("ejected");
    send_message(play.vmm.as_fd(), 0, FromVmm::Detached { slot: 1 }).unwrap();
    play.supervisor.hear_vmm(1, Instant::now());
    not_upgraded(&client, "let go of the device");
}

#[test]
fn one_whose_predecessor_does_not_end_is_over() {
    let (mut play, client, id, _log) = begin("held");
    let now = Instant::now();
    assert!(play.supervisor.device_answered(id, Ok(()), now));
    killed(&mut play, now);
    let late = play.supervisor.devices_deadline().unwrap();
    play.supervisor.judge_devices(late);
    not_upgraded(&client, "does not end");
}
