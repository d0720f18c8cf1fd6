//! How much of one kind someone who is not trusted may cause.

use std::time::{Duration, Instant};

/// At most so many within so long.
pub(super) struct Quota {
    most: u32,
    period: Duration,
    began: Instant,
    /// In the period that has begun last; refused ones too.
    asked: u32,
}

impl Quota {
    pub(super) fn new(most: u32, period: Duration, now: Instant) -> Self {
        Self {
            most,
            period,
            began: now,
            asked: 0,
        }
    }

    /// Takes one; false: there were enough.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        if now.duration_since(self.began) >= self.period {
            (self.began, self.asked) = (now, 0);
        }
        self.asked = self.asked.saturating_add(1);
        self.asked <= self.most
    }

    /// Whether the last one was the first of its period.
    pub(super) fn is_fresh(&self) -> bool {
        self.asked == 1
    }

    /// Whether the last one was the first of its period that was refused.
    pub(super) fn is_just_spent(&self) -> bool {
        self.asked == self.most.saturating_add(1)
    }
}
