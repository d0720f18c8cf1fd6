//! Hands one message at a time from thread to thread, waiting in a futex only: the standard library's
//! channel yields the CPU while it spins, a call that the disk process's policy does not have.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Debug)]
struct Slot<T> {
    message: Option<T>,
    /// The other side is gone.
    closed: bool,
}

#[derive(Debug)]
struct Shared<T> {
    slot: Mutex<Slot<T>>,
    changed: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Slot<T>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

/// Where messages go in.
#[derive(Debug)]
pub(super) struct Sender<T>(Arc<Shared<T>>);

/// Where they come out.
#[derive(Debug)]
pub(super) struct Receiver<T>(Arc<Shared<T>>);

/// Nobody receives, or nobody sends any more, or nothing came in time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Gone;

/// A mailbox for one message.
pub(super) fn mailbox<T>() -> (Sender<T>, Receiver<T>) {
    let slot = Mutex::new(Slot {
        message: None,
        closed: false,
    });
    let shared = Arc::new(Shared {
        slot,
        changed: Condvar::new(),
    });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

impl<T> Sender<T> {
    /// Leaves a message; one that was not taken is replaced (a worker that hangs is told to quit).
    pub(super) fn send(&self, message: T) -> Result<(), Gone> {
        let mut slot = self.0.lock();
        if slot.closed {
            return Err(Gone);
        }
        slot.message = Some(message);
        drop(slot);
        self.0.changed.notify_all();
        Ok(())
    }
}

impl<T> Receiver<T> {
    /// A message that is there already.
    pub(super) fn try_receive(&self) -> Result<Option<T>, Gone> {
        let mut slot = self.0.lock();
        match slot.message.take() {
            None if slot.closed => Err(Gone),
            message => Ok(message),
        }
    }

    /// Waits for a message.
    pub(super) fn receive(&self, deadline: Duration) -> Result<T, Gone> {
        let waiting = |slot: &mut Slot<T>| slot.message.is_none() && !slot.closed;
        let waited = self
            .0
            .changed
            .wait_timeout_while(self.0.lock(), deadline, waiting);
        let (mut slot, _) = waited.unwrap_or_else(PoisonError::into_inner);
        slot.message.take().ok_or(Gone)
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn messages_arrive_and_ends_are_seen() {
        let (sender, receiver) = mailbox();
        assert_eq!(receiver.try_receive(), Ok(None));
        assert_eq!(receiver.receive(Duration::from_millis(1)), Err(Gone));
        let thread = std::thread::spawn(move || {
            assert_eq!(sender.send(7), Ok(()));
        });
        assert_eq!(receiver.receive(LONG), Ok(7));
        thread.join().unwrap();
        assert_eq!(receiver.try_receive(), Err(Gone));
        let (sender, receiver) = mailbox();
        drop(receiver);
        assert_eq!(sender.send(7), Err(Gone));
    }

    #[test]
    fn a_message_sent_before_the_end_is_not_lost() {
        let (sender, receiver) = mailbox();
        assert_eq!(sender.send(7), Ok(()));
        drop(sender);
        assert_eq!(receiver.receive(LONG), Ok(7));
        assert_eq!(receiver.receive(LONG), Err(Gone));
    }
}
