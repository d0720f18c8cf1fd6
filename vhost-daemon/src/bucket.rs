//! Stops a guest from taking more than its share: token buckets for operations (packets, requests) and
//! bytes.
//!
//! Time is an argument, so the rate is exact over any span: tokens flow in with the clock, with no
//! cool-down between refills. One operation may overdraw a bucket; the debt is paid before the next.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A rate and how far it may be saved up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// Tokens a second, at least 1.
    pub per_second: u64,
    /// Most tokens saved up while idle, at least 1.
    pub burst: u64,
}

/// One token bucket. Counts in units of a token over 10^9, so that a nanosecond is never lost.
#[derive(Clone, Debug)]
struct Bucket {
    rate: Rate,
    /// Tokens times 10^9; negative when overdrawn.
    level: i128,
    filled: Instant,
}

const UNIT: i128 = 1_000_000_000;

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        Self {
            rate,
            level: i128::from(rate.burst) * UNIT,
            filled: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled).as_nanos();
        let elapsed = i128::try_from(elapsed).unwrap_or(i128::MAX);
        let flowed = elapsed.saturating_mul(i128::from(self.rate.per_second));
        self.level = self
            .level
            .saturating_add(flowed)
            .min(i128::from(self.rate.burst) * UNIT);
        self.filled = now.max(self.filled);
    }

    /// How long until the bucket holds a token.
    fn wait(&self) -> Option<Duration> {
        let missing = UNIT - self.level;
        (missing > 0).then(|| {
            let rate = i128::from(self.rate.per_second.max(1));
            let nanoseconds = (missing + rate - 1) / rate;
            Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
        })
    }

    fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * UNIT;
    }
}

/// Limits on one kind of traffic. Without any, it never waits and asks no clock.
#[derive(Clone, Debug, Default)]
pub struct Limiter {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Limiter {
    /// Limits that are full at `now`.
    #[must_use]
    pub fn new(operations: Option<Rate>, bytes: Option<Rate>, now: Instant) -> Self {
        let bucket = |rate| Bucket::new(rate, now);
        Self {
            operations: operations.map(bucket),
            bytes: bytes.map(bucket),
        }
    }

    /// There is a limit.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.operations.is_some() || self.bytes.is_some()
    }

    /// How long until an operation may pass; none when one may pass now.
    pub fn wait(&mut self, now: impl FnOnce() -> Instant) -> Option<Duration> {
        if !self.is_limited() {
            return None;
        }
        let now = now();
        [&mut self.operations, &mut self.bytes]
            .into_iter()
            .flatten()
            .filter_map(|bucket| {
                bucket.fill(now);
                bucket.wait()
            })
            .max()
    }

    /// Accounts for an operation of `bytes` that passed.
    pub fn passed(&mut self, bytes: usize) {
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes as u64);
        }
    }
}

/// Limits shared by several queues: a flow that fills one queue has the whole rate, and all queues
/// together have no more. Each may overdraw by one operation, and the debt is everyone's.
#[derive(Clone, Debug, Default)]
pub struct SharedLimiter(Option<Arc<Mutex<Limiter>>>);

impl SharedLimiter {
    /// Shares `limiter` where it limits at all.
    #[must_use]
    pub fn new(limiter: Limiter) -> Self {
        Self(limiter.is_limited().then(|| Arc::new(Mutex::new(limiter))))
    }

    /// There is a limit.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.0.is_some()
    }

    /// As [`Limiter::wait`].
    pub fn wait(&self, now: impl FnOnce() -> Instant) -> Option<Duration> {
        let limiter = self.0.as_ref()?;
        limiter.lock().unwrap_or_else(PoisonError::into_inner).wait(now)
    }

    /// As [`Limiter::passed`].
    pub fn passed(&self, bytes: usize) {
        if let Some(limiter) = &self.0 {
            limiter
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .passed(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goes as fast as allowed for `seconds`; returns operations.
    fn run(limiter: &mut Limiter, bytes: usize, seconds: u64) -> u64 {
        let start = Instant::now();
        let (mut now, mut sent) = (start, 0);
        while now < start + Duration::from_secs(seconds) {
            match limiter.wait(|| now) {
                Some(pause) => now += pause,
                None => {
                    limiter.passed(bytes);
                    sent += 1;
                }
            }
        }
        sent
    }

    fn within_two_percent(measured: u64, wanted: u64) {
        assert!(
            measured.abs_diff(wanted) * 50 <= wanted,
            "{measured} for {wanted}"
        );
    }

    #[test]
    fn operations_and_bytes_keep_their_rate() {
        let now = Instant::now();
        let operations = Rate {
            per_second: 1000,
            burst: 10,
        };
        within_two_percent(
            run(&mut Limiter::new(Some(operations), None, now), 60, 10),
            10_000,
        );
        let bytes = Rate {
            per_second: 1 << 20,
            burst: 3000,
        };
        let sent = run(&mut Limiter::new(None, Some(bytes), now), 1500, 10);
        within_two_percent(sent * 1500, 10 << 20);
    }

    #[test]
    fn an_operation_larger_than_the_burst_passes_and_is_paid_for() {
        let bytes = Rate {
            per_second: 100_000,
            burst: 1500,
        };
        let sent = run(
            &mut Limiter::new(None, Some(bytes), Instant::now()),
            64 << 10,
            100,
        );
        within_two_percent(sent * (64 << 10), 10_000_000);
    }

    #[test]
    fn idle_time_saves_up_to_the_burst() {
        let start = Instant::now();
        let mut limiter = Limiter::new(
            Some(Rate {
                per_second: 10,
                burst: 5,
            }),
            None,
            start,
        );
        let later = start + Duration::from_secs(3600);
        for _ in 0..5 {
            assert_eq!(limiter.wait(|| later), None);
            limiter.passed(1);
        }
        assert_eq!(limiter.wait(|| later), Some(Duration::from_millis(100)));
    }

    #[test]
    fn queues_that_share_a_limit_have_one_rate_between_them() {
        let start = Instant::now();
        let rate = Rate {
            per_second: 1000,
            burst: 10,
        };
        let shared = SharedLimiter::new(Limiter::new(Some(rate), None, start));
        let queues: [SharedLimiter; 4] = std::array::from_fn(|_| shared.clone());
        let (mut now, mut sent) = (start, [0u64; 4]);
        let end = start + Duration::from_secs(10);
        while now < end {
            // All look before any of them accounts for its operation: the worst order.
            let may = queues.each_ref().map(|queue| queue.wait(|| now).is_none());
            for (queue, index) in queues.iter().zip(0..).filter(|(_, index)| may[*index]) {
                queue.passed(60);
                sent[index] += 1;
            }
            now += queues[0].wait(|| now).unwrap_or_default();
        }
        within_two_percent(sent.iter().sum(), 10_000);
    }

    #[test]
    fn no_limit_asks_no_clock() {
        assert_eq!(Limiter::default().wait(|| unreachable!()), None);
        assert_eq!(SharedLimiter::default().wait(|| unreachable!()), None);
    }
}
