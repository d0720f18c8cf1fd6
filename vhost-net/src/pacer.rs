//! A queue's fd to wait for: the TAP, or with a rate limit, an epoll of the TAP and a timer.

use crate::bucket::Limiter;
use crate::tap::Tap;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost_daemon::Wait;

const TAP: u64 = 0;
const TIMER: u64 = 1;

/// Which way the frames of a queue go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    /// Waits for the TAP to have a frame.
    Receive,
    /// Waits for the TAP to take a frame.
    Transmit,
}

impl Flow {
    fn event(self) -> EpollFlags {
        match self {
            Self::Receive => EpollFlags::EPOLLIN,
            Self::Transmit => EpollFlags::EPOLLOUT,
        }
    }
}

/// One direction of one queue's TAP, held to its limits.
pub struct Pacer {
    tap: Arc<Tap>,
    flow: Flow,
    limiter: Limiter,
    limited: Option<Limited>,
}

struct Limited {
    epoll: Epoll,
    timer: TimerFd,
}

impl Pacer {
    /// Makes the timer where there is a limit: before lockdown.
    ///
    /// # Errors
    /// When the kernel gives no timer or epoll instance.
    pub fn new(tap: Arc<Tap>, flow: Flow, limiter: Limiter) -> io::Result<Self> {
        let limited = if limiter.is_limited() {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
            let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
            epoll.add(&*tap, EpollEvent::new(flow.event(), TAP))?;
            epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
            Some(Limited { epoll, timer })
        } else {
            None
        };
        Ok(Self {
            tap,
            flow,
            limiter,
            limited,
        })
    }

    /// The TAP.
    #[must_use]
    pub fn tap(&self) -> &Tap {
        &self.tap
    }

    /// What to poll.
    #[must_use]
    pub fn source(&self) -> BorrowedFd<'_> {
        match &self.limited {
            Some(limited) => limited.epoll.0.as_fd(),
            None => self.tap.as_fd(),
        }
    }

    /// What to wait for before the next frame, if the limits say so.
    pub fn wait(&mut self) -> Option<Wait> {
        let pause = self.limiter.wait(Instant::now)?;
        let limited = self.limited.as_ref()?;
        limited.pause(&self.tap, pause);
        Some(Wait::READABLE)
    }

    /// Accounts for a frame of `bytes`.
    pub fn passed(&mut self, bytes: usize) {
        self.limiter.passed(bytes);
    }

    /// What to wait for when the TAP answered EAGAIN.
    #[must_use]
    pub fn blocked(&self) -> Wait {
        match (&self.limited, self.flow) {
            (Some(limited), _) => {
                limited.watch(&self.tap, self.flow.event());
                Wait::READABLE
            }
            (None, Flow::Receive) => Wait::READABLE,
            (None, Flow::Transmit) => Wait::WRITABLE,
        }
    }
}

impl Limited {
    /// Only the timer wakes.
    fn pause(&self, tap: &Tap, pause: Duration) {
        self.watch(tap, EpollFlags::empty());
        let shortest = pause.max(Duration::from_nanos(1));
        let expiry = Expiration::OneShot(TimeSpec::from_duration(shortest));
        if let Err(error) = self.timer.set(expiry, TimerSetTimeFlags::empty()) {
            tracing::warn!(%error, "cannot arm the rate limit's timer");
        }
    }

    /// Only the TAP wakes: an expired timer is put off.
    fn watch(&self, tap: &Tap, events: EpollFlags) {
        let disarmed = self.timer.unset();
        let watched = self.epoll.modify(tap, &mut EpollEvent::new(events, TAP));
        if let Err(error) = disarmed.and(watched) {
            tracing::warn!(%error, "cannot watch the TAP");
        }
    }
}
