//! The handle of one device: connect, what the control thread may ask of it, and its end.

use super::device_type::DeviceType;
use super::doorbells::DoorbellSet;
use super::function::VirtioFunction;
use super::layout;
use super::mailbox::{Answer, Command, Done, Mailbox, Successor};
use super::registers::Registers;
use super::seat::{Order, Seat};
use super::transport::{Transport, lock};
use super::worker::{self, Negotiated};
use crate::frontend::{
    BackendSockets, Deadlines, Error, MemoryTable, QueueState, SessionOptions, SharedEvent, new_event,
};
use crate::pci::{Function, Msix};
use crate::platform::{Doorbells, Interrupts};
use nix::sys::eventfd::EventFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm_spec::control::{DeviceConfig, Loss};
use vm_spec::machine::{MMIO32_START, VIRTIO_BAR_SIZE};

/// A device failed, and which.
#[derive(Debug, thiserror::Error)]
#[error("device '{device}' failed")]
pub struct DeviceError {
    /// Its id.
    pub device: String,
    /// Why.
    #[source]
    pub cause: Error,
}

/// Something happened to a device while the machine runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DeviceEvent {
    /// The back end is gone or no longer to be trusted. Its rings have stopped; the guest has not
    /// been told, so that [`Device::replace`] can go on as if nothing was.
    BackendLost {
        /// The device's id.
        device: String,
        /// Which of its back ends.
        generation: u32,
        /// In which way.
        loss: Loss,
        /// Requests that were available and not completed.
        outstanding: u32,
        /// What happened, one line.
        reason: String,
    },
    /// The machine's reset of the device is done.
    WasReset,
    /// The device is lost to the guest until it is reset (NEEDS_RESET is set).
    NeedsReset {
        /// The device's id.
        device: String,
        /// What happened, one line.
        reason: String,
    },
}

/// Where events go. Called on the device's thread; must not block.
pub type EventSink = Arc<dyn Fn(DeviceEvent) + Send + Sync>;

/// Everything a device is made of.
pub struct DeviceParts {
    /// Its description.
    pub config: DeviceConfig,
    /// Its back end's sockets (`config.socket`, `requests` and `requests_peer`).
    pub sockets: BackendSockets,
    /// Which back end of the device that is: 0 unless one was lost before.
    pub generation: u32,
    /// Guest RAM.
    pub memory: Arc<MemoryTable>,
    /// Interrupts.
    pub interrupts: Arc<dyn Interrupts>,
    /// Doorbells.
    pub doorbells: Arc<dyn Doorbells>,
    /// Where events go.
    pub events: EventSink,
    /// How long to wait for the back end.
    pub deadlines: Deadlines,
    /// Called once [`Connecting::finish`] does not wait any more.
    pub answered: Option<Word>,
}

/// What a device's thread says, once; must not block.
pub type Word = Box<dyn FnOnce() + Send>;

/// A device whose thread is negotiating.
pub struct Connecting {
    parts: Started,
    negotiated: Receiver<Result<Negotiated, Error>>,
    transport: SyncSender<Arc<Transport>>,
    thread: ThreadHandle,
}

struct Started {
    config: DeviceConfig,
    memory: Arc<MemoryTable>,
    interrupts: Arc<dyn Interrupts>,
    doorbells: Arc<dyn Doorbells>,
    deadlines: Deadlines,
}

/// A running device.
pub struct Device {
    id: String,
    slot: u8,
    function: Arc<VirtioFunction>,
    worker: Arc<WorkerHandle>,
    /// The guest has let go of it.
    leaving: bool,
    thread: ThreadHandle,
}

/// Ends the device's thread's work, whatever it waits for, when dropped, and the thread with it.
struct ThreadHandle {
    cancel: Arc<EventFd>,
    /// Cancels only the taking over by successors.
    ending: Arc<EventFd>,
    mailbox: Arc<Mailbox>,
    seat: Option<Seat>,
}

impl ThreadHandle {
    /// The thread, of a device that has ended.
    fn into_seat(mut self) -> Option<Seat> {
        self.seat.take()
    }
}

impl Drop for ThreadHandle {
    fn drop(&mut self) {
        let _ = self.cancel.write(1);
        self.mailbox.quit();
        self.seat = None;
    }
}

impl Seat {
    /// Has its thread negotiate, while the caller builds the machine.
    ///
    /// # Errors
    /// When an eventfd cannot be made. The thread comes back, for another device.
    pub fn connect(self, parts: DeviceParts) -> Result<Connecting, (DeviceError, Self)> {
        let events = || Ok([new_event()?, new_event()?, new_event()?]);
        match events() {
            Ok(events) => Ok(self.start(parts, events)),
            Err(cause) => {
                let device = parts.config.id;
                Err((DeviceError { device, cause }, self))
            }
        }
    }

