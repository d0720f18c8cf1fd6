//! One MSI-X vector: which eventfds raise it, and how it is masked without losing an interrupt.
//!
//! A *source* is an eventfd that a back end (or the vmm, for configuration changes) signals.
//! While the vector is live its sources are attached as irqfds and KVM injects each signal
//! with no help from here; while it is not, signals only count up in the eventfd, and that
//! count **is** the pending bit. No interrupt is lost, because every signal falls into one of
//! these intervals:
//!
//! ```text
//!            attach returns                    detach returns
//!  counted ------|---------- injected -------------|------ counted
//!           \ drain, and signal again if > 0
//! ```
//!
//! - *Mask*: [`Interrupts::detach`] first. KVM takes the irqfd off the eventfd under the
//!   eventfd's lock, then waits for injections under way. A signal is before (injected) or after
//!   (counted), never neither. The route stays, so that an injection under way finds it.
//! - *Unmask*: set the route, attach, and only then read the count. A signal before the attach is
//!   in the count, which is read afterwards, and is signalled once more through the irqfd. A
//!   signal between attach and read was injected; where KVM did not take it out of the count (it
//!   polls the count as it attaches), it is injected twice, which MSI permits and a driver must
//!   take as a spurious interrupt. Reading before attaching would lose what comes between.
//! - Mask and unmask of one function exclude each other (the lock around [`super::Msix`]), so
//!   that no detach comes between the read and the second signal.

use crate::frontend::SharedEvent;
use crate::platform::{Gsi, Interrupts, MsiMessage};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

struct Source {
    event: Arc<SharedEvent>,
    attached: bool,
}

/// A vector's table entry and its way into KVM.
pub(super) struct Vector {
    gsi: Gsi,
    /// What the guest wrote.
    pub(super) message: MsiMessage,
    /// The vector's own mask bit; set at reset (PCI 3.0, 6.8.2.9).
    pub(super) masked: bool,
    /// What KVM has, so that programming the same message again makes no system call.
    routed: Option<MsiMessage>,
    sources: Vec<Source>,
    live: bool,
}

impl Vector {
    pub(super) fn new(gsi: Gsi) -> Self {
        Self {
            gsi,
            message: MsiMessage::default(),
            masked: true,
            routed: None,
            sources: Vec::new(),
            live: false,
        }
    }

    /// Makes KVM agree with the table. `open`: MSI-X is enabled, the function not masked, and it
    /// may send messages.
    pub(super) fn settle(&mut self, interrupts: &dyn Interrupts, open: bool) -> io::Result<()> {
        self.live = open && !self.masked;
        if self.live {
            self.raise_from_sources(interrupts)
        } else {
            self.silence(interrupts)
        }
    }

    fn raise_from_sources(&mut self, interrupts: &dyn Interrupts) -> io::Result<()> {
        if self.sources.is_empty() {
            return Ok(());
        }
        if self.routed != Some(self.message) {
            interrupts.set_route(self.gsi, Some(self.message))?;
            self.routed = Some(self.message);
        }
        for source in self.sources.iter_mut().filter(|source| !source.attached) {
            interrupts.attach(self.gsi, source.event.as_fd())?;
            source.attached = true;
            if source.event.take() > 0 {
                source.event.signal();
            }
        }
        Ok(())
    }

    fn silence(&mut self, interrupts: &dyn Interrupts) -> io::Result<()> {
        for source in self.sources.iter_mut().filter(|source| source.attached) {
            interrupts.detach(self.gsi, source.event.as_fd())?;
            source.attached = false;
        }
        Ok(())
    }

    /// Lets `event` raise this vector from the next [`Vector::settle`] on.
    pub(super) fn add_source(&mut self, event: Arc<SharedEvent>) {
        if !self
            .sources
            .iter()
            .any(|source| Arc::ptr_eq(&source.event, &event))
        {
            self.sources.push(Source {
                event,
                attached: false,
            });
        }
    }

    /// Undoes [`Vector::add_source`]. What `event` counted stays in it.
    pub(super) fn remove_source(
        &mut self,
        interrupts: &dyn Interrupts,
        event: &Arc<SharedEvent>,
    ) -> io::Result<()> {
        let found = self
            .sources
            .iter()
            .position(|source| Arc::ptr_eq(&source.event, event));
        if let Some(at) = found {
            if self.sources[at].attached {
                interrupts.detach(self.gsi, event.as_fd())?;
            }
            self.sources.swap_remove(at);
        }
        Ok(())
    }

    /// Gives the interrupt back; one that is still attached stays this vector's for ever.
    pub(super) fn retire(self, interrupts: &dyn Interrupts) {
        if self.sources.is_empty() {
            interrupts.free(self.gsi);
        }
    }

    /// Takes every source off.
    pub(super) fn remove_all(&mut self, interrupts: &dyn Interrupts) -> io::Result<()> {
        self.silence(interrupts)?;
        self.sources.clear();
        Ok(())
    }

    /// The pending bit: an interrupt waits for the vector to be unmasked. A live vector has none
    /// (its eventfds may hold a count that KVM has injected already).
    pub(super) fn pending(&self) -> bool {
        !self.live && self.sources.iter().any(|source| source.event.is_signalled())
    }
}
