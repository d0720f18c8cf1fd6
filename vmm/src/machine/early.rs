//! Control messages while the machine is built: a back end that is lost before the guest runs is
//! replaced, so that no moment of a device process's death ends the VM.

use crate::control::{ControlError, ControlSocket, Incoming};
use crate::error::{Error, chain};
use crate::virtio::{DeviceError, Successor};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use vm_spec::control::{BACKEND_FDS, DeviceConfig, Envelope, FromVmm, Loss, ToVmm};

/// A lost back end has a successor, or is given up, within this time.
pub(super) const DEADLINE: Duration = Duration::from_secs(15);
/// Most messages kept for the running machine; a supervisor that sends more is out of order.
const MOST_KEPT: usize = 64;

type Message = (Box<Envelope<ToVmm>>, Vec<OwnedFd>);

/// The control socket before the machine runs.
pub(super) struct Early<'a> {
    control: &'a mut ControlSocket,
    /// The latest back end for each slot, and its request's number.
    offered: BTreeMap<u8, (u64, Successor)>,
    unheard: Vec<Message>,
}

impl<'a> Early<'a> {
    pub(super) fn new(control: &'a mut ControlSocket) -> Self {
        Self {
            control,
            offered: BTreeMap::new(),
            unheard: Vec::new(),
        }
    }

    /// Tells the supervisor that a back end was lost and waits for the next one, which comes with
    /// the number of its request. `None`: there will be none.
    ///
    /// # Errors
    /// When the supervisor is gone, or wants the VM to end.
    pub(super) fn replacement(
        &mut self,
        device: &DeviceConfig,
        generation: u32,
        loss: Loss,
        why: &dyn std::error::Error,
    ) -> Result<Option<(u64, Successor)>, Error> {
        let lost = FromVmm::BackendLost {
            device: device.id.clone(),
            generation,
            loss,
            outstanding: 0,
            reason: chain(why),
        };
        self.control.send(0, lost)?;
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(offered) = self.offered.remove(&device.slot) {
                return Ok(Some(offered));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let (message, fds) = match self.control.receive_within(left) {
                Ok(Incoming::Message(message, fds)) => (message, fds),
                Ok(_) => return Err(ControlError::Closed.into()),
                Err(ControlError::NoConfig(_)) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            match (&message.body, fds.len()) {
                (ToVmm::Stop, _) => return Err(ControlError::Closed.into()),
                (ToVmm::GiveUpBackend { slot, .. }, _) if *slot == device.slot => return Ok(None),
                (&ToVmm::ReplaceBackend { slot, generation }, BACKEND_FDS) => {
                    if let Ok(sockets) = super::run::of_back_end(fds) {
                        let successor = Successor { sockets, generation };
                        self.offered.insert(slot, (message.id, successor));
                    }
                }
                _ if self.unheard.len() < MOST_KEPT => self.unheard.push((message, fds)),
                _ => return Err(ControlError::NotStart.into()),
            }
        }
    }

    /// Says what became of a back end that [`Early::replacement`] gave.
    ///
    /// # Errors
    /// When the supervisor cannot be told.
    pub(super) fn answer(&self, id: u64, result: Result<(), &DeviceError>) -> Result<(), Error> {
        let answer = match result {
            Ok(()) => FromVmm::Done,
            Err(error) => FromVmm::Failed(chain(&error.cause)),
        };
        Ok(self.control.send(id, answer)?)
    }

    /// What the machine has to look at once it runs.
    pub(super) fn unheard(self) -> Vec<Message> {
        let mut all = self.unheard;
        for (slot, (id, successor)) in self.offered {
            let generation = successor.generation;
            let message = Envelope::new(id, ToVmm::ReplaceBackend { slot, generation });
            let fds: [OwnedFd; BACKEND_FDS] = successor.sockets.into();
            all.push((Box::new(message), fds.into()));
        }
        all
    }
}
