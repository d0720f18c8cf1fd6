//! Flushing aside: while the host's disk makes data durable, the queue that was asked to goes on with other
//! requests. One thread flushes for all queues, and one flush answers all that were asked for before it began.

use crate::image::{self, Image};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use vhost_daemon::device::Errands;
use vhost_daemon::faults::{self, Step};

/// What came of flushes of one queue, the oldest first.
type Outcomes = Vec<io::Result<()>>;

/// One queue's flushes.
#[derive(Default)]
struct Queue {
    /// Asked for, and not begun.
    asked: usize,
    /// Not taken by the queue, whose event is readable while there is one.
    ended: Outcomes,
}

#[derive(Default)]
struct Shared {
    queues: Mutex<Vec<Queue>>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Queue>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until flushes are asked for, and carries them out.
    fn carry_out(&self, events: &[Arc<EventFd>], flush: impl FnOnce() -> io::Result<()>) {
        let idle = |queues: &mut Vec<Queue>| queues.iter().all(|queue| queue.asked == 0);
        let mut queues = self
            .changed
            .wait_while(self.lock(), idle)
            .unwrap_or_else(PoisonError::into_inner);
        vhost_daemon::progress();
        let asked: Vec<usize> = queues
            .iter_mut()
            .map(|queue| std::mem::take(&mut queue.asked))
            .collect();
        drop(queues);
        let outcome = flush();
        let mut queues = self.lock();
        for ((queue, asked), event) in queues.iter_mut().zip(asked).zip(events) {
            queue.ended.extend((0..asked).map(|_| same(&outcome)));
            if asked > 0 {
                // Under the lock: whoever takes what has ended takes the event as well. Only the fact counts.
                let _ = event.write(1);
            }
        }
        self.changed.notify_all();
    }
}

/// Another of the same; an error keeps what its kind is judged by.
fn same(outcome: &io::Result<()>) -> io::Result<()> {
    outcome.as_ref().copied().map_err(|error| {
        image::errno(error).map_or_else(
            || io::Error::new(error.kind(), error.to_string()),
            io::Error::from_raw_os_error,
        )
    })
}

/// The flushes of all queues.
pub(crate) struct Flusher {
    shared: Arc<Shared>,
    /// Of each queue.
    events: Vec<Arc<EventFd>>,
}

impl Flusher {
    /// For so many queues, before lockdown; [`Self::errands`] must run on a thread.
    pub(crate) fn new(queues: u16) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let events = (0..queues).map(|_| EventFd::from_flags(flags).map(Arc::new));
        let events = events.collect::<Result<Vec<_>, _>>()?;
        let shared = Arc::<Shared>::default();
        shared.lock().resize_with(events.len(), Queue::default);
        Ok(Self { shared, events })
    }

    /// What the device's own thread does.
    pub(crate) fn errands(&self, image: &'static dyn Image) -> Errands {
        let (shared, events) = (Arc::clone(&self.shared), self.events.clone());
        Box::new(move || {
            loop {
                shared.carry_out(&events, || {
                    faults::point(Step::Flush);
                    image.flush()
                });
            }
        })
    }

    /// One for each queue, in their order.
    pub(crate) fn queues(&self) -> impl Iterator<Item = Flushes> + use<> {
        let (shared, events) = (Arc::clone(&self.shared), self.events.clone());
        events.into_iter().enumerate().map(move |(index, event)| Flushes {
            shared: Arc::clone(&shared),
            event,
            index,
        })
    }
}

/// One queue's side.
pub(crate) struct Flushes {
    shared: Arc<Shared>,
    event: Arc<EventFd>,
    index: usize,
}

impl Flushes {
    /// Asks for one: it covers what has completed by now.
    pub(crate) fn begin(&self) {
        let mut queues = self.shared.lock();
        if let Some(queue) = queues.get_mut(self.index) {
            queue.asked += 1;
        }
        self.shared.changed.notify_all();
    }

    /// What came of those that have ended since it was last asked, the oldest first.
    pub(crate) fn ended(&self) -> Outcomes {
        self.take(&mut self.shared.lock())
    }

