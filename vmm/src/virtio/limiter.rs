//! A bound on what a guest, or a back end that it has won, makes us say: a driver that resets and
//! breaks its device in a loop must not flood the supervisor.

use std::time::{Duration, Instant};

/// Events in one [`WINDOW`].
const EVENTS: u32 = 16;
const WINDOW: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Limiter {
    since: Instant,
    said: u32,
}

impl Limiter {
    pub(super) fn new() -> Self {
        Self {
            since: Instant::now(),
            said: 0,
        }
    }

    /// Whether one more event may go out.
    pub(super) fn allows(&mut self) -> bool {
        if self.since.elapsed() > WINDOW {
            *self = Self::new();
        }
        self.said += u32::from(self.said <= EVENTS);
        self.said <= EVENTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_cut_and_the_next_window_is_free() {
        let mut limiter = Limiter::new();
        assert_eq!((0..1000).filter(|_| limiter.allows()).count(), 16);
        limiter.since = Instant::now().checked_sub(2 * WINDOW).unwrap();
        assert!(limiter.allows());
    }
}
