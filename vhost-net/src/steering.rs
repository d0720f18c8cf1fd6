//! Which queues of a multi-queue TAP the kernel may steer flows to: those whose receive ring runs
//! and that the driver asked for. A frame for any other would never reach the guest.

use crate::offload::TunOffload;
use crate::state::State;
use crate::tap::{QueueState, Tap};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// All queue pairs of one device.
pub struct Steering {
    seats: Vec<Arc<Seat>>,
    wishes: Mutex<Wishes>,
    /// What waits in the first pair's queue may be of a kind that the driver does not take.
    unfit: AtomicBool,
    state: Arc<State>,
}

/// What the driver and the front end want.
struct Wishes {
    /// Pairs that the driver uses (virtio 1.3, 5.1.6.5.5).
    active: usize,
    running: Vec<bool>,
}

/// One pair's place, shared with its receive queue.
pub struct Seat {
    tap: Arc<Tap>,
    attached: AtomicBool,
    wake: EventFd,
    signalled: AtomicBool,
}

/// Tells the steering whether a receive queue's ring runs.
pub struct Running {
    steering: Arc<Steering>,
    pair: usize,
    now: bool,
}

impl Running {
    /// For the receive queue of pair `pair`, which does not run yet.
    #[must_use]
    pub fn new(steering: Arc<Steering>, pair: usize) -> Self {
        Self {
            steering,
            pair,
            now: false,
        }
    }

    /// It runs now, or does not.
    pub fn set(&mut self, now: bool) {
        if self.now != now {
            self.now = now;
            self.steering.set_running(self.pair, now);
        }
    }

    /// Whether frames that wait for this queue since before it started may be of a kind that the driver does
    /// not take; says so once. The others' were dropped as they were detached.
    pub fn take_unfit(&self) -> bool {
        self.pair == 0 && self.steering.unfit.swap(false, Ordering::AcqRel)
    }
}

impl Steering {
    /// Of `taps`, until a driver says otherwise, all that run. What it says is kept in `state`.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new(taps: &[Arc<Tap>], state: Arc<State>) -> io::Result<Self> {
        let seat = |tap: &Arc<Tap>| {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            Ok(Arc::new(Seat {
                tap: Arc::clone(tap),
                attached: AtomicBool::new(tap.was_attached()),
                wake: EventFd::from_flags(flags)?,
                signalled: AtomicBool::new(false),
            }))
        };
        let seats: Vec<_> = taps.iter().map(seat).collect::<io::Result<_>>()?;
        let steering = Self {
            wishes: Mutex::new(Wishes {
                active: seats.len(),
                running: vec![false; seats.len()],
            }),
            unfit: AtomicBool::new(false),
            seats,
            state,
        };
        steering.change(|_| ());
        Ok(steering)
    }

    /// Pairs that there are.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.seats.len()
    }

    /// The place of pair `index`.
    #[must_use]
    pub fn seat(&self, index: usize) -> Option<&Arc<Seat>> {
        self.seats.get(index)
    }

    /// The receive ring of pair `index` runs, or does not.
    pub fn set_running(&self, index: usize, running: bool) {
        self.change(|wishes| {
            if let Some(place) = wishes.running.get_mut(index) {
                *place = running;
            }
        });
    }

    /// The driver uses the first `pairs` pairs. How often the kernel had to be asked.
    pub fn set_active(&self, pairs: usize) -> usize {
        self.state.set_pairs(pairs);
        self.change(|wishes| wishes.active = pairs)
    }

    /// The driver goes on with the pairs that it uses: all, if it never said which.
    pub fn resume(&self) {
        let pairs = self.state.pairs(self.pairs()).unwrap_or(self.pairs());
        self.change(|wishes| wishes.active = pairs);
    }

    /// A driver takes this unfinished; the one before may have had more in the queue.
    pub fn set_offload(&self, offload: TunOffload) {
        if !offload.contains(self.state.offload()) {
            self.unfit.store(true, Ordering::Release);
        }
        self.state.set_offload(offload);
    }

    /// All pairs that run are used, until a driver says otherwise.
    pub fn reset(&self) {
        self.change(|wishes| wishes.active = self.pairs());
    }

    fn change(&self, change: impl FnOnce(&mut Wishes)) -> usize {
        let mut wishes = self.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut wishes);
        let settle = |(index, seat): (usize, &Arc<Seat>)| {
            let running = wishes.running.get(index).copied().unwrap_or(false);
            // The first pair always stays: frames wait in its queue while no ring runs.
            seat.settle(index == 0 || (running && index < wishes.active))
        };
        self.seats
            .iter()
            .enumerate()
            .map(settle)
            .filter(|asked| *asked)
            .count()
    }
}

impl Seat {
    /// The kernel steers to this pair.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.attached.load(Ordering::Acquire)
    }

    /// Readable when [`Seat::is_attached`] changed.
    #[must_use]
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Takes a change off [`Seat::wake`].
    pub fn acknowledge(&self) {
        if self.signalled.swap(false, Ordering::AcqRel) {
            // EAGAIN: nothing is left to take.
            let _ = self.wake.read();
        }
    }

    /// Whether the kernel had to be asked.
    fn settle(&self, wanted: bool) -> bool {
        if self.is_attached() == wanted {
            return false;
        }
        let state = if wanted {
            QueueState::Attached
        } else {
            QueueState::Detached
        };
        match self.tap.set_queue(state) {
            Ok(()) => {
                self.attached.store(wanted, Ordering::Release);
                // The flag after the eventfd: whoever sees the flag finds the eventfd readable.
                let _ = self.wake.write(1);
                self.signalled.store(true, Ordering::Release);
            }
            Err(error) => tracing::warn!(%error, ?state, "the TAP refused to steer"),
        }
        true
    }
}
