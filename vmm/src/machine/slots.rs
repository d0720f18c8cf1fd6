//! Devices that come and go while the machine runs: what the main thread does about them.
//!
//! ```text
//! empty --Attach--> connecting --back end answered--> on the bus --the guest ejects--> leaving --reset--> empty
//!           ^            | failed
//!           +------------+
//! ```

use super::build::Connector;
use super::events::DeviceWord;
use super::run::Machine;
use crate::control::ControlSocket;
use crate::error::{Error, chain};
use crate::virtio::{Connecting, Device, Seat, Successor};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use vm_spec::control::{DeviceConfig, FromVmm};

/// PCI slots that have no device, or none yet.
pub(super) struct Slots {
    connector: Connector,
    /// The empty ones.
    seats: BTreeMap<u8, Seat>,
    /// Those whose device's back end has not answered, and the request that gave it.
    connecting: BTreeMap<u8, (u64, Connecting)>,
}

impl Slots {
    pub(super) fn new(connector: Connector, seats: BTreeMap<u8, Seat>) -> Self {
        Self {
            connector,
            seats,
            connecting: BTreeMap::new(),
        }
    }
}

impl Machine {
    /// Begins to put a device into an empty slot; request `id` is answered later.
    ///
    /// # Errors
    /// Why it cannot.
    pub(super) fn attach(&mut self, id: u64, config: DeviceConfig, fds: Vec<OwnedFd>) -> Result<(), String> {
        let slot = config.slot;
        let sockets = super::run::of_back_end(fds)?;
        let seat = self.slots.seats.remove(&slot);
        let seat = seat.ok_or_else(|| format!("slot {slot} is not empty, or not kept for such devices"))?;
        let back_end = Successor {
            sockets,
            generation: 0,
        };
        let answered = self.events.say(DeviceWord::Answered(slot));
        let connecting = self.slots.connector.seat(seat, config, back_end, Some(answered));
        match connecting {
            Ok(connecting) => drop(self.slots.connecting.insert(slot, (id, connecting))),
            Err((error, seat)) => {
                self.slots.seats.insert(slot, seat);
                return Err(chain(&error.cause));
            }
        }
        Ok(())
    }

    /// The back end of the device for `slot` has answered, or will not.
    pub(super) fn attached(&mut self, slot: u8, control: &ControlSocket) -> Result<(), Error> {
        let Some((id, connecting)) = self.slots.connecting.remove(&slot) else {
            return Ok(());
        };
        let answer = match connecting.finish() {
            Ok(device) => match self.platform.pci.add(slot, device.function()) {
                Ok(()) => {
                    self.devices.push(device);
                    self.platform.hotplug.insert(slot);
                    super::run::done(self.platform.ports.tell_of_hotplug())
                }
                Err(taken) => FromVmm::Failed(taken.to_string()),
            },
            Err((error, seat)) => {
                self.slots.seats.extend(seat.map(|seat| (slot, seat)));
                FromVmm::Failed(chain(&error.cause))
            }
        };
        Ok(control.send(id, answer)?)
    }

    /// Asks the guest to let go of the device in `slot`.
    ///
    /// # Errors
    /// Why it cannot be asked.
    pub(super) fn detach(&self, slot: u8) -> Result<FromVmm, String> {
        self.device(slot)?;
        if !self.platform.hotplug.has(slot) {
            return Err("the machine was started without slots for devices that come and go".into());
        }
        self.platform.hotplug.ask_back(slot);
        Ok(super::run::done(self.platform.ports.tell_of_hotplug()))
    }

    /// The guest let go of the device in `slot`.
    pub(super) fn ejected(&mut self, slot: u8) {
        let vacated = self.events.say(DeviceWord::Vacated(slot));
        if let Some(device) = self.devices.iter_mut().find(|device| device.slot() == slot) {
            device.eject(vacated);
        }
    }

    /// Nothing of the device in `slot` is in flight any more.
    pub(super) fn vacated(&mut self, slot: u8, control: &ControlSocket) -> Result<(), Error> {
        let Some(at) = self.devices.iter().position(|device| device.slot() == slot) else {
            return Ok(());
        };
        // First: its back end, which sees its connection closed next, is no loss.
        control.send(0, FromVmm::Detached { slot })?;
        let seat = self.devices.swap_remove(at).vacate();
        self.slots.seats.extend(seat.map(|seat| (slot, seat)));
        Ok(())
    }

    pub(super) fn device(&self, slot: u8) -> Result<&Device, String> {
        self.devices
            .iter()
            .find(|device| device.slot() == slot)
            .ok_or_else(|| format!("no device in slot {slot}"))
    }
}
