//! Hands one message at a time from thread to thread. Whoever receives waits for an eventfd, so that it
//! can wait for others along with it, and in the one call that the policies know; the standard library's
//! channel waits in futexes with deadlines, and yields the CPU while it spins.

use crate::wait::wait;
use nix::poll::{PollFd, PollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug)]
struct Slot<T> {
    message: Option<T>,
    /// The other side is gone.
    closed: bool,
}

#[derive(Debug)]
struct Shared<T> {
    slot: Mutex<Slot<T>>,
    changed: EventFd,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Slot<T>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Slot<T>)) {
        change(&mut self.lock());
        // An eventfd at its limit wakes just as well.
        let _ = self.changed.write(1);
    }
}

/// Where messages go in.
#[derive(Debug)]
pub(super) struct Sender<T>(Arc<Shared<T>>);

/// Where they come out. Its fd is readable when there may be a message, or the sender is gone.
#[derive(Debug)]
pub(super) struct Receiver<T>(Arc<Shared<T>>);

/// Nobody receives, or nobody sends any more, or nothing came in time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Gone;

/// A mailbox for one message.
///
/// # Errors
/// When the kernel gives no eventfd.
pub(super) fn mailbox<T>() -> io::Result<(Sender<T>, Receiver<T>)> {
    let changed = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    let slot = Mutex::new(Slot {
        message: None,
        closed: false,
    });
    let shared = Arc::new(Shared { slot, changed });
    Ok((Sender(Arc::clone(&shared)), Receiver(shared)))
}

impl<T> Sender<T> {
    /// Leaves a message; one that was not taken is replaced.
    pub(super) fn send(&self, message: T) -> Result<(), Gone> {
        if self.0.lock().closed {
            return Err(Gone);
        }
        self.0.change(|slot| slot.message = Some(message));
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

    /// Takes the news off the fd; [`Self::try_receive`] comes after it.
    pub(super) fn acknowledge(&self) {
        // Only the fact counts, and a wait told it.
        let _ = self.0.changed.read();
    }

    /// Waits for a message.
    pub(super) fn receive(&self, deadline: Duration) -> Result<T, Gone> {
        let end = Instant::now() + deadline;
        loop {
            self.acknowledge();
            if let Some(message) = self.try_receive()? {
                return Ok(message);
            }
            let left = end.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
            if left.is_zero() || wait(&mut fds, Some(left)).is_err() {
                return Err(Gone);
            }
        }
    }
}

impl<T> AsFd for Receiver<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.changed.as_fd()
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.change(|slot| slot.closed = true);
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.0.change(|slot| slot.closed = true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn messages_arrive_and_ends_are_seen() {
        let (sender, receiver) = mailbox().unwrap();
        assert_eq!(receiver.try_receive(), Ok(None));
        assert_eq!(receiver.receive(Duration::from_millis(1)), Err(Gone));
        let thread = std::thread::spawn(move || {
            assert_eq!(sender.send(7), Ok(()));
        });
        assert_eq!(receiver.receive(LONG), Ok(7));
        thread.join().unwrap();
        assert_eq!(receiver.try_receive(), Err(Gone));
        let (sender, receiver) = mailbox().unwrap();
        drop(receiver);
        assert_eq!(sender.send(7), Err(Gone));
    }

    #[test]
    fn a_message_sent_before_the_end_is_not_lost() {
        let (sender, receiver) = mailbox().unwrap();
        assert_eq!(sender.send(7), Ok(()));
        drop(sender);
        assert_eq!(receiver.receive(LONG), Ok(7));
        assert_eq!(receiver.receive(LONG), Err(Gone));
    }
}
