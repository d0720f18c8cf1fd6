//! The device's thread: the only one that talks to its back end.
//!
//! ```text
//! Idle --DRIVER_OK--> Running --drain--> Drained --resume--> Running
//!   ^                    |                  |
//!   +------- reset ------+------------------+
//! ```
//! While bus mastering is switched off DRIVER_OK leads to Drained, and nothing from there to Running.
//! The session may be missing in any of these: a lost back end leaves the phase as it is, so
//! that a successor can take over from there.

use super::bus_master::BusMaster;
use super::configuration::Written;
use super::device::{DeviceEvent, EventSink, Word};
use super::device_type::DeviceType;
use super::limiter::Limiter;
use super::mailbox::{Command, Mail, Mailbox, StartOrder};
use super::offer::{self, Offer};
use super::pulse::Pulse;
use super::reset::{Held, is_set};
use super::seat::{Confine, Order, unconfined};
use super::transport::Transport;
use crate::error::chain;
use crate::frontend::{
    BackendSockets, Error, InflightRegion, QueueState, Ring, RingEvents, Session, SessionOptions, SharedEvent,
};
use jailer::sandbox::{Role, most_open_files};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use std::os::fd::{AsFd, RawFd};
use std::sync::Arc;
use vm_spec::control::{DeviceConfig, Loss};

/// Queues' eventfds have numbers below this: a back end that decides how many queues there are takes no room from
/// the successors of others, which come with three sockets and a region each while predecessors leave two, nor from
/// devices that are attached.
const MOST_OF_QUEUES: RawFd = most_open_files(Role::Vmm) as RawFd - 96;

/// What the thread is given.
pub(super) struct Context {
    pub(super) spec: DeviceConfig,
    pub(super) options: SessionOptions,
    /// Readable when no successor is to take over any more.
    pub(super) ending: Arc<EventFd>,
    pub(super) events: EventSink,
    pub(super) mailbox: Arc<Mailbox>,
    /// Of the first back end.
    pub(super) generation: u32,
}

/// What negotiation found out.
pub(super) struct Negotiated {
    pub(super) offer: Offer,
    pub(super) events: Vec<RingEvents>,
}

/// Where the rings are.
pub(super) enum Phase {
    Idle,
    Running(StartOrder),
    /// Stopped, each ring's base set to where it stopped; nobody has been told to go on from there.
    Drained(StartOrder),
    /// The back end was lost while they ran, its successor has not been told of them yet: each ring's base
    /// is where completions stand, and requests may be in flight.
    Orphaned(StartOrder),
}

pub(super) struct Worker {
    pub(super) context: Context,
    pub(super) transport: Arc<Transport>,
    pub(super) session: Option<Session>,
    pub(super) offer: Offer,
    pub(super) written: Written,
    pub(super) inflight: Option<InflightRegion>,
    /// One for all queues: a back end's word that a ring is broken.
    pub(super) ring_error: Arc<SharedEvent>,
    pub(super) phase: Phase,
    pub(super) bus_master: BusMaster,
    /// The latest back end, be it lost, was given rings and has not been seen to stop.
    pub(super) has_rings: bool,
    /// A reset that is not done.
    pub(super) held: Option<Held>,
    /// Bounds the events that a guest can cause again and again.
    limiter: Limiter,
    /// No successor will come: a driver that starts the device is told at once.
    pub(super) abandoned: bool,
    /// Who is told once the device has ended: the guest has let go of it.
    pub(super) leaving: Option<Word>,
    /// Nothing is to be done for the device any more.
    pub(super) over: bool,
    /// Which back end the session is, or was, with.
    pub(super) generation: u32,
    pub(super) pulse: Pulse,
}

/// Serves one device to its end.
pub(super) fn run(order: Order, confine: &mut Option<Confine>) {
    let Order {
        context,
        sockets,
        give,
        take,
        answered,
    } = order;
    let done = negotiate(&context, sockets).and_then(|done| {
        let confined = confine.take().map_or(Ok(()), |confine| confine());
        confined.map(|()| done).map_err(unconfined)
    });
    let (told, serving) = match done {
        Ok((session, inflight, offer, ring_error, events)) => {
            let negotiated = Negotiated {
                offer: offer.clone(),
                events,
            };
            (Ok(negotiated), Some((session, inflight, offer, ring_error)))
        }
        Err(error) => (Err(error), None),
    };
    let heard = give.send(told).is_ok();
    if let Some(answered) = answered {
        answered();
    }
    // Hung up: the machine could not be built, or the device not be.
    let (Some((session, inflight, offer, ring_error)), true, Ok(transport)) = (serving, heard, take.recv())
    else {
        return;
    };
    let generation = context.generation;
    Worker {
        context,
        transport,
        session: Some(session),
        offer,
        written: Written::default(),
        inflight,
        ring_error,
        phase: Phase::Idle,
        bus_master: BusMaster::On,
        has_rings: false,
        held: None,
        limiter: Limiter::new(),
        abandoned: false,
        leaving: None,
        over: false,
        generation,
        pulse: Pulse::new(),
    }
    .serve();
}

