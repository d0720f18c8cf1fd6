//! The end that a person asks for.

use super::*;

/// What the vmm was told.
fn orders(play: &Play) -> Vec<ToVmm> {
    let next = || match receive_message(play.vmm.as_fd()) {
        Ok(Received::Message(_, order)) => Some(order),
        _ => None,
    };
    std::iter::from_fn(next).collect()
}

#[test]
fn a_guest_that_boots_is_asked_again_until_its_time_is_over() {
    let mut play = Play::begin("asked-again");
    play.supervisor.guest_runs = true;
    let now = Instant::now();
    play.supervisor.power_off(now);
    play.supervisor.judge_deadlines(now);
    assert_eq!(orders(&play), [ToVmm::PowerButton]);
    for _ in 0..2 {
        send_message(play.vmm.as_fd(), 0, FromVmm::Rebooted).unwrap();
    }
    play.supervisor.hear_vmm(8, now);
    play.supervisor.judge_deadlines(now);
    assert_eq!(
        orders(&play),
        [ToVmm::PowerButton],
        "the next guest has not heard"
    );
    let later = play.supervisor.deadline().unwrap();
    assert!(later > now && later < now + play.supervisor.grace, "{later:?}");
    play.supervisor.judge_deadlines(later);
    assert_eq!(orders(&play), [ToVmm::PowerButton]);
    play.supervisor.judge_deadlines(now + play.supervisor.grace);
    assert_eq!(orders(&play), [ToVmm::Stop]);
    let code = play.supervisor.outcome.as_ref().map(|outcome| outcome.code);
    assert_eq!(code, Some(exit_code::TIMEOUT));
}

#[test]
fn a_reboot_that_nobody_stops_is_no_power_off() {
    let mut play = Play::begin("reboots");
    play.supervisor.guest_runs = true;
    send_message(play.vmm.as_fd(), 0, FromVmm::Rebooted).unwrap();
    play.supervisor.hear_vmm(8, Instant::now());
    play.supervisor.judge_deadlines(Instant::now());
    assert_eq!((orders(&play), play.supervisor.phase), (vec![], Phase::Running));
}

#[test]
fn a_vm_whose_guest_does_not_run_yet_has_nobody_to_ask() {
    let mut play = Play::begin("not-yet");
    let now = Instant::now();
    play.supervisor.power_off(now);
    assert_eq!(orders(&play), [ToVmm::Stop]);
    assert_eq!(play.supervisor.phase, Phase::Stopping(now + EXIT_DEADLINE));
    // What the vmm makes of it does not replace why.
    let why = FromVmm::Ended(vm_spec::control::EndReason::Stopped);
    send_message(play.vmm.as_fd(), 0, why).unwrap();
    play.supervisor.hear_vmm(8, now);
    let outcome = play.supervisor.outcome.as_ref().unwrap();
    assert_eq!(outcome.code, exit_code::ERROR);
    assert!(outcome.line.as_ref().unwrap().contains("before its guest ran"));
}
