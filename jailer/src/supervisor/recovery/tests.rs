use super::*;

const MS: Duration = Duration::from_millis(1);

fn serve_one(recovery: &mut Recovery, now: Instant) {
    assert_eq!(recovery.due(now), Some(Order::Respawn));
    assert_eq!(recovery.spawned(now, 7), Some(recovery.generation));
    assert!(recovery.joins_by(7) && !recovery.joins_by(6));
    recovery.joined(now);
}

#[test]
fn a_process_that_had_served_is_replaced_at_once_however_often() {
    let mut now = Instant::now();
    let mut recovery = Recovery::new(now);
    for _ in 0..500 {
        now += HEALTHY;
        assert_eq!(recovery.ended(now, "signal 9"), None);
        assert_eq!(recovery.deadline(), Some(now));
        serve_one(&mut recovery, now);
    }
}

#[test]
fn processes_that_die_again_and_again_are_given_up_unless_they_last_a_second() {
    let mut now = Instant::now();
    let mut recovery = Recovery::new(now);
    for _ in 0..10_000 {
        now += Duration::from_secs(1);
        assert_eq!(recovery.ended(now, "signal 9"), None);
        serve_one(&mut recovery, now);
    }
    let mut deaths = 0;
    let reason = loop {
        now += HEALTHY;
        deaths += 1;
        match recovery.ended(now, "signal 9") {
            Some(Order::GiveUp(reason)) => break reason,
            other => assert_eq!(other, None),
        }
        serve_one(&mut recovery, now);
    };
    assert!((MOST_DEATHS..MOST_DEATHS + 60).contains(&deaths), "{deaths}");
    assert!(reason.contains("600 times"), "{reason}");
}

#[test]
fn one_that_dies_at_once_is_tried_ever_later_and_then_given_up() {
    let start = Instant::now();
    let mut now = start;
    let mut recovery = Recovery::new(now);
    let mut delays = Vec::new();
    let reason = loop {
        match recovery.ended(now, "signal 11") {
            Some(Order::GiveUp(reason)) => break reason,
            other => assert_eq!(other, None),
        }
        let due = recovery.deadline().unwrap();
        delays.push(due - now);
        now = due;
        serve_one(&mut recovery, now);
        now += MS;
    };
    assert!(reason.contains("signal 11"), "{reason}");
    assert_eq!(delays[..3], [Duration::ZERO, 10 * MS, 20 * MS]);
    assert!(delays.iter().all(|delay| *delay <= LONGEST_DELAY));
    assert!(now - start < Duration::from_secs(8), "{:?}", now - start);
    // It stays lost.
    assert_eq!(recovery.ended(now, "signal 9"), None);
    assert_eq!(
        (recovery.due(now + 100 * LONGEST_DELAY), recovery.deadline()),
        (None, None)
    );
}

/// Processes that are killed a moment after they serve, every fifth of them before it has done anything: chance makes
/// no guest wait long.
#[test]
fn deaths_at_random_moments_never_add_up_to_a_long_wait() {
    let mut now = Instant::now();
    let mut recovery = Recovery::new(now);
    let mut random = 1u64;
    for death in 1..=10_000 {
        // A linear congruential generator; its upper bits are random.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let served = if death % 5 == 0 {
            1
        } else {
            10 + (random >> 33) % 181
        };
        now += Duration::from_millis(served);
        assert_eq!(recovery.ended(now, "signal 9"), None);
        let wait = recovery.deadline().unwrap() - now;
        assert!(wait <= 40 * MS, "{wait:?} after {death} deaths");
        // So slow a host that no number of deaths is too large.
        now += wait + Duration::from_secs(1);
        serve_one(&mut recovery, now);
    }
}

