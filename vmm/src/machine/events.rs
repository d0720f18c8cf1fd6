//! What vCPU and device threads tell the main thread. Bounded, and never blocks the teller.

use crate::frontend::Error;
use crate::virtio::{DeviceEvent, Done};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

/// Most device events that wait; a back end that fails more often than we look loses the rest.
const MAX_DEVICE_EVENTS: usize = 256;

/// How a guest asked for, or ran into, the end of this boot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GuestEvent {
    /// ACPI S5.
    PowerOff,
    /// The status register: the guest's command ended.
    Exit(u8),
    /// Any of the reset registers.
    Reset,
    /// The panic device.
    Panic,
    /// A vCPU shut down.
    TripleFault,
    /// KVM could not go on; why, one line.
    KvmFailure(String),
}

/// What a device's thread has to say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DeviceWord {
    /// Something happened.
    Event(DeviceEvent),
    /// What became of the control request of this number.
    Answer(u64, Result<(), String>),
}

/// The queue and its wake-up.
pub struct Events {
    guest: Mutex<VecDeque<GuestEvent>>,
    devices: Mutex<VecDeque<DeviceWord>>,
    wake: EventFd,
}

impl Events {
    /// An empty queue.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            guest: Mutex::default(),
            devices: Mutex::default(),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        })
    }

    /// Readable while something may wait.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// From a vCPU thread. A vCPU tells at most one event and then waits for orders, so that this
    /// queue is bounded by the number of vCPUs.
    pub fn tell_guest(&self, event: GuestEvent) {
        self.guest
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(event);
        self.signal();
    }

    /// From a device's thread.
    pub fn tell_device(&self, event: DeviceEvent) {
        self.push(DeviceWord::Event(event));
    }

    /// What answers control request `id`, from a device's thread.
    pub fn answer_to(self: &Arc<Self>, id: u64) -> Done {
        let events = Arc::clone(self);
        Box::new(move |result: Result<(), Error>| {
            let result = result.map_err(|error| crate::error::chain(&error));
            events.push(DeviceWord::Answer(id, result));
        })
    }

    fn push(&self, word: DeviceWord) {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if devices.len() < MAX_DEVICE_EVENTS {
            devices.push_back(word);
        }
        drop(devices);
        self.signal();
    }

    /// The next guest event, if any.
    pub fn take_guest(&self) -> Option<GuestEvent> {
        self.guest
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }

    /// The next word of a device, if any; each device's own come in order.
    pub fn take_device(&self) -> Option<DeviceWord> {
        self.devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }

    /// Forgets guest events: they belong to a boot that is over.
    pub fn forget_guest(&self) {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Consumes the wake-up; look at the queues afterwards.
    pub fn acknowledge(&self) {
        // There may have been no signal: then nothing is lost.
        let _ = self.wake.read();
    }

    fn signal(&self) {
        // A full counter means that the main thread has a wake-up waiting already.
        let _ = self.wake.write(1);
    }
}
