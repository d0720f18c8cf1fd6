//! What vCPU threads and the control thread leave for the device's thread. Bounded: a guest's
//! orders are flags or a short list, and control commands are few.

use super::device::Word;
use super::device_type::DeviceType;
use crate::frontend::{BackendSockets, Error, QueueState, Ring};
use nix::sys::eventfd::EventFd;
use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};

/// Most configuration writes kept: a guest that writes faster than its back end takes loses the
/// rest, as if the device had ignored them.
pub(super) const MAX_CONFIG_WRITES: usize = 64;
/// Most control commands kept.
const MAX_COMMANDS: usize = 16;

/// Where an answer goes.
pub(super) type Answer<T> = SyncSender<Result<T, Error>>;

/// From the control thread.
pub(super) enum Command {
    /// Stop the rings and say where they stand.
    Drain(Answer<Vec<QueueState>>),
    /// Start drained rings again.
    Resume(Answer<()>),
    /// Go on with another back end.
    Replace(Successor, Done),
    /// Drain, and let go of the back end.
    Release(Done),
    /// Machine reset: as a driver's reset, whatever the driver did.
    Reset(Answer<()>),
    /// The device is lost for good.
    GiveUp(String),
}

/// Called on the device's thread with what became of a request; must not block.
pub type Done = Box<dyn FnOnce(Result<(), Error>) + Send>;

/// A back end that is to take over.
pub struct Successor {
    /// Its sockets.
    pub sockets: BackendSockets,
    /// Which back end of the device it is (`ToVmm::ReplaceBackend`).
    pub generation: u32,
}

/// DRIVER_OK.
pub(super) struct StartOrder {
    pub(super) features: u64,
    pub(super) rings: Vec<Ring>,
}

/// A driver's write to the device-specific configuration.
pub(super) struct ConfigWrite {
    pub(super) offset: u32,
    pub(super) data: Vec<u8>,
}

impl ConfigWrite {
    /// What it writes to.
    pub(super) fn range(&self) -> Range<usize> {
        let start = self.offset as usize;
        start..start + self.data.len()
    }

    /// Writes to a copy of the configuration; what lies outside it is ignored.
    pub(super) fn apply(&self, config: &mut [u8]) {
        if let Some(bytes) = config.get_mut(self.range()) {
            bytes.copy_from_slice(&self.data);
        }
    }
}

/// Everything that was left since the last look.
#[derive(Default)]
pub(super) struct Mail {
    /// The thread ends.
    pub(super) quit: bool,
    /// Bus mastering was switched off.
    pub(super) master_off: bool,
    /// It was switched on, and is.
    pub(super) master_on: bool,
    pub(super) reset: bool,
    pub(super) start: Option<StartOrder>,
    pub(super) config_writes: Vec<ConfigWrite>,
    /// Queues whose doorbells rang, and KVM did not hear it.
    pub(super) bells: BTreeSet<u16>,
    /// The guest has let go of the device; who is told of its end.
    pub(super) eject: Option<Word>,
    pub(super) commands: VecDeque<Command>,
}

pub(super) struct Mailbox {
    mail: Mutex<Mail>,
    wake: Arc<EventFd>,
}

impl Mailbox {
    pub(super) fn new(wake: Arc<EventFd>) -> Self {
        Self {
            mail: Mutex::default(),
            wake,
        }
    }

    /// Readable when there is mail.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(super) fn start(&self, order: StartOrder) {
        self.leave(|mail| mail.start = Some(order));
    }

    /// A driver's reset. It cancels a start and writes that have not been seen: none can follow it
    /// before it is done.
    pub(super) fn reset(&self) {
        self.leave(|mail| {
            mail.start = None;
            mail.config_writes.clear();
            mail.bells.clear();
            mail.reset = true;
        });
    }

    /// Bus mastering was switched on or off.
    pub(super) fn set_bus_master(&self, on: bool) {
        self.leave(|mail| {
            mail.master_off |= !on;
            mail.master_on = on;
        });
    }

    pub(super) fn write_config(&self, write: ConfigWrite) {
        self.leave(|mail| {
            if mail.config_writes.len() < MAX_CONFIG_WRITES {
                mail.config_writes.push(write);
            }
        });
    }

    /// The doorbell of `queue` rang.
    pub(super) fn ring(&self, queue: u16) {
        self.leave(|mail| mail.bells.extend([queue]));
    }

    /// Does to `config` what the writes that wait will do.
    pub(super) fn foresee(&self, kind: DeviceType, config: &mut [u8]) {
        let mail = self.mail.lock().unwrap_or_else(PoisonError::into_inner);
        mail.config_writes
            .iter()
            .for_each(|write| kind.foresee(write, config));
    }

    /// False: too many commands wait.
    pub(super) fn command(&self, command: Command) -> bool {
        let mut room = false;
        self.leave(|mail| {
            room = mail.commands.len() < MAX_COMMANDS;
            if room {
                mail.commands.push_back(command);
            }
        });
        room
    }

    /// The guest has let go of the device.
    pub(super) fn eject(&self, done: Word) {
        self.leave(|mail| mail.eject = Some(done));
    }

    pub(super) fn quit(&self) {
        self.leave(|mail| mail.quit = true);
    }

    pub(super) fn take(&self) -> Mail {
        // The count before the mail: what is left in between wakes the thread again.
        let _ = self.wake.read();
        std::mem::take(&mut self.mail.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn leave(&self, change: impl FnOnce(&mut Mail)) {
        change(&mut self.mail.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake();
    }

    /// Makes the thread look once more.
    pub(super) fn wake(&self) {
        // EAGAIN: the count is at its maximum, so the thread has a signal to see anyway.
        let _ = self.wake.write(1);
    }
}
