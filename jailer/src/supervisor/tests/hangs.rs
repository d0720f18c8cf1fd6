//! Hangs of a device's process whose end is to be that of the VM.

use super::*;
use vm_spec::control::{Loss, exit_code};

fn begin(name: &str) -> (Play, OwnedFd) {
    let mut play = Play::begin(name);
    let log = nic(&mut play);
    play.supervisor.on_device_death = OnDeviceDeath::End;
    (play, log)
}

/// The vmm's word that it no longer talks to the process.
fn lose(play: &mut Play, loss: Loss, now: Instant) {
    let message = FromVmm::BackendLost {
        device: "net0".to_owned(),
        generation: 0,
        loss,
        outstanding: 1,
        reason: "it says nothing".to_owned(),
    };
    send_message(play.vmm.as_fd(), 0, message).unwrap();
    play.supervisor.hear_vmm(1, now);
}

/// The process is killed once, and that ends the VM.
fn killed_for_good(play: &mut Play, now: Instant) {
    assert_eq!(told(play), ["Hung", "kill"]);
    assert_eq!(play.supervisor.outcome, None);
    play.supervisor.process_ended(0, ExitStatus::Signal(9), now);
    let outcome = play.supervisor.outcome.as_ref().unwrap();
    assert_eq!(outcome.code, exit_code::BACKEND_LOST);
    play.supervisor.judge_devices(now + Duration::from_secs(60));
    assert_eq!(told(play), [""; 0], "it has a successor");
}

#[test]
fn a_stopped_process_is_the_end() {
    let (mut play, _log) = begin("stopped");
    let now = Instant::now();
    play.supervisor.process_stopped(0, true, now);
    let due = play.supervisor.devices_deadline().unwrap();
    play.supervisor.judge_devices(due);
    killed_for_good(&mut play, due);
}

#[test]
fn a_silent_process_is_the_end() {
    let (mut play, _log) = begin("silent");
    let now = Instant::now();
    lose(&mut play, Loss::Silent, now);
    killed_for_good(&mut play, now);
}

#[test]
fn a_process_that_does_not_end_when_killed_is_the_end() {
    let (mut play, _log) = begin("held");
    let now = Instant::now();
    lose(&mut play, Loss::Silent, now);
    assert_eq!(
        play.supervisor.devices_deadline(),
        None,
        "the spawner has not killed it"
    );
    killed(&mut play, now);
    let due = play.supervisor.devices_deadline().unwrap();
    play.supervisor.judge_devices(due);
    let outcome = play.supervisor.outcome.as_ref().unwrap();
    assert_eq!(outcome.code, exit_code::BACKEND_LOST);
    assert!(
        outcome
            .line
            .as_ref()
            .is_some_and(|line| line.contains("does not end"))
    );
}

#[test]
fn a_process_that_shuts_the_guest_out_is_the_end() {
    let (mut play, _log) = begin("closed");
    let now = Instant::now();
    lose(&mut play, Loss::Closed, now);
    assert_eq!(told(&play), [""; 0], "its end says more");
    play.supervisor.judge_deadlines(now + EXIT_DEADLINE);
    let outcome = play.supervisor.outcome.as_ref().unwrap();
    assert_eq!(outcome.line.as_deref(), Some("net0: it says nothing"));
}

#[test]
fn a_vmm_that_is_stopped_pauses_its_vm() {
    let mut play = Play::begin("pause");
    let _vmm = process(&mut play, "vmm", ProcessRole::Vmm);
    let _log = nic(&mut play);
    let mut now = Instant::now();
    play.supervisor.process_stopped(0, true, now);
    // A device's process that dies meanwhile has a successor, which the vmm takes when it goes on.
    play.supervisor.process_ended(1, ExitStatus::Signal(9), now);
    play.supervisor.judge_devices(now);
    assert_eq!(told(&play), ["Died", "respawn"]);
    play.supervisor.device_spawned(1, 8, &sockets(), now);
    let id = play.supervisor.requests;
    for _ in 0..100 {
        now = play.supervisor.devices_deadline().unwrap();
        play.supervisor.judge_devices(now);
    }
    now += Duration::from_secs(39);
    play.supervisor.process_stopped(0, false, now);
    now += Duration::from_secs(39);
    play.supervisor.judge_devices(now);
    assert_eq!(told(&play), [""; 0]);
    assert!(play.supervisor.device_answered(id, Ok(()), now));
    assert_eq!(told(&play), ["Restarted"]);
    assert_eq!(play.supervisor.outcome, None);
}
