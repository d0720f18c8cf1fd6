//! What the session's thread sees of another, a queue's or the device's own, without its help: how often it went
//! round its loop, and how long it had a CPU for its own code. A thread that waits, for the guest or for a slow disk,
//! has none, and one for which the kernel works, as it does to write much back, does not use it itself; one that
//! uses a CPU for seconds within one round spins, and will not come back.

use nix::time::{ClockId, clock_gettime};
use std::cell::OnceCell;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

/// Longest CPU time of one round, or between two calls of [`progress`] in it. A round moves some hundred kilobytes or
/// inflates a few clusters; of a request that asks for more, each part is told: this is far above either on any host.
const MOST_CPU: Duration = Duration::from_secs(2);

thread_local! {
    /// That of this thread, where it is watched. Not dropped: a destructor would be registered at the first look, by
    /// calls that a process without watched threads may not make.
    static PULSE: ManuallyDrop<OnceCell<Arc<Pulse>>> = const { ManuallyDrop::new(OnceCell::new()) };
}

/// Says that a queue's thread gets on with a request that may take seconds, or a device's own with an errand. What
/// calls it does so a bounded number of times for each: a thread that calls it for ever is not found to spin. Nothing
/// on any other thread.
pub fn progress() {
    PULSE.with(|pulse| {
        if let Some(pulse) = pulse.get() {
            pulse.beat();
        }
    });
}

/// Kept by the thread.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    rounds: AtomicU64,
    thread: AtomicI32,
}

impl Pulse {
    /// Called on the thread, before it is confined.
    pub(crate) fn start(self: &Arc<Self>) {
        PULSE.with(|pulse| {
            pulse.get_or_init(|| Arc::clone(self));
        });
        self.thread
            .store(nix::unistd::gettid().as_raw(), Ordering::Release);
    }

    /// One more round.
    pub(super) fn beat(&self) {
        self.rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// Kept by the session.
#[derive(Debug)]
pub(crate) struct Watch {
    pulse: Arc<Pulse>,
    /// Rounds, and CPU time, when this round was seen first.
    seen: Option<(u64, Duration)>,
}

impl Watch {
    /// Of a thread that has started its pulse before anybody looks.
    pub(crate) fn new(pulse: Arc<Pulse>) -> Self {
        Self { pulse, seen: None }
    }

    /// Whether the thread has used [`MOST_CPU`] since a look that found it in the same round.
    pub(crate) fn spins(&mut self) -> bool {
        let rounds = self.pulse.rounds.load(Ordering::Relaxed);
        let Ok(cpu) = clock_gettime(cpu_clock(self.pulse.thread.load(Ordering::Acquire))) else {
            return false;
        };
        let cpu = Duration::from(cpu);
        match self.seen {
            Some((before, at)) if before == rounds => cpu.saturating_sub(at) >= MOST_CPU,
            _ => {
                self.seen = Some((rounds, cpu));
                false
            }
        }
    }
}

/// The clock of a thread of this process that counts its CPU time outside the kernel (Linux: the complement of its id
/// above three bits that say "of a thread" and "user time").
fn cpu_clock(thread: i32) -> ClockId {
    ClockId::from_raw((!thread << 3) | 5)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::Instant;

    fn wait(mut until: impl FnMut() -> bool) -> bool {
        let end = Instant::now() + Duration::from_secs(60);
        while Instant::now() < end {
            if until() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        false
    }

    #[test]
    fn one_that_spins_is_told_from_one_that_waits_and_those_that_work() {
        let pulses: [Arc<Pulse>; 4] = Default::default();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let [spinner, waiter, worker, plodder] = &pulses;
            scope.spawn(|| {
                spinner.start();
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            scope.spawn(|| {
                waiter.start();
                while !stop.load(Ordering::Relaxed) {
                    std::thread::park_timeout(Duration::from_millis(10));
                }
            });
            scope.spawn(|| {
                worker.start();
                while !stop.load(Ordering::Relaxed) {
                    worker.beat();
                }
            });
            scope.spawn(|| {
                plodder.start();
                while !stop.load(Ordering::Relaxed) {
                    progress();
                }
            });
            let started = wait(|| pulses.iter().all(|p| p.thread.load(Ordering::Acquire) != 0));
            let mut watches = pulses.each_ref().map(|pulse| Watch::new(Arc::clone(pulse)));
            let [spins, waits, works, plods] = &mut watches;
            let mut wrong = false;
            let found = wait(|| {
                wrong |= waits.spins() || works.spins() || plods.spins();
                spins.spins()
            });
            stop.store(true, Ordering::Relaxed);
            assert!(started && found && !wrong);
        });
    }
}
