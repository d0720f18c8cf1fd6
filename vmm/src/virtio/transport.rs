//! What the vCPU threads and the device's thread share of one device. Locks are taken in the
//! order configuration space, registers, MSI-X, doorbells, mailbox, and none is held during a vhost-user exchange.

use super::device_type::DeviceType;
use super::doorbells::DoorbellSet;
use super::layout;
use super::mailbox::{ConfigWrite, Mailbox, StartOrder};
use super::registers::{Effect, Registers};
use crate::frontend::{MemoryTable, Ring, RingEvents, SharedEvent};
use crate::pci::Msix;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(super) struct Transport {
    pub(super) kind: DeviceType,
    pub(super) memory: Arc<MemoryTable>,
    pub(super) events: Vec<RingEvents>,
    /// Queues, from 0, that the back end serves.
    pub(super) served: u16,
    /// Raises the configuration vector.
    pub(super) config_call: Arc<SharedEvent>,
    pub(super) registers: Mutex<Registers>,
    pub(super) msix: Mutex<Msix>,
    pub(super) doorbells: Mutex<DoorbellSet>,
    pub(super) mailbox: Arc<Mailbox>,
    /// Back ends keep the configuration space and what is written there, one that is to come too.
    pub(super) takes_config: bool,
    /// A driver has set DRIVER_OK at least once in this boot.
    pub(super) driven: AtomicBool,
    /// Kicks that were given again since nothing was completed.
    pub(super) rekicks: AtomicU64,
}

impl Transport {
    pub(super) fn bar_read(&self, offset: u64, data: &mut [u8]) {
        if let Some(at) = inside(&layout::COMMON, offset, data.len()) {
            let common = lock(&self.registers).common();
            // `inside` bounds it: the structure has as many bytes as its range.
            data.copy_from_slice(&common[at as usize..at as usize + data.len()]);
        } else if offset == layout::ISR.start && data.len() == 1 {
            data[0] = lock(&self.registers).take_isr();
        } else if let Some(at) = inside(&layout::DEVICE, offset, data.len()) {
            lock(&self.registers).read_config(at, data);
        } else if let Some(at) = inside(&layout::TABLE, offset, data.len()) {
            lock(&self.msix).table_read(at, data);
        } else if let Some(at) = inside(&layout::PBA, offset, data.len()) {
            lock(&self.msix).pba_read(at, data);
        } else {
            data.fill(0);
        }
    }

    pub(super) fn bar_write(&self, offset: u64, data: &[u8]) {
        if let Some(at) = inside(&layout::COMMON, offset, data.len()) {
            self.common_write(at, data);
        } else if let Some(at) = inside(&layout::DEVICE, offset, data.len()) {
            self.config_write(at, data);
        } else if let Some(at) = inside(&layout::TABLE, offset, data.len()) {
            lock(&self.msix).table_write(at, data);
        } else if let Some(at) = inside(&layout::NOTIFY, offset, data.len())
            && at % layout::NOTIFY_MULTIPLIER == 0
        {
            let bell = at / layout::NOTIFY_MULTIPLIER;
            // Not from here: a back end may hold up whoever signals.
            if let Some(queue) = lock(&self.doorbells).queue(bell) {
                self.mailbox.ring(queue);
            }
        }
    }

    /// The driver reads what it has written at once, and goes by it; what the back end makes of it
    /// follows.
    fn config_write(&self, offset: u64, data: &[u8]) {
        let mut registers = lock(&self.registers);
        if !registers.accepts_config_write(offset, data.len()) {
            return;
        }
        let write = ConfigWrite {
            offset: offset as u32,
            data: data.to_vec(),
        };
        if self.kind.ignores(&write) {
            return;
        }
        self.mailbox.write_config(write);
        if self.takes_config {
            self.mailbox.foresee(self.kind, &mut registers.config);
        }
    }

    fn common_write(&self, offset: u64, data: &[u8]) {
        let mut registers = lock(&self.registers);
        match registers.write_common(offset, data, &self.memory) {
            Effect::None => {}
            Effect::ConfigVector(vector) => {
                let old = registers.config_vector;
                registers.config_vector = lock(&self.msix).assign(&self.config_call, old, vector);
            }
            Effect::QueueVector { queue, vector } => {
                let register = &mut registers.queues[usize::from(queue)].vector;
                let call = &self.events[usize::from(queue)].call;
                *register = lock(&self.msix).assign(call, *register, vector);
            }
            Effect::Enabled(queue) => lock(&self.doorbells).enable(queue),
            Effect::Start => {
                self.driven.store(true, Ordering::Relaxed);
                self.mailbox.start(StartOrder {
                    features: registers.driver_features(),
                    rings: self.rings(&registers),
                });
            }
            Effect::Cleared => self.release(),
            Effect::Drain => {
                lock(&self.doorbells).disable_all();
                self.mailbox.reset();
            }
        }
    }

    /// The driver has switched bus mastering on or off: the device's messages are such accesses
    /// too (PCI Express 4.0, 7.5.1.1.3).
    pub(super) fn set_bus_master(&self, on: bool) {
        lock(&self.msix).set_bus_master(on);
        self.mailbox.set_bus_master(on);
    }

    fn rings(&self, registers: &Registers) -> Vec<Ring> {
        let queues = registers.queues.iter().zip(&self.events).zip(0..self.served);
        queues
            .filter_map(|((queue, events), index)| {
                Some(Ring {
                    index,
                    addresses: queue.enabled?,
                    base: 0,
                    events: events.clone(),
                })
            })
            .collect()
    }

    /// The rings have stopped: the reset is done, and the status reads 0.
    pub(super) fn complete_reset(&self) {
        // Registers last: who reads status 0 finds the rest done.
        self.release();
        lock(&self.registers).clear();
    }

    /// Takes every eventfd off its vector and its doorbell, and forgets what they counted.
    fn release(&self) {
        lock(&self.msix).release();
        lock(&self.doorbells).disable_all();
        self.config_call.take();
        for events in &self.events {
            events.call.take();
            events.kick.take();
        }
    }

    /// The device is gone: no vector and no doorbell is its any more.
    pub(super) fn retire(&self) {
        lock(&self.msix).retire();
        lock(&self.doorbells).retire();
    }

    /// See [`Registers::offer_next`].
    pub(super) fn offer_next(&self, features: u64) {
        lock(&self.registers).offer_next(features);
    }

    /// Sets NEEDS_RESET and tells the driver.
    pub(super) fn needs_reset(&self) {
        let tell = lock(&self.registers).set_needs_reset();
        self.tell(tell);
    }

    /// Takes over what the back end's configuration is now, with what the driver has written since. True:
    /// the driver reads otherwise than before.
    pub(super) fn set_config(&self, config: &[u8]) -> bool {
        let mut registers = lock(&self.registers);
        let mut config = config.to_vec();
        if self.takes_config {
            self.mailbox.foresee(self.kind, &mut config);
        }
        registers.set_config(config)
    }

    /// Tells the driver that the configuration has changed.
    pub(super) fn config_changed(&self) {
        let tell = lock(&self.registers).note_config_change();
        self.tell(tell);
    }

    fn tell(&self, tell: bool) {
        if tell {
            self.config_call.signal();
        }
    }
}

/// The offset of an access that lies wholly in `range`, from its start.
fn inside(range: &Range<u64>, offset: u64, length: usize) -> Option<u64> {
    let end = offset.checked_add(u64::try_from(length).ok()?)?;
    (range.start <= offset && end <= range.end).then(|| offset - range.start)
}

/// Locks; what a panicking thread left behind is as good as any guest's nonsense.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
