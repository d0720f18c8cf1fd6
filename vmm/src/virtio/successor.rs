//! A back end takes over from another (live, after a drain) or from one that died, and the guest
//! sees nothing of it.

use super::device_type::DeviceType;
use super::mailbox::{StartOrder, Successor};
use super::offer;
use super::pulse::Pulse;
use super::worker::{Phase, Worker};
use crate::frontend::{BackendSockets, Error, MemoryTable, Session, SessionOptions};
use std::sync::Arc;
use virtio_bindings::virtio_config::VIRTIO_F_IN_ORDER;

impl Worker {
    /// See [`super::Device::replace`]. A live back end is drained first and kept until the
    /// successor has been found to fit; if it does not, the old one goes on.
    pub(super) fn replace(&mut self, successor: Successor) -> Result<(), Error> {
        if self.session.is_some() {
            // One that does not drain is lost, and has been reported as that.
            let _ = self.drain();
        }
        if self.context.options.ours {
            // Its process was reaped before it was given a successor.
            self.predecessor_ended();
        }
        if self.over {
            return Err(Error::NoBackend);
        }
        let (session, config) = match self.prepare(successor.sockets) {
            Ok(ready) => ready,
            Err(error) => {
                if self.session.is_some() {
                    self.resume()?;
                }
                return Err(error);
            }
        };
        // Whoever serves one front end at a time and answers has let go of the one before.
        self.predecessor_ended();
        self.session = Some(session);
        self.pulse = Pulse::new();
        self.generation = successor.generation;
        self.resume()?;
        if let Some(session) = &mut self.session {
            session.set_cancel(Arc::clone(&self.context.options.cancel));
            // It may lack what this driver does not use, but another one would.
            self.offer.features = offer::narrow(&self.offer, session.features(), &self.context.spec);
            self.transport.offer_next(self.offer.features);
        }
        self.written.settle(&config);
        if self.transport.set_config(&config) {
            self.transport.config_changed();
        }
        self.offer.config = config;
        Ok(())
    }

    /// Negotiates with a successor and finds out where it is to go on. Returns it and its
    /// configuration space.
    fn prepare(&mut self, sockets: BackendSockets) -> Result<(Session, Vec<u8>), Error> {
        let mut options = SessionOptions {
            cancel: Arc::clone(&self.context.ending),
            ..self.context.options.clone()
        };
        if self.session.is_none() {
            // It first waits for what its predecessor had begun on the disk, which may be a slow one.
            options.deadlines.first_answer = options.deadlines.drain;
        }
        if let Some(held) = &self.held {
            // A connection alone says nothing of who had the rings: one to a server that does not
            // answer must not make the reset longer.
            options.deadlines.first_answer = options.deadlines.first_answer.min(held.left());
        }
        let mut session = Session::connect(sockets, options)?;
        if self.context.options.ours && matches!(self.phase, Phase::Idle) {
            // The last driver's reset may have found nobody who could be told of it.
            session.reset(0..self.offer.served)?;
        }
        let config = self.check(&mut session)?;
        // What a drained one had taken and did not complete went with it, unless there is a record.
        let is_lost = self.inflight.is_none() && self.may_have_requests_in_flight()?;
        match &self.phase {
            Phase::Idle => self.inflight = session.get_inflight(self.offer.served, self.offer.queue_size)?,
            Phase::Drained(_) if !is_lost => {
                // A record of nothing may begin, or end, here: `check` has seen that one of something goes on.
                if !session.has_inflight() {
                    self.inflight = None;
                } else if self.inflight.is_none() {
                    self.inflight = session.get_inflight(self.offer.served, self.offer.queue_size)?;
                }
            }
            Phase::Running(order) | Phase::Orphaned(order) | Phase::Drained(order) => {
                match self.after_a_crash(order)? {
                    Some(order) => self.phase = Phase::Orphaned(order),
                    None => self.strand(&mut session)?,
                }
            }
        }
        Ok((session, config))
    }

    /// The guest was promised features, queues and a configuration space: the successor must keep
    /// all of them, and what the driver has configured. Returns the configuration as it is now.
    fn check(&mut self, session: &mut Session) -> Result<Vec<u8>, Error> {
        let spec = &self.context.spec;
        let kind = DeviceType(spec.device_type);
        let promised = match &self.phase {
            Phase::Idle => self.offer.features,
            Phase::Running(order) | Phase::Drained(order) | Phase::Orphaned(order) => order.features,
        };
        if promised & !spec.config_features & !session.features() != 0 {
            return Err(Error::Successor("it lacks features that the guest uses"));
        }
        if kind != DeviceType::NET
            && session
                .queue_limit()
                .is_some_and(|limit| limit < self.offer.served.into())
        {
            return Err(Error::Successor("it serves fewer queues"));
        }
        if self.inflight.is_some() && !session.has_inflight() && self.may_have_requests_in_flight()? {
            return Err(Error::Successor("it cannot take over requests in flight"));
        }
        let told = match session.has_config() {
            true => self.written.replay(session),
            false => Ok(()),
        };
        let base = told
            .and_then(|()| offer::read_config(session, spec))
            .inspect_err(|error| {
                // Two may have died of the same: the third is not told.
                if error.loss().is_some() {
                    self.written.forget_untaken();
                }
            })?;
        match base {
            Some(base) => Ok(offer::refresh(&self.offer, base, spec)),
            None if self.offer.own_config => Err(Error::Successor("it has no configuration space")),
            None => Ok(self.offer.config.clone()),
        }
    }

    /// Whether the in-flight region may name requests. A ring that was drained has some where it took more than it
    /// completed.
    fn may_have_requests_in_flight(&self) -> Result<bool, Error> {
        let Phase::Drained(order) = &self.phase else {
            return Ok(true);
        };
        let completed = at_used_index(order, &self.transport.memory)?;
        let mut rings = order.rings.iter().zip(&completed.rings);
        Ok(rings.any(|(taken, completed)| taken.base != completed.base))
    }

    /// Where the rings go on when nobody could be asked. With an in-flight region its record of
    /// each request counts, and the base only has to be where completions stand. Without one the
    /// same index is right only if requests complete in the order in which they were made
    /// available: then all before it are done and none after it. `None`: nobody can tell.
    fn after_a_crash(&self, order: &StartOrder) -> Result<Option<StartOrder>, Error> {
        let spec = &self.context.spec;
        let in_order = order.features >> VIRTIO_F_IN_ORDER & 1 != 0
            || DeviceType(spec.device_type) == DeviceType::NET
            || spec.in_order;
        if self.inflight.is_none() && !in_order {
            return Ok(None);
        }
        at_used_index(order, &self.transport.memory).map(Some)
    }

    /// The requests that were in flight can be neither completed nor repeated: the driver is told, and
    /// once it has reset the device this back end serves it.
    fn strand(&mut self, session: &mut Session) -> Result<(), Error> {
        self.inflight = session.get_inflight(self.offer.served, self.offer.queue_size)?;
        self.phase = Phase::Idle;
        self.needs_reset(
            "its back end was lost and kept no record of requests in flight, which it may have completed \
             out of order"
                .to_owned(),
        );
        Ok(())
    }
}

fn at_used_index(order: &StartOrder, memory: &MemoryTable) -> Result<StartOrder, Error> {
    let mut rings = order.rings.clone();
    for ring in &mut rings {
        ring.base = ring
            .addresses
            .used_index(memory)
            .ok_or(Error::Successor("guest memory cannot be read"))?;
    }
    Ok(StartOrder {
        features: order.features,
        rings,
    })
}