#[test]
fn a_process_that_cannot_be_killed_is_never_replaced() {
    let now = Instant::now();
    let mut recovery = Recovery::new(now);
    assert_eq!(recovery.condemn(now, "no answer"), Some(Order::Kill));
    assert_eq!(recovery.condemn(now, "again"), None);
    recovery.killed(now);
    assert_eq!(recovery.due(now + KILL_DEADLINE - MS), None);
    let Some(Order::GiveUp(reason)) = recovery.due(now + KILL_DEADLINE) else {
        panic!("not given up");
    };
    assert!(reason.contains("no answer"), "{reason}");
    // Even when it ends after all: the guest has been told.
    assert_eq!(recovery.ended(now + 2 * KILL_DEADLINE, "signal 9"), None);
    assert_eq!(recovery.deadline(), None);
}

#[test]
fn a_spawner_that_is_stopped_costs_no_device() {
    let mut now = Instant::now();
    let later = 100 * KILL_DEADLINE;
    let mut recovery = Recovery::new(now);
    assert_eq!(recovery.condemn(now, "no answer"), Some(Order::Kill));
    assert_eq!((recovery.deadline(), recovery.due(now + later)), (None, None));
    recovery.not_told(now);
    now = recovery.deadline().unwrap();
    assert_eq!(recovery.due(now), Some(Order::Kill));
    now += later;
    recovery.killed(now);
    assert_eq!(recovery.ended(now, "signal 9"), None);
    assert_eq!(recovery.due(now), Some(Order::Respawn));
    assert_eq!((recovery.deadline(), recovery.due(now + later)), (None, None));
    recovery.not_told(now);
    now = recovery.deadline().unwrap();
    assert_eq!(recovery.due(now), Some(Order::Respawn));
    assert_eq!(recovery.spawned(now + later, 7), Some(1));
}

#[test]
fn a_process_that_stays_stopped_is_killed_and_one_that_goes_on_is_not() {
    let now = Instant::now();
    let mut recovery = Recovery::new(now);
    recovery.stopped(now, true);
    assert_eq!(recovery.due(now + STOP_DEADLINE - MS), None);
    recovery.stopped(now + STOP_DEADLINE - MS, false);
    assert_eq!(
        (recovery.deadline(), recovery.due(now + 2 * STOP_DEADLINE)),
        (None, None)
    );
    recovery.stopped(now, true);
    assert!(recovery.is_hung(now + STOP_DEADLINE));
    assert_eq!(recovery.due(now + STOP_DEADLINE), Some(Order::Kill));
    assert!(!recovery.is_hung(now + STOP_DEADLINE));
    assert_eq!(recovery.ended(now + STOP_DEADLINE, "signal 9"), None);
    assert_eq!(recovery.due(now + STOP_DEADLINE), Some(Order::Respawn));
}

#[test]
fn a_process_that_is_upgraded_has_not_failed() {
    let now = Instant::now();
    let mut recovery = Recovery::new(now);
    for id in 0..1000 {
        assert!(recovery.release(now, id) && recovery.releases_by(id));
        assert!(!recovery.release(now, id), "one at a time");
        assert_eq!(recovery.released(now), Some(Order::Kill));
        assert!(recovery.is_told());
        assert_eq!(recovery.ended(now, "signal 9"), None);
        serve_one(&mut recovery, now);
    }
    // One that the vmm does not let go of is killed all the same.
    assert!(recovery.release(now, 7));
    assert_eq!(recovery.due(now + RELEASE_DEADLINE), Some(Order::Kill));
}

#[test]
fn a_successor_that_does_not_fit_is_killed_and_another_tried() {
    let now = Instant::now();
    let mut recovery = Recovery::new(now);
    recovery.ended(now, "signal 9");
    assert_eq!(recovery.due(now), Some(Order::Respawn));
    assert_eq!(recovery.spawned(now, 1), Some(1));
    assert_eq!(recovery.spawned(now, 2), None, "nobody waits for a second one");
    assert_eq!(recovery.condemn(now, "it lacks features"), Some(Order::Kill));
    assert_eq!(recovery.ended(now, "signal 9"), None);
    assert_eq!(recovery.due(now), None, "not at once this time");
    assert_eq!(recovery.due(now + FIRST_DELAY), Some(Order::Respawn));
}
