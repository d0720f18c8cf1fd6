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

/// What is to be said of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DeviceWord {
    /// Something happened.
    Event(DeviceEvent),
    /// The guest let go of the device in this slot.
    Ejected(u8),
    /// The back end of the device that is put into this slot has answered, or will not.
    Answered(u8),
    /// Nothing of the device that was in this slot is in flight any more.
    Vacated(u8),
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

    /// From a vCPU thread: the guest let go of the device in `slot`, once for each that was there.
    pub fn tell_ejected(&self, slot: u8) {
        self.push(DeviceWord::Ejected(slot));
    }

    /// Says so, from a device's thread, when it is called.
    pub fn say(self: &Arc<Self>, word: DeviceWord) -> Box<dyn FnOnce() + Send> {
        let events = Arc::clone(self);
        Box::new(move || events.push(word))
    }

    fn push(&self, word: DeviceWord) {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        // Of the others there are no more than slots and requests.
        if devices.len() < MAX_DEVICE_EVENTS || !matches!(word, DeviceWord::Event(_)) {
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