    /// As [`Self::ended`], once the `open` ones, which were asked for and not taken, have ended. It takes as long as
    /// the host's disk does.
    pub(crate) fn all(&self, open: usize) -> Outcomes {
        let busy = |queues: &mut Vec<Queue>| {
            let queue = queues.get(self.index);
            queue.is_some_and(|queue| queue.ended.len() < open)
        };
        let queues = self.shared.changed.wait_while(self.shared.lock(), busy);
        self.take(&mut queues.unwrap_or_else(PoisonError::into_inner))
    }

    fn take(&self, queues: &mut [Queue]) -> Outcomes {
        let ended = queues.get_mut(self.index).map(|queue| &mut queue.ended);
        let ended = ended.map(std::mem::take).unwrap_or_default();
        if !ended.is_empty() {
            let _ = self.event.read();
        }
        ended
    }

    /// Whether one has ended; asks the kernel nothing.
    pub(crate) fn has_ended(&self) -> bool {
        let queues = self.shared.lock();
        queues
            .get(self.index)
            .is_some_and(|queue| !queue.ended.is_empty())
    }

    /// Readable when one has ended.
    pub(crate) fn source(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    const DEADLINE: Duration = Duration::from_secs(60);

    /// A flusher whose every flush ends as the test says, and a word for each that has begun.
    fn flusher() -> (Vec<Flushes>, mpsc::Sender<io::Result<()>>, mpsc::Receiver<()>) {
        let flusher = Flusher::new(2).unwrap();
        let (ends, outcomes) = mpsc::channel();
        let (begins, begun) = mpsc::channel();
        let (shared, events) = (Arc::clone(&flusher.shared), flusher.events.clone());
        thread::spawn(move || {
            let mut goes_on = true;
            while goes_on {
                shared.carry_out(&events, || {
                    let outcome = begins.send(()).ok().and_then(|()| outcomes.recv().ok());
                    goes_on = outcome.is_some();
                    outcome.unwrap_or(Ok(()))
                });
            }
        });
        (flusher.queues().collect(), ends, begun)
    }

    fn wait(queue: &Flushes) {
        let mut fds = [PollFd::new(queue.source(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::try_from(DEADLINE).unwrap());
        assert_eq!(ready, Ok(1), "no word of a flush that ended");
        assert!(queue.has_ended());
    }

    #[test]
    fn one_flush_answers_all_that_were_asked_for_before_it() {
        let (queues, ends, begun) = flusher();
        queues[0].begin();
        begun.recv_timeout(DEADLINE).unwrap();
        // These came too late for it.
        queues[0].begin();
        queues[1].begin();
        queues[1].begin();
        assert!(queues[0].ended().is_empty());
        ends.send(Ok(())).unwrap();
        wait(&queues[0]);
        assert_eq!(queues[0].ended().len(), 1);
        assert!(!queues[1].has_ended());
        begun.recv_timeout(DEADLINE).unwrap();
        ends.send(Err(io::Error::from_raw_os_error(libc::EIO))).unwrap();
        for (queue, count) in queues.iter().zip([1, 2]) {
            wait(queue);
            let ended = queue.ended();
            assert_eq!(ended.len(), count);
            let errors = ended
                .into_iter()
                .filter_map(|outcome| outcome.err()?.raw_os_error());
            assert!(errors.eq(std::iter::repeat_n(libc::EIO, count)), "each is told");
            assert!(queue.ended().is_empty() && queue.all(0).is_empty());
        }
    }

    #[test]
    fn whoever_waits_for_all_waits_for_the_last() {
        let (queues, ends, begun) = flusher();
        queues[1].begin();
        begun.recv_timeout(DEADLINE).unwrap();
        queues[1].begin();
        let ender = thread::spawn(move || {
            ends.send(Ok(())).unwrap();
            begun.recv_timeout(DEADLINE).unwrap();
            ends.send(Ok(())).unwrap();
        });
        assert_eq!(queues[1].all(2).len(), 2);
        ender.join().unwrap();
        let mut fds = [PollFd::new(queues[1].source(), PollFlags::POLLIN)];
        assert_eq!(
            poll(&mut fds, PollTimeout::ZERO),
            Ok(0),
            "nothing is left to heed"
        );
    }
}
