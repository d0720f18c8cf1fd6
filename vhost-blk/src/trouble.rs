//! The host fails requests of a disk: told when that begins and when it is over. A guest that reads a
//! broken place again and again makes few lines: only the 1st, 2nd, 4th, 8th and so on time is told.

use crate::counters::Operation;
use crate::outcome::{Done, Failure};
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use vhost_daemon::event::{Happening, tell};

/// Nothing fails.
const NONE: u8 = 0;

/// Of one disk; shared by its queues.
#[derive(Debug, Default)]
pub(crate) struct Trouble {
    /// The operation that failed last, counted from 1, until one succeeds.
    failing: AtomicU8,
    /// How often that began.
    times: AtomicU64,
    /// Flushes that failed.
    flushes: AtomicU64,
    /// Requests that wait for the host.
    waiting: AtomicUsize,
}

/// A trouble by the operation that it is with.
fn mark(operation: Operation) -> u8 {
    operation as u8 + 1
}

impl Trouble {
    /// A request ended so. Costs one load where nothing fails.
    pub(crate) fn saw(&self, done: &Done) {
        match &done.outcome {
            Ok(()) => {
                let failing = self.failing.load(Ordering::Relaxed);
                if failing != NONE && failing == mark(done.operation) {
                    self.over(failing);
                }
            }
            Err(failure) => self.begins(done.operation, failure),
        }
    }

    fn begins(&self, operation: Operation, failure: &Failure) {
        let Some(errno) = failure.passing() else { return };
        let times = if operation == Operation::Flush {
            // What it lost does not come back when something succeeds.
            &self.flushes
        } else if self.failing.swap(mark(operation), Ordering::Relaxed) == NONE {
            &self.times
        } else {
            return;
        };
        if (times.fetch_add(1, Ordering::Relaxed) + 1).is_power_of_two() {
            match errno {
                libc::EIO => tell(Happening::IoError, "the host's disk fails a request"),
                _ => tell(Happening::NoSpace, "the host has no space left for the image"),
            }
        }
    }

    fn over(&self, failing: u8) {
        let still = self.waiting.load(Ordering::Relaxed) > 0;
        let ours = !still
            && self
                .failing
                .compare_exchange(failing, NONE, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if ours && self.times.load(Ordering::Relaxed).is_power_of_two() {
            tell(Happening::Recovered, "the host is able again");
        }
    }

    /// A request waits for the host.
    pub(crate) fn waits(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
    }

    /// One does so no more: it is answered next.
    pub(crate) fn waits_no_more(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    fn done(operation: Operation, errno: Option<i32>) -> Done {
        let outcome = match errno {
            None => Ok(()),
            Some(errno) => Err(io::Error::from_raw_os_error(errno).into()),
        };
        Done::new(operation, 512, outcome)
    }

    #[test]
    fn trouble_lasts_until_its_operation_succeeds_and_nothing_waits() {
        let trouble = Trouble::default();
        let failing = || trouble.failing.load(Ordering::Relaxed) != NONE;
        trouble.saw(&done(Operation::Write, Some(libc::EINVAL)));
        assert!(!failing(), "it will not pass");
        trouble.saw(&done(Operation::Write, Some(libc::ENOSPC)));
        trouble.waits();
        trouble.saw(&done(Operation::Read, None));
        assert!(failing(), "reads need no space");
        trouble.saw(&done(Operation::Write, None));
        assert!(failing(), "another queue still waits");
        trouble.waits_no_more();
        trouble.saw(&done(Operation::Write, None));
        assert!(!failing());
        assert_eq!(trouble.times.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_flush_that_failed_hides_nothing_and_is_not_made_good() {
        let trouble = Trouble::default();
        let failing = || trouble.failing.load(Ordering::Relaxed) != NONE;
        trouble.saw(&done(Operation::Flush, Some(libc::EIO)));
        assert!(!failing());
        trouble.saw(&done(Operation::Write, Some(libc::ENOSPC)));
        trouble.saw(&done(Operation::Flush, Some(libc::EIO)));
        trouble.saw(&done(Operation::Flush, None));
        assert!(failing(), "writes still do");
    }
}
