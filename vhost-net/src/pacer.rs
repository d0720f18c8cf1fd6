//! A queue's fd to wait for: the TAP, or an epoll of it with a rate limit's timer and, where the
//! TAP has several queues, the news that this one was attached or detached.

use crate::header::Cut;
use crate::steering::Seat;
use crate::tap::Tap;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost_daemon::{SharedLimiter, Wait};

/// Which way the frames of a queue go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    /// Waits for the TAP to have a frame.
    Receive,
    /// Waits for the TAP to take a frame.
    Transmit,
}

/// One direction of one queue's TAP, held to its limits.
pub struct Pacer {
    tap: Arc<Tap>,
    flow: Flow,
    limiter: SharedLimiter,
    seat: Option<Arc<Seat>>,
    events: Option<Events>,
}

/// Several causes behind one fd.
struct Events {
    epoll: Epoll,
    timer: TimerFd,
    /// The TAP is in `epoll`.
    watching: bool,
    /// The timer runs.
    armed: bool,
}

impl Pacer {
    /// Makes what it needs to wait: before lockdown. `seat` where the TAP has several queues and
    /// the direction depends on it.
    ///
    /// # Errors
    /// When the kernel gives no timer or epoll instance.
    pub fn new(
        tap: Arc<Tap>,
        flow: Flow,
        limiter: SharedLimiter,
        seat: Option<Arc<Seat>>,
    ) -> io::Result<Self> {
        let several = limiter.is_limited() || seat.is_some();
        let events = several.then(|| Events::new(seat.as_deref())).transpose()?;
        Ok(Self {
            tap,
            flow,
            limiter,
            seat,
            events,
        })
    }

    /// The TAP.
    #[must_use]
    pub fn tap(&self) -> &Tap {
        &self.tap
    }

    /// The driver does not use the pair.
    #[must_use]
    pub fn is_detached(&self) -> bool {
        self.seat.as_ref().is_some_and(|seat| !seat.is_attached())
    }

    /// What to poll.
    #[must_use]
    pub fn source(&self) -> BorrowedFd<'_> {
        match &self.events {
            Some(events) => events.epoll.0.as_fd(),
            None => self.tap.as_fd(),
        }
    }

    /// What to wait for before the next frame, if the limits or the steering say so.
    pub fn wait(&mut self) -> Option<Wait> {
        if let (Some(seat), Some(events)) = (&self.seat, &mut self.events) {
            seat.acknowledge();
            if !seat.is_attached() {
                events.unwatch(&self.tap);
                return Some(Wait::READABLE);
            }
        }
        let pause = self.limiter.wait(Instant::now)?;
        let events = self.events.as_mut()?;
        events.unwatch(&self.tap);
        events.arm(pause);
        Some(Wait::READABLE)
    }

    /// There is a limit.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.limiter.is_limited()
    }

    /// Accounts for what becomes of a frame of `bytes`: each packet counts, and has headers.
    pub fn passed(&mut self, bytes: usize, cut: Cut) {
        if self.limiter.is_limited() {
            for _ in 1..cut.packets {
                self.limiter.passed(cut.headers);
            }
            self.limiter.passed(bytes);
        }
    }

    /// What to wait for when the TAP answered EAGAIN.
    pub fn blocked(&mut self) -> Wait {
        match (&mut self.events, self.flow) {
            (Some(events), flow) => {
                events.disarm();
                events.watch(&self.tap, flow);
                Wait::READABLE
            }
            (None, Flow::Receive) => Wait::READABLE,
            (None, Flow::Transmit) => Wait::WRITABLE,
        }
    }

    /// What to wait for when the TAP answered that it is detached or gone: that it is attached, if it
    /// has a seat. More buffers do not help.
    pub fn unusable(&mut self) -> Wait {
        if let Some(events) = &mut self.events {
            events.disarm();
            events.unwatch(&self.tap);
        }
        Wait {
            available: false,
            readable: self.events.is_some(),
            writable: false,
            pause: None,
        }
    }
}

impl Events {
    fn new(seat: Option<&Seat>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        if let Some(seat) = seat {
            epoll.add(seat.wake(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        }
        Ok(Self {
            epoll,
            timer,
            watching: false,
            armed: false,
        })
    }

    fn arm(&mut self, pause: Duration) {
        // Zero would disarm it.
        let pause = pause.max(Duration::from_nanos(1));
        let expiry = Expiration::OneShot(TimeSpec::from_duration(pause));
        self.armed = true;
        if let Err(error) = self.timer.set(expiry, TimerSetTimeFlags::empty()) {
            tracing::warn!(%error, "cannot arm the rate limit's timer");
        }
    }

    /// Also takes back an expiry that nobody read.
    fn disarm(&mut self) {
        if std::mem::take(&mut self.armed)
            && let Err(error) = self.timer.unset()
        {
            tracing::warn!(%error, "cannot disarm the rate limit's timer");
        }
    }

    fn watch(&mut self, tap: &Tap, flow: Flow) {
        let event = match flow {
            Flow::Receive => EpollFlags::EPOLLIN,
            Flow::Transmit => EpollFlags::EPOLLOUT,
        };
        if !self.watching {
            match self.epoll.add(tap, EpollEvent::new(event, 0)) {
                Ok(()) => self.watching = true,
                Err(error) => tracing::warn!(%error, "cannot watch the TAP"),
            }
        }
    }

    /// A TAP queue that is detached reports an error for as long as it is watched.
    fn unwatch(&mut self, tap: &Tap) {
        if std::mem::take(&mut self.watching)
            && let Err(error) = self.epoll.delete(tap)
        {
            tracing::warn!(%error, "cannot stop to watch the TAP");
        }
    }
}
