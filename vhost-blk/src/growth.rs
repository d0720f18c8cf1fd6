//! Growing the disk aside: a disk of the host that is slow to flush does not keep the front end's messages
//! waiting, which would take the process for one that hangs.

use crate::image::{Image, ImageError};
use jailer::tell::chain;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vhost_daemon::device::Errands;

/// How long one order may clear what the disk grows by: whoever ordered it waits for no more than 10 s.
const CLEARING: Duration = Duration::from_secs(2);

/// What becomes of an order.
enum State {
    Idle,
    /// To this many bytes.
    Ordered(u64),
    Running,
    Ended(Result<(), ImageError>),
}

impl State {
    fn is_under_way(&self) -> bool {
        matches!(self, Self::Ordered(_) | Self::Running)
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    ended: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an order and carries it out.
    fn carry_out(&self, image: &dyn Image) {
        let state = self
            .changed
            .wait_while(self.lock(), |state| !matches!(state, State::Ordered(_)));
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        vhost_daemon::progress();
        let State::Ordered(capacity) = *state else { return };
        *state = State::Running;
        drop(state);
        let outcome = image.grow(capacity, Some(Instant::now() + CLEARING));
        let mut state = self.lock();
        *state = State::Ended(outcome);
        // Under the lock: whoever takes the answer takes the event as well.
        let _ = self.ended.write(1);
        self.changed.notify_all();
    }
}

/// The session's side.
pub(crate) struct Growth(Arc<Shared>);

impl Growth {
    /// Before lockdown; [`Self::errands`] must run on a thread.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            state: Mutex::new(State::Idle),
            changed: Condvar::new(),
            ended: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        })))
    }

    /// What the device's own thread does.
    pub(crate) fn errands(&self, image: &'static dyn Image) -> Errands {
        let shared = Arc::clone(&self.0);
        Box::new(move || {
            loop {
                shared.carry_out(image);
            }
        })
    }

    /// Orders it; false while another order is under way.
    pub(crate) fn begin(&self, capacity: u64) -> bool {
        let mut state = self.0.lock();
        let idle = matches!(*state, State::Idle);
        if idle {
            *state = State::Ordered(capacity);
            self.0.changed.notify_all();
        }
        idle
    }

    /// Readable when what was ordered has ended.
    pub(crate) fn source(&self) -> Option<BorrowedFd<'_>> {
        let idle = matches!(*self.0.lock(), State::Idle);
        (!idle).then(|| self.0.ended.as_fd())
    }

    /// The answer to the order, once it has ended.
    pub(crate) fn answer(&self) -> Option<String> {
        let mut state = self.0.lock();
        match std::mem::replace(&mut *state, State::Idle) {
            State::Ended(outcome) => {
                // Only the fact counts, and the state told it.
                let _ = self.0.ended.read();
                Some(outcome.map_or_else(
                    |error| format!("error: {}\n", chain(&error)),
                    |()| "ok\n".to_owned(),
                ))
            }
            other => {
                *state = other;
                None
            }
        }
    }

    /// Waits for the end of what is under way. It takes as long as the host's disk does, which whoever flushes
    /// the image waits for as well.
    pub(crate) fn finish(&self) {
        drop(
            self.0
                .changed
                .wait_while(self.0.lock(), |state| state.is_under_way()),
        );
    }
}