type Parts = (
    Session,
    Option<InflightRegion>,
    Offer,
    Arc<SharedEvent>,
    Vec<RingEvents>,
);

fn negotiate(context: &Context, sockets: BackendSockets) -> Result<Parts, Error> {
    let mut options = context.options.clone();
    if options.ours && DeviceType(context.spec.device_type) != DeviceType::NET {
        // It opens its files first, and tries a passphrase for seconds. Should it die of that, it hangs up at once.
        options.deadlines.first_answer = options.deadlines.drain;
    }
    let mut session = Session::connect(sockets, options)?;
    let offer = offer::make(&mut session, &context.spec)?;
    let inflight = session.get_inflight(offer.served, offer.queue_size)?;
    let ring_error = Arc::new(SharedEvent::new()?);
    let events = RingEvents::of_queues(offer.queues, &ring_error, MOST_OF_QUEUES)?;
    Ok((session, inflight, offer, ring_error, events))
}

impl Worker {
    fn serve(mut self) {
        loop {
            self.wait();
            let mail = self.context.mailbox.take();
            if mail.quit {
                return;
            }
            self.read_mail(mail);
            if self.over {
                return self.await_quit();
            }
            if self.ring_error.take() > 0 {
                self.needs_reset("back end reported a broken ring (vring error eventfd)".to_owned());
            }
            self.look_at_session();
            self.look_for_progress();
            self.look_at_reset();
            if self.over {
                return self.await_quit();
            }
            self.look_at_bus_master();
        }
    }

    /// Keeps the connection until whoever has the device says so: its end, which the back end sees, comes after the
    /// word that the device is gone.
    fn await_quit(&self) {
        while !self.context.mailbox.take().quit {
            let mut mail = [PollFd::new(self.context.mailbox.as_fd(), PollFlags::POLLIN)];
            // Interrupted or not: it is looked at next.
            let _ = poll(&mut mail, PollTimeout::NONE);
        }
    }

    /// Waits for mail, a ring's error or the back end.
    fn wait(&self) {
        let mut fds = vec![
            PollFd::new(self.context.mailbox.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.ring_error.as_fd(), PollFlags::POLLIN),
        ];
        if let Some(session) = &self.session {
            fds.push(PollFd::new(session.socket(), PollFlags::POLLIN));
            fds.extend(
                session
                    .request_channel()
                    .map(|fd| PollFd::new(fd, PollFlags::POLLIN)),
            );
        }
        let timeout = match (&self.held, self.bus_master.timeout(), &self.phase) {
            (Some(held), ..) => held.timeout(),
            (None, Some(timeout), _) => timeout,
            (None, None, Phase::Running(_)) if self.session.is_some() => self.pulse.timeout(),
            _ => PollTimeout::NONE,
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            // Out of memory, at most: the mail is looked at in any case.
            Err(error) => tracing::warn!(%error, "poll failed"),
        }
    }

    fn read_mail(&mut self, mail: Mail) {
        // Before the reset: rings that it ends do not go on first.
        self.set_bus_master(mail.master_off, mail.master_on);
        if mail.reset {
            self.reset();
        }
        // Before the start: those of a driver that sets the device up come before it.
        self.write_config(mail.config_writes);
        if let Some(order) = mail.start {
            self.start(order);
        }
        for queue in mail.bells {
            let events = self.transport.events.get(usize::from(queue));
            events.inspect(|events| events.kick.signal());
        }
        if let Some(done) = mail.eject {
            self.leaving = Some(done);
            self.reset();
            if self.over {
                return;
            }
        }
        for command in mail.commands {
            match command {
                Command::Drain(answer) => drop(answer.send(self.drain())),
                Command::Resume(answer) => drop(answer.send(self.resume())),
                Command::Replace(successor, done) => done(self.replace(successor)),
                Command::Release(done) => {
                    let drained = self.drain();
                    self.session = None;
                    done(drained.map(drop));
                }
                Command::Reset(answer) => self.reset_for(answer),
                Command::GiveUp(reason) => {
                    self.abandoned = true;
                    // Before a reset that waits is done: whoever waits for status 0 must see it.
                    self.needs_reset(reason);
                    if self.context.options.ours {
                        self.predecessor_ended();
                    }
                }
            }
        }
    }

    /// Looks at the back end after every wake-up, whatever it was: a request of the back end that
    /// came during an exchange has been taken off its channel, which is silent now.
    fn look_at_session(&mut self) {
        let Some(session) = &mut self.session else {
            return;
        };
        if let Err(error) = session.check_idle() {
            self.lose(&error);
            return;
        }
        if session.take_config_change() {
            self.reread_config();
            // Another change may have come, and been noted, while this one was read.
            self.context.mailbox.wake();
        }
    }

