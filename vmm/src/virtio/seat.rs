//! A device's thread: made before lockdown, it serves one device after another.

use super::device::Word;
use super::transport::Transport;
use super::worker::{self, Context, Negotiated};
use crate::frontend::{BackendSockets, Error};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

/// Confines a device's thread; called on it.
pub type Confine = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// A device to serve.
pub(super) struct Order {
    pub(super) context: Context,
    pub(super) sockets: BackendSockets,
    pub(super) give: SyncSender<Result<Negotiated, Error>>,
    pub(super) take: Receiver<Arc<Transport>>,
    pub(super) answered: Option<Word>,
}

/// A thread that waits for a device, or serves one.
#[derive(Debug)]
pub struct Seat {
    orders: Option<SyncSender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Seat {
    /// A thread for `slot`'s first device, confined once all of that is negotiated and allocated.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(slot: u8, confine: Confine) -> Result<Self, Error> {
        Self::spawn(slot, |orders| serve(&orders, Some(confine)))
    }

    /// A thread that is confined, for devices that come later.
    ///
    /// # Errors
    /// When it cannot be made, or not be confined.
    pub fn confined(slot: u8, confine: Confine) -> Result<Self, Error> {
        let (tell, told) = sync_channel(1);
        let seat = Self::spawn(slot, move |orders| {
            let confined = confine();
            let failed = confined.is_err();
            if tell.send(confined).is_ok() && !failed {
                serve(&orders, None);
            }
        })?;
        match told.recv() {
            Ok(Ok(())) => Ok(seat),
            Ok(Err(source)) => Err(unconfined(source)),
            Err(_) => Err(unconfined(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn spawn(slot: u8, body: impl FnOnce(Receiver<Order>) + Send + 'static) -> Result<Self, Error> {
        let (orders, inbox) = sync_channel(1);
        let thread = Builder::new()
            .name(format!("virtio-{slot}"))
            .spawn(move || body(inbox))
            .map_err(|source| Error::Resource {
                what: "the device's thread",
                source,
            })?;
        Ok(Self {
            orders: Some(orders),
            thread: Some(thread),
        })
    }

    /// Gives it a device. Where its thread is gone, what waits for an answer is told.
    pub(super) fn give(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // There is room: a seat has no other device.
            let _ = orders.try_send(order);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(super) fn unconfined(source: io::Error) -> Error {
    Error::Resource {
        what: "the confinement of a device's thread",
        source,
    }
}

fn serve(orders: &Receiver<Order>, mut confine: Option<Confine>) {
    while let Ok(order) = orders.recv() {
        worker::run(order, &mut confine);
    }
}