    fn start(self, parts: DeviceParts, [cancel, ending, wake]: [Arc<EventFd>; 3]) -> Connecting {
        let mailbox = Arc::new(Mailbox::new(wake));
        let (give, negotiated) = sync_channel(1);
        let (transport, take) = sync_channel(1);
        let context = worker::Context {
            spec: parts.config.clone(),
            options: SessionOptions {
                memory: Arc::clone(&parts.memory),
                deadlines: parts.deadlines,
                cancel: Arc::clone(&cancel),
                ours: parts.config.ours,
            },
            ending: Arc::clone(&ending),
            events: parts.events,
            mailbox: Arc::clone(&mailbox),
            generation: parts.generation,
        };
        self.give(Order {
            context,
            sockets: parts.sockets,
            give,
            take,
            answered: parts.answered,
        });
        Connecting {
            parts: Started {
                config: parts.config,
                memory: parts.memory,
                interrupts: parts.interrupts,
                doorbells: parts.doorbells,
                deadlines: parts.deadlines,
            },
            negotiated,
            transport,
            thread: ThreadHandle {
                cancel,
                ending,
                mailbox,
                seat: Some(self),
            },
        }
    }
}

impl Device {
    /// The PCI function, for [`crate::pci::PciBus::add`] at [`Device::slot`].
    #[must_use]
    pub fn function(&self) -> Arc<dyn Function> {
        Arc::clone(&self.function) as Arc<dyn Function>
    }

    /// PCI device number.
    #[must_use]
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether a driver has started the device in this boot.
    #[must_use]
    pub fn driven(&self) -> bool {
        self.worker.transport.driven.load(Ordering::Relaxed)
    }

    /// How often a queue was kicked again, as its requests waited for a second or longer and none was completed.
    #[must_use]
    pub fn rekicks(&self) -> u64 {
        self.worker.transport.rekicks.load(Ordering::Relaxed)
    }

    /// Stops the rings, waits until what was taken is completed, and says where they stand. Never
    /// call it from a vCPU thread.
    ///
    /// # Errors
    /// When the back end does not drain in time, or is lost.
    pub fn drain(&self) -> Result<Vec<QueueState>, DeviceError> {
        self.ask(Command::Drain)
    }

    /// Starts rings that [`Device::drain`] stopped.
    ///
    /// # Errors
    /// When the back end fails.
    pub fn resume(&self) -> Result<(), DeviceError> {
        self.ask(Command::Resume)
    }

    /// Goes on with another back end: negotiation, memory, rings and the in-flight region are
    /// replayed, and the guest notices nothing. The old back end is drained first if it still
    /// answers. The caller has made sure that a dead one of ours no longer writes.
    ///
    /// Nobody waits: `done` is told on the device's thread. When the new back end fails or does
    /// not fit, a live old one goes on, and another one may be tried.
    pub fn replace(&self, successor: Successor, done: Done) {
        // A command that finds no room is dropped with its sockets, and `done` unheard: whoever
        // asked for so many changes at once has a deadline.
        self.worker
            .transport
            .mailbox
            .command(Command::Replace(successor, done));
    }

    /// Drains the device and lets go of its back end, for [`Device::replace`]. `done` is told on the
    /// device's thread.
    pub fn release(&self, done: Done) {
        self.worker.transport.mailbox.command(Command::Release(done));
    }

    /// No back end will come any more: tells the guest (NEEDS_RESET).
    pub fn give_up(&self, reason: &str) {
        self.worker
            .transport
            .mailbox
            .command(Command::GiveUp(reason.to_owned()));
    }

    /// Whether the machine's reset of the device is under way, or its end: a back end may write to the guest's
    /// memory.
    #[must_use]
    pub fn is_resetting(&self) -> bool {
        self.leaving || self.worker.is_resetting()
    }

    /// The guest has let go of the device, which is on no bus any more: resets it. Nobody waits: `done` is told on
    /// the device's thread. Then [`Device::vacate`] it.
    pub fn eject(&mut self, done: Word) {
        self.leaving = true;
        self.worker.transport.mailbox.eject(done);
    }

    /// Lets go of its back end; its thread, for another device.
    pub fn vacate(self) -> Option<Seat> {
        self.worker.transport.retire();
        self.thread.into_seat()
    }

    /// The longest that it may take.
    #[must_use]
    pub fn reset_deadline(&self) -> Duration {
        self.worker.patience
    }

    /// The VM ends: no successor is waited for any more, not even one that takes over now.
    pub fn refuse_successors(&self) {
        let _ = self.thread.ending.write(1);
    }

    fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<T, DeviceError> {
        self.worker.ask(command).map_err(|cause| DeviceError {
            device: self.id.clone(),
            cause,
        })
    }
}

impl Connecting {
    /// The device's description.
    #[must_use]
    pub fn config(&self) -> &DeviceConfig {
        &self.parts.config
    }

    /// Waits for the negotiation (bounded by the deadlines) and builds the PCI function.
    ///
    /// # Errors
    /// Any failure of the back end; no GSI left. The thread comes back, for another back end.
    pub fn finish(self) -> Result<Device, (DeviceError, Option<Seat>)> {
        match self.build() {
            Ok((function, worker)) => Ok(Device {
                id: self.parts.config.id,
                slot: self.parts.config.slot,
                function,
                worker,
                leaving: false,
                thread: self.thread,
            }),
            Err(cause) => {
                let device = self.parts.config.id;
                Err((DeviceError { device, cause }, self.thread.into_seat()))
            }
        }
    }

    fn build(&self) -> Result<(Arc<VirtioFunction>, Arc<WorkerHandle>), Error> {
        // A disk has the time of a drain for its first answer.
        let patience = self.parts.deadlines.first_answer + 2 * self.parts.deadlines.drain;
        let Negotiated { offer, events } = self
            .negotiated
            .recv_timeout(patience)
            .map_err(|_| Error::Thread(patience))??;
        let config = &self.parts.config;
        let vectors = offer.queues + 1;
        let msix =
            Msix::new(Arc::clone(&self.parts.interrupts), vectors).map_err(|source| Error::Resource {
                what: "interrupts for a device",
                source,
            })?;
        let kind = DeviceType(config.device_type);
        let bar = MMIO32_START + u64::from(config.slot) * VIRTIO_BAR_SIZE;
        let space = layout::config_space(kind, bar, vectors, offer.config.len());
        let transport = Arc::new(Transport {
            kind,
            memory: Arc::clone(&self.parts.memory),
            doorbells: Mutex::new(DoorbellSet::new(Arc::clone(&self.parts.doorbells), &events)),
            events,
            served: offer.served,
            config_call: Arc::new(SharedEvent::new()?),
            registers: Mutex::new(Registers::new(
                offer.features,
                offer.config,
                offer.queues,
                offer.queue_size,
            )),
            msix: Mutex::new(msix),
            mailbox: Arc::clone(&self.thread.mailbox),
            takes_config: offer.own_config && kind.keeps_writes(),
            driven: AtomicBool::new(false),
            rekicks: AtomicU64::new(0),
        });
        // The thread waits for it, or has failed to confine itself: then it has hung up.
        let ended = |_| Error::Thread(Duration::ZERO);
        self.transport.send(Arc::clone(&transport)).map_err(ended)?;
        let worker = Arc::new(WorkerHandle {
            transport: Arc::clone(&transport),
            // Draining and the steps around it are each bounded by one drain deadline; then a lost
            // back end's process may have to end.
            patience: 3 * self.parts.deadlines.drain
                + 2 * self.parts.deadlines.step
                + self.parts.deadlines.end,
            resetting: Mutex::new(None),
        });
        let function = VirtioFunction::new(transport, Arc::clone(&worker), space);
        Ok((Arc::new(function), worker))
    }
}

/// Asks the device's thread and waits, with a deadline, for its answer.
pub(super) struct WorkerHandle {
    pub(super) transport: Arc<Transport>,
    patience: Duration,
    resetting: Mutex<Option<Receiver<Result<(), Error>>>>,
}

impl WorkerHandle {
    fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<T, Error> {
        let answer = self.post(command)?;
        answer
            .recv_timeout(self.patience)
            .map_err(|_| Error::Thread(self.patience))?
    }

    fn post<T>(
        &self,
        command: impl FnOnce(Answer<T>) -> Command,
    ) -> Result<Receiver<Result<T, Error>>, Error> {
        let (give, take) = sync_channel(1);
        match self.transport.mailbox.command(command(give)) {
            true => Ok(take),
            false => Err(Error::Thread(Duration::ZERO)),
        }
    }

    pub(super) fn begin_reset(&self) {
        *lock(&self.resetting) = self.post(Command::Reset).ok();
    }

    fn is_resetting(&self) -> bool {
        lock(&self.resetting).is_some() && lock(&self.transport.registers).is_resetting()
    }

    /// Waits for [`WorkerHandle::begin_reset`]. A thread that is too late (its back end answers
    /// each message at the last moment) completes the reset when it is done.
    pub(super) fn finish_reset(&self) {
        let answer = lock(&self.resetting).take();
        if let Some(Err(error)) = answer.map(|answer| answer.recv_timeout(self.patience)) {
            tracing::error!(%error, "a device was not reset in time");
        }
    }
}
