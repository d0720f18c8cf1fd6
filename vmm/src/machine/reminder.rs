//! Events that a guest may have missed. The event device's interrupt is an edge, which KVM drops while its pin is
//! masked: a guest that boots has no driver for it yet.

use super::ports::Ports;
use nix::poll::PollTimeout;
use std::time::{Duration, Instant};

/// An event that the guest does not read is told again after this time, and then ever later,
const FIRST: Duration = Duration::from_millis(500);
/// at most this: some guests have no driver for it at all.
const LONGEST: Duration = Duration::from_secs(8);

/// When to tell of what waits.
#[derive(Default)]
pub(super) struct Reminder {
    /// And how long that was put off.
    due: Option<(Instant, Duration)>,
}

impl Reminder {
    /// Raises the interrupt again if it is time; when to look next.
    pub(super) fn look(&mut self, ports: &Ports, now: Instant) -> PollTimeout {
        if !ports.has_unread_event() {
            self.due = None;
            return PollTimeout::NONE;
        }
        let (at, pause) = match self.due {
            Some((at, pause)) if now < at => (at, pause),
            Some((_, pause)) => {
                ports.raise_again();
                let pause = (pause * 2).min(LONGEST);
                (now + pause, pause)
            }
            None => (now + FIRST, FIRST),
        };
        self.due = Some((at, pause));
        // One more millisecond, so that the time has come when poll returns.
        PollTimeout::try_from(at - now + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::read;
    use vm_spec::machine::GED_PORT;

    fn raised(ports: &Ports) -> bool {
        read(ports.interrupt(), &mut [0; 8]).is_ok()
    }

    #[test]
    fn what_is_not_read_is_told_again_ever_later() {
        let ports = Ports::new().unwrap();
        let mut reminder = Reminder::default();
        let mut now = Instant::now();
        assert_eq!(reminder.look(&ports, now), PollTimeout::NONE);
        ports.press_power_button().unwrap();
        assert!(raised(&ports));
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let wait = reminder.look(&ports, now).as_millis().unwrap();
            assert_eq!(raised(&ports), !pauses.is_empty());
            pauses.push(wait - 1);
            // Whatever else wakes the main thread changes nothing.
            now += Duration::from_millis(200);
            let left = reminder.look(&ports, now).as_millis().unwrap();
            assert_eq!((left, raised(&ports)), (wait - 200, false));
            now += Duration::from_millis(left.into());
        }
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 8000, 8000]);
        assert_eq!(ports.read(GED_PORT), Some(1));
        assert_eq!(reminder.look(&ports, now), PollTimeout::NONE);
        // The next one is told as early as the first.
        ports.press_power_button().unwrap();
        assert_eq!(reminder.look(&ports, now).as_millis(), Some(501));
    }
}
