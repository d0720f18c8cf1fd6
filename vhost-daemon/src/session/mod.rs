//! One vhost-user session: what the front end has set up so far.
//!
//! The `vhost` crate reads the messages and checks their form; [`handler`] checks their meaning
//! and acts; [`direct`] handles the few that the crate cannot.

mod direct;
mod handler;
mod serve;
#[cfg(test)]
mod tests;
mod vring;

pub use serve::ServeError;
#[cfg(feature = "fuzzing")]
pub(crate) use serve::messages;
pub(crate) use serve::{End, serve, wait};

use crate::Device;
use crate::memory::{GuestMemory, MemoryError, Sealing};
use crate::ring::{InflightRegion, RingFault};
use crate::worker::{RingStart, Watch, Worker, WorkerError};
use jailer::sandbox::{EXIT_HUNG, end};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vring::Vring;

/// Feature bits that every device here offers.
const RING_FEATURES: u64 =
    (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << VIRTIO_RING_F_INDIRECT_DESC);

/// Why the front end was refused, or what failed in serving it.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A memory table that cannot be used.
    #[error("the front end's memory table was refused")]
    Memory(#[from] MemoryError),
    /// A queue's thread failed.
    #[error("a queue failed")]
    Worker(#[from] WorkerError),
    /// The message names a queue that does not exist.
    #[error("queue {0} does not exist")]
    Queue(u32),
    /// A value outside what the specification or this device allows.
    #[error("{what} {value:#x} is not allowed")]
    Value {
        /// The field.
        what: &'static str,
        /// What the front end sent.
        value: u64,
    },
    /// The message came too early, too late, or without what it needs.
    #[error("{0}")]
    Order(&'static str),
    /// The in-flight region could not be used.
    #[error("the in-flight region was refused")]
    Inflight(#[source] std::io::Error),
    /// The image or the like could not be made durable at the end.
    #[error("cannot flush the device")]
    Flush(#[source] std::io::Error),
}

impl From<RingFault> for SessionError {
    fn from(_: RingFault) -> Self {
        Self::Order("the ring's parts are not in guest memory")
    }
}

/// All state between messages. Lives as long as the process; a new front end finds it reset.
pub(crate) struct Session {
    device: Box<dyn Device>,
    workers: Vec<Worker>,
    /// The device's own threads, by name.
    own_threads: Vec<(&'static str, Watch)>,
    vrings: Vec<Vring>,
    sealing: Sealing,
    memory: Arc<GuestMemory>,
    features: u64,
    protocol_features: u64,
    /// The region made before lockdown, and its memfd for handing out.
    own_inflight: Option<(InflightRegion, OwnedFd)>,
    /// The region in use.
    inflight: Option<InflightRegion>,
    /// Where the front end takes requests of ours (SET_BACKEND_REQ_FD).
    backend_channel: Option<UnixStream>,
    /// The device status (virtio 1.3, 2.1) as the front end says it (SET_STATUS).
    status: u64,
}

impl Session {
    /// A session for `device` whose queues' threads are `workers`.
    pub(crate) fn new(
        device: Box<dyn Device>,
        workers: Vec<Worker>,
        sealing: Sealing,
        own_inflight: Option<(InflightRegion, OwnedFd)>,
    ) -> Self {
        let vrings = workers.iter().map(|_| Vring::default()).collect();
        Self {
            device,
            workers,
            own_threads: Vec::new(),
            vrings,
            sealing,
            memory: Arc::default(),
            features: 0,
            protocol_features: 0,
            own_inflight,
            inflight: None,
            backend_channel: None,
            status: 0,
        }
    }

    /// Has the device's own threads watched for those that spin.
    pub(crate) fn watch(&mut self, own_threads: Vec<(&'static str, Watch)>) {
        self.own_threads = own_threads;
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | RING_FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn offered_protocol_features(&self) -> VhostUserProtocolFeatures {
        use VhostUserProtocolFeatures as F;
        let mut features = F::MQ
            | F::REPLY_ACK
            | F::CONFIG
            | F::BACKEND_REQ
            | F::CONFIGURE_MEM_SLOTS
            | F::RESET_DEVICE
            | F::STATUS;
        let recorded = F::INFLIGHT_SHMFD | F::GET_VRING_BASE_INFLIGHT;
        features.set(recorded, self.own_inflight.is_some());
        features
    }

    /// What the device waits for by itself.
    fn config_sources(&self) -> std::io::Result<Vec<OwnedFd>> {
        let sources = [self.device.config_source(), self.device.errand_source()];
        let sources = sources.into_iter().flatten();
        sources.map(|fd| fd.try_clone_to_owned()).collect()
    }

    fn negotiated(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    fn protocol_negotiated(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features & feature.bits() != 0
    }

    /// The queue of a message.
    fn queue(&mut self, index: u32) -> Result<(&Worker, &mut Vring), SessionError> {
        let place = index as usize;
        match (self.workers.get(place), self.vrings.get_mut(place)) {
            (Some(worker), Some(vring)) => Ok((worker, vring)),
            _ => Err(SessionError::Queue(index)),
        }
    }

    /// Starts a ring (vhost-user, "Ring states": by its kick fd).
    fn start_ring(&mut self, index: u32, kick: OwnedFd) -> Result<(), SessionError> {
        if !self.negotiated(VIRTIO_F_VERSION_1) {
            return Err(SessionError::Order(
                "the driver did not accept VIRTIO_F_VERSION_1",
            ));
        }
        let features = self.features;
        let memory = Arc::clone(&self.memory);
        let region = self.inflight.clone();
        let (worker, vring) = self.queue(index)?;
        let setup = vring.setup(&memory, features)?;
        let inflight = match region {
            Some(region) => {
                let part = region.queue(index as u16, setup.size);
                Some(part.ok_or(SessionError::Order(
                    "the in-flight region is too small for the ring",
                ))?)
            }
            None => None,
        };
        let has_enable = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        worker.set_enabled(vring.enabled || !has_enable)?;
        worker.start(RingStart {
            memory,
            setup,
            inflight,
            kick,
            features,
        })?;
        vring.running = true;
        Ok(())
    }

    /// A thread that spins can only be ended with its process; a successor goes on with what it
    /// held.
    fn end_if_a_thread_spins(&mut self) {
        for (name, watch) in &mut self.own_threads {
            if watch.spins() {
                tracing::error!(thread = name, "the device's thread spins: the process ends");
                end(EXIT_HUNG);
            }
        }
        for (index, worker) in self.workers.iter().enumerate() {
            if worker.spins() {
                tracing::error!(queue = index, "the queue's thread spins: the process ends");
                end(EXIT_HUNG);
            }
        }
    }

    /// Drains and stops all rings.
    fn stop_rings(&mut self) -> Result<(), SessionError> {
        for (worker, vring) in self.workers.iter().zip(&mut self.vrings) {
            if let Some(state) = worker.stop()? {
                vring.base = state.base;
            }
            vring.running = false;
        }
        Ok(())
    }

    /// Another memory table, at once for all rings; each finishes its I/O in the old one first. One that is not in
    /// the new table waits for one that has it: a region is replaced by REM_MEM_REG and ADD_MEM_REG.
    fn replace_memory(&mut self, memory: GuestMemory) -> Result<(), SessionError> {
        self.memory = Arc::new(memory);
        for (worker, vring) in self.workers.iter().zip(&self.vrings) {
            if vring.running {
                worker.set_memory(Arc::clone(&self.memory))?;
            }
        }
        Ok(())
    }

    /// RESET_DEVICE: nothing is in flight any more.
    fn reset_device(&mut self) -> Result<(), SessionError> {
        self.reset()?;
        if let Some(region) = &self.inflight {
            region.zero();
        }
        Ok(())
    }

    /// A device reset by RESET_DEVICE or a status of 0: rings stopped at index 0 and disabled
    /// (vhost-user, VHOST_USER_RESET_DEVICE).
    fn reset(&mut self) -> Result<(), SessionError> {
        self.stop_rings()?;
        for (worker, vring) in self.workers.iter().zip(&mut self.vrings) {
            vring.base = 0;
            vring.enabled = false;
            worker.set_enabled(false)?;
        }
        self.device.reset();
        self.status = 0;
        Ok(())
    }

    /// The front end is gone: everything it gave us goes too. What was in flight is finished; the
    /// in-flight region, which the front end kept, says so.
    pub(crate) fn end(&mut self) -> Result<(), SessionError> {
        for (worker, vring) in self.workers.iter().zip(&mut self.vrings) {
            worker.leave()?;
            worker.set_call(None)?;
            worker.set_error(None)?;
            *vring = Vring::default();
        }
        self.memory = Arc::default();
        self.inflight = None;
        self.backend_channel = None;
        (self.features, self.protocol_features, self.status) = (0, 0, 0);
        self.device.reset();
        self.device.flush().map_err(SessionError::Flush)
    }
}