    /// Runs `step` on the session; a failure costs the session.
    pub(super) fn with_session<T>(
        &mut self,
        step: impl FnOnce(&mut Session) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let session = self.session.as_mut().ok_or(Error::NoBackend)?;
        step(session).inspect_err(|error| self.lose(error))
    }

    pub(super) fn lose(&mut self, error: &Error) {
        if self.session.take().is_some() {
            self.report_lost(error);
        }
    }

    fn report_lost(&self, error: &Error) {
        (self.context.events)(DeviceEvent::BackendLost {
            device: self.context.spec.id.clone(),
            generation: self.generation,
            // Whatever it was, the session is over.
            loss: error.loss().unwrap_or(Loss::Broken),
            outstanding: self.outstanding(),
            reason: chain(error),
        });
    }

    pub(super) fn needs_reset(&mut self, reason: String) {
        self.transport.needs_reset();
        if self.limiter.allows() {
            (self.context.events)(DeviceEvent::NeedsReset {
                device: self.context.spec.id.clone(),
                reason,
            });
        }
    }

    fn start(&mut self, order: StartOrder) {
        let started = if self.masters_bus() {
            let started = self.start_rings(&order);
            // Also when it failed: a successor starts these rings.
            self.phase = Phase::Running(order);
            started
        } else {
            self.phase = Phase::Drained(order);
            self.with_session(|_| Ok(()))
        };
        match started {
            Err(error) if self.abandoned => self.needs_reset(chain(&error)),
            Err(error @ Error::NoBackend) if self.limiter.allows() => self.report_lost(&error),
            // Any other failure was reported as it cost the session.
            Err(_) | Ok(()) => {}
        }
    }

    fn start_rings(&mut self, order: &StartOrder) -> Result<(), Error> {
        self.has_rings |= self.session.is_some();
        let inflight = self.inflight.take();
        let started = self.with_session(|s| s.start(order.features, &order.rings, inflight.as_ref()));
        self.inflight = inflight;
        started
    }

    pub(super) fn drain(&mut self) -> Result<Vec<QueueState>, Error> {
        if let Phase::Running(order) = &self.phase {
            let indices: Vec<u16> = order.rings.iter().map(|ring| ring.index).collect();
            let unsure = self.unsure_rings(order);
            let memory = Arc::clone(&self.transport.memory);
            let ending = Arc::clone(&self.context.ending);
            let states = self.with_session(|s| {
                let states = s.stop(indices.into_iter())?;
                let completed = |ring: &Ring| {
                    let used = ring.addresses.used_index(&memory);
                    let mut own = states.iter().filter(|state| state.index == ring.index);
                    own.all(|state| used == Some(state.next_avail))
                };
                if !s.may_leave_requests() {
                    // At the VM's end nobody reads the guest's memory any more.
                    s.await_completion(|| is_set(&ending) || unsure.iter().all(completed))?;
                }
                Ok(states)
            })?;
            self.has_rings = false;
            if let Phase::Running(mut order) = std::mem::replace(&mut self.phase, Phase::Idle) {
                for (ring, state) in order.rings.iter_mut().zip(&states) {
                    ring.base = state.next_avail;
                }
                self.phase = Phase::Drained(order);
            }
        }
        match &self.phase {
            Phase::Drained(order) | Phase::Orphaned(order) => Ok(order.rings.iter().map(state_of).collect()),
            Phase::Idle | Phase::Running(_) => Ok(Vec::new()),
        }
    }

    /// The rings of someone else's back end that it may work on after it has said where they stand.
    fn unsure_rings(&self, order: &StartOrder) -> Vec<Ring> {
        let spec = &self.context.spec;
        let kind = DeviceType(spec.device_type);
        let rings = order.rings.iter().filter(|_| !spec.ours);
        rings
            .filter(|ring| kind.has_requests(ring.index, order.features))
            .cloned()
            .collect()
    }

    /// Starts rings that stand still, unless bus mastering is switched off: then they wait for it.
    pub(super) fn resume(&mut self) -> Result<(), Error> {
        if !self.masters_bus() {
            return Ok(());
        }
        let (order, drained) = match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Drained(order) => (order, true),
            Phase::Orphaned(order) => (order, false),
            other => {
                self.phase = other;
                return Ok(());
            }
        };
        let done = self.start_rings(&order);
        self.phase = match &done {
            Ok(()) => self.running_again(order),
            Err(Error::NoBackend) if drained => Phase::Drained(order),
            // It may have served a ring before it failed: the bases hold no longer.
            Err(_) => Phase::Running(order),
        };
        done
    }

    /// Kicks and calls each ring once: the one before may have taken a kick and not acted on it,
    /// or completed a request and not said so.
    fn running_again(&self, order: StartOrder) -> Phase {
        for ring in &order.rings {
            ring.events.kick.signal();
            ring.events.call.signal();
        }
        Phase::Running(order)
    }
}

fn state_of(ring: &Ring) -> QueueState {
    QueueState {
        index: ring.index,
        next_avail: ring.base,
    }
}
