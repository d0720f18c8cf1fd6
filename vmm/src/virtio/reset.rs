//! Resets, a driver's and the machine's. One is done when nobody writes to the guest's memory any
//! more: a back end that was lost while it had rings may write until its process has ended.
//!
//! The supervisor, which was told of the loss, kills the process and asks for a successor only once
//! it was reaped; or it gives the device up. Nobody knows the process of a back end that was
//! connected to: what it does is waited for as long as a process may take to end, or until its server,
//! connected to again, answers. That it can be connected to says nothing: a listener's backlog takes
//! connections while nobody serves them.

use super::device::DeviceEvent;
use super::device_type::DeviceType;
use super::mailbox::Answer;
use super::pulse::Pulse;
use super::worker::{Phase, Worker};
use crate::error::chain;
use crate::frontend::Error;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// A reset that waits for the end of a process.
pub(super) struct Held {
    until: Instant,
    /// Who waits for it.
    answers: Vec<Answer<()>>,
}

impl Held {
    /// Until it waits no longer.
    pub(super) fn timeout(&self) -> PollTimeout {
        // One more millisecond, so that the time has come when poll returns.
        let left = self.left() + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    pub(super) fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

impl Worker {
    /// A driver's reset, or the machine's: drains, brings the back end to its first state and
    /// lets the driver see it done. A back end that fails meanwhile is lost, and the reset done once
    /// its process has ended.
    pub(super) fn reset(&mut self) {
        let started: Option<Vec<u16>> = match &self.phase {
            Phase::Idle => None,
            Phase::Running(order) | Phase::Drained(order) | Phase::Orphaned(order) => {
                Some(order.rings.iter().map(|ring| ring.index).collect())
            }
        };
        // That there is no back end was told when it was lost.
        if let Err(error) = self.drain()
            && !matches!(error, Error::NoBackend)
        {
            tracing::warn!(
                device = self.context.spec.id,
                error = chain(&error),
                "drain failed"
            );
        }
        self.phase = Phase::Idle;
        self.pulse = Pulse::new();
        self.bus_master.note_reset();
        self.written.forget_untaken();
        if let Some(rings) = started {
            // A failure was reported by `with_session`.
            let _ = self.with_session(|s| s.reset(rings));
            // Of what the driver wrote some back ends undo it, some do not: a successor must be as the next
            // driver finds this one. Of a NIC's address and status the control queue may have told it.
            let is_nic = DeviceType(self.context.spec.device_type) == DeviceType::NET;
            if is_nic || !self.written.is_empty() {
                self.refresh_config();
            }
            self.forget_inflight();
        }
        // That nobody can connect to someone else's back end does not end its process.
        let given_up = self.abandoned && self.context.options.ours;
        if self.has_rings && !given_up && !self.is_ending() {
            let until = Instant::now() + self.context.options.deadlines.end;
            self.held.get_or_insert(Held {
                until,
                answers: Vec::new(),
            });
        } else {
            self.complete_reset();
        }
    }

    /// The machine's reset, which is answered once it is done.
    pub(super) fn reset_for(&mut self, answer: Answer<()>) {
        self.reset();
        match &mut self.held {
            Some(held) => held.answers.push(answer),
            None => self.tell_reset(&answer),
        }
    }

    /// Whoever had rings before writes no longer, or nobody will ever know.
    pub(super) fn predecessor_ended(&mut self) {
        self.has_rings = false;
        if self.held.is_some() {
            // It may have noted requests since the reset began.
            self.forget_inflight();
            self.complete_reset();
        }
    }

    /// Looks, while a reset is held, at the time.
    pub(super) fn look_at_reset(&mut self) {
        if self
            .held
            .as_ref()
            .is_some_and(|held| Instant::now() >= held.until)
        {
            tracing::warn!(
                device = self.context.spec.id,
                "reset, though nobody said that the lost back end has ended"
            );
            self.predecessor_ended();
        }
    }

    fn forget_inflight(&mut self) {
        if let Some(region) = &self.inflight
            && let Err(error) = region.zero()
        {
            // Without it a crashed back end cannot be replaced, but nothing wrong is replayed.
            tracing::warn!(error = chain(&error), "in-flight region dropped");
            self.inflight = None;
        }
    }

    fn complete_reset(&mut self) {
        self.ring_error.take();
        // Without the writes that the reset has cancelled.
        self.transport.set_config(&self.offer.config);
        self.transport.complete_reset();
        let held = self.held.take();
        for answer in held.iter().flat_map(|held| &held.answers) {
            self.tell_reset(answer);
        }
        if let Some(done) = self.leaving.take() {
            self.over = true;
            done();
        }
    }

    fn tell_reset(&self, answer: &Answer<()>) {
        // Nobody waits any more: it took too long.
        let _ = answer.send(Ok(()));
        (self.context.events)(DeviceEvent::WasReset);
    }

    /// Whether the VM ends: nobody reads the guest's memory any more.
    fn is_ending(&self) -> bool {
        is_set(&self.context.ending)
    }
}

/// Whether an event has happened; it stays so.
pub(super) fn is_set(event: &EventFd) -> bool {
    let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}
