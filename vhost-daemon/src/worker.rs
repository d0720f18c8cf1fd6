//! A queue: stopped, running or broken, and its thread, the only one that touches its ring.
//!
//! ```text
//!             Start                    RingFault
//!  stopped ----------> running -------------------------> broken
//!     ^                  |  (error eventfd signalled)        |
//!     +------- Stop -----+---------------- Stop -------------+
//! ```
//!
//! The session sends one [`Command`] at a time and waits for its answer, so that when a message of
//! the front end is answered its effect is complete: after Stop no I/O is under way.
//!
//! A thread may serve several queues (`Device::thread_of`).

mod crew;
mod lane;
mod mailbox;
mod watch;

use crate::device::Device;
use crate::memory::GuestMemory;
use crate::ring::{InflightQueue, RingFault, RingSetup};
use crew::{Crew, MOST_LANES};
use jailer::sandbox::{LockdownError, Role, SeccompMode, lockdown_thread};
use lane::Lane;
use mailbox::{Receiver, Sender, mailbox};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
pub use watch::progress;
pub(crate) use watch::{Pulse, Watch};

/// Longest wait for a worker's answer. A drain waits for the slowest I/O of the host; longer than
/// this, and the process gives up (the front end, whose own deadline is shorter, has done so): the
/// worker is not asked again, since its late answer would be taken for one to another question.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);
/// Stack of a worker, and of a device's own thread. It formats log lines and inflates image clusters; nothing recurses.
pub(crate) const STACK_SIZE: usize = 256 << 10;

/// Everything a ring needs to run.
#[derive(Debug)]
pub(crate) struct RingStart {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) setup: RingSetup,
    pub(crate) inflight: Option<InflightQueue>,
    pub(crate) kick: OwnedFd,
    pub(crate) features: u64,
}

/// Where a ring stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct QueueState {
    /// The next available entry to take: the answer to GET_VRING_BASE.
    pub(crate) base: u16,
}

/// What the session asks of a worker.
enum Command {
    Start(Box<RingStart>),
    Stop,
    Leave,
    Kick(OwnedFd),
    Call(Option<OwnedFd>),
    Error(Option<OwnedFd>),
    Fault,
    Enable(bool),
    Memory(Arc<GuestMemory>),
}

/// What a worker answers.
enum Answer {
    Done,
    Stopped(Option<QueueState>),
    Faulted(RingFault),
    LockedDown(Result<(), LockdownError>),
}

/// Why a worker did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The thread or its eventfd could not be made.
    #[error("cannot start a queue's thread")]
    Spawn(#[source] io::Error),
    /// The thread could not be confined.
    #[error("cannot confine a queue's thread")]
    Lockdown(#[source] LockdownError),
    /// No answer in time: I/O hangs.
    #[error("queue {0} does not stop: its I/O hangs")]
    Hangs(u16),
    /// The ring cannot run.
    #[error("queue {index} cannot run")]
    Ring {
        /// The queue.
        index: u16,
        /// Why.
        #[source]
        fault: RingFault,
    },
}

/// The session's handle of a thread. It goes with the last of its queues' handles, and the thread then leaves
/// its rings; that is not waited for: it is idle, or hangs in I/O that outlasted its deadline, and then the end of
/// the process is all that helps.
struct Thread {
    /// For the queue at this place.
    commands: Sender<(usize, Command)>,
    answers: Receiver<Answer>,
    watch: Mutex<Watch>,
    /// [`ANSWER_DEADLINE`]; shorter in tests.
    deadline: Duration,
    /// An answer did not come in time.
    hangs: AtomicBool,
}

impl Thread {
    fn spawn(lanes: Vec<Lane>, name: String, role: Role, mode: SeccompMode) -> Result<Self, WorkerError> {
        let (commands, inbox) = mailbox().map_err(WorkerError::Spawn)?;
        let (outbox, answers) = mailbox().map_err(WorkerError::Spawn)?;
        let pulse = Arc::<Pulse>::default();
        let watch = Mutex::new(Watch::new(Arc::clone(&pulse)));
        let body = move || {
            pulse.start();
            let locked = lockdown_thread(role, mode);
            let confined = locked.is_ok();
            if outbox.send(Answer::LockedDown(locked)).is_ok() && confined {
                let crew = Crew { lanes, inbox, pulse };
                crew.run(&outbox);
            }
        };
        let builder = std::thread::Builder::new().name(name);
        builder
            .stack_size(STACK_SIZE)
            .spawn(body)
            .map_err(WorkerError::Spawn)?;
        Ok(Self {
            commands,
            answers,
            watch,
            deadline: ANSWER_DEADLINE,
            hangs: AtomicBool::new(false),
        })
    }
}

/// Those that this process may use; where the kernel does not say, as many as there are queues. The standard
/// library reads files besides.
fn processors() -> usize {
    let set = sched_getaffinity(Pid::from_raw(0));
    let count = set.map_or(0, |set| {
        let of_this_process = |&cpu: &usize| set.is_set(cpu) == Ok(true);
        (0..CpuSet::count()).filter(of_this_process).count()
    });
    if count == 0 { usize::MAX } else { count }
}

/// The session's handle of a queue.
pub(crate) struct Worker {
    index: u16,
    thread: Arc<Thread>,
    /// Among the queues of its thread.
    place: usize,
    /// What the thread was told last about its ring.
    enabled: Cell<bool>,
}

impl Worker {
    /// Makes the threads for the queues of `device`, each confined before it does anything else. With a
    /// `patience` a thread looks for more work for so long before it sleeps, and serves one queue.
    pub(crate) fn spawn_all(
        device: &mut dyn Device,
        role: Role,
        mode: SeccompMode,
        patience: Duration,
    ) -> Result<Vec<Self>, WorkerError> {
        let processors = processors();
        let mut crews = BTreeMap::<u16, Vec<(u16, Lane)>>::new();
        for (index, handler) in (0u16..).zip(device.take_handlers()) {
            let wanted = device.thread_of(index, processors);
            let full = crews.get(&wanted).is_some_and(|crew| crew.len() == MOST_LANES);
            let thread = if full || !patience.is_zero() {
                index
            } else {
                wanted
            };
            let lane = Lane::new(index, handler, patience);
            crews.entry(thread).or_default().push((index, lane));
        }
        let mut workers = Vec::new();
        for (thread, crew) in crews {
            let (queues, lanes): (Vec<_>, Vec<_>) = crew.into_iter().unzip();
            let thread = Arc::new(Thread::spawn(lanes, format!("queue{thread}"), role, mode)?);
            let queue = |(place, index)| Self::new(index, &thread, place);
            workers.extend(queues.into_iter().enumerate().map(queue));
        }
        // They confine themselves at the same time.
        for worker in workers.iter().filter(|worker| worker.place == 0) {
            if let Answer::LockedDown(Err(error)) = worker.answer()? {
                return Err(WorkerError::Lockdown(error));
            }
        }
        workers.sort_unstable_by_key(|worker| worker.index);
        Ok(workers)
    }

    fn new(index: u16, thread: &Arc<Thread>, place: usize) -> Self {
        Self {
            index,
            thread: Arc::clone(thread),
            place,
            enabled: Cell::new(false),
        }
    }

    /// Whether the thread uses a CPU and gets nowhere; asked from time to time.
    pub(crate) fn spins(&self) -> bool {
        let mut watch = self.thread.watch.lock().unwrap_or_else(PoisonError::into_inner);
        watch.spins()
    }

    /// Starts the ring.
    pub(crate) fn start(&self, start: RingStart) -> Result<(), WorkerError> {
        self.ask(Command::Start(Box::new(start))).map(drop)
    }

    /// Drains and stops the ring; `None` if it was stopped.
    pub(crate) fn stop(&self) -> Result<Option<QueueState>, WorkerError> {
        self.stop_by(Command::Stop)
    }

    /// Ends the I/O on the ring and stops it; what cannot be done now is left to whoever has the ring's record
    /// next. `None` if it was stopped.
    pub(crate) fn leave(&self) -> Result<Option<QueueState>, WorkerError> {
        self.stop_by(Command::Leave)
    }

    fn stop_by(&self, command: Command) -> Result<Option<QueueState>, WorkerError> {
        match self.ask(command)? {
            Answer::Stopped(state) => Ok(state),
            _ => Ok(None),
        }
    }

    /// Replaces the kick eventfd of a running ring.
    pub(crate) fn set_kick(&self, kick: OwnedFd) -> Result<(), WorkerError> {
        self.ask(Command::Kick(kick)).map(drop)
    }

    /// The eventfd that interrupts the guest.
    pub(crate) fn set_call(&self, call: Option<OwnedFd>) -> Result<(), WorkerError> {
        self.ask(Command::Call(call)).map(drop)
    }

    /// The eventfd that reports a broken ring.
    pub(crate) fn set_error(&self, error: Option<OwnedFd>) -> Result<(), WorkerError> {
        self.ask(Command::Error(error)).map(drop)
    }

    /// Tells the front end by that eventfd that the ring does not run.
    pub(crate) fn fault(&self) -> Result<(), WorkerError> {
        self.ask(Command::Fault).map(drop)
    }

    /// Whether the ring's chains are taken (SET_VRING_ENABLE). What the thread knows it is not told
    /// again: its answer might wait for a slow disk.
    pub(crate) fn set_enabled(&self, enabled: bool) -> Result<(), WorkerError> {
        if self.enabled.get() != enabled {
            self.ask(Command::Enable(enabled))?;
            self.enabled.set(enabled);
        }
        Ok(())
    }

    /// Another memory table: ends the I/O in the old one, where that loses a part, then goes on in it.
    pub(crate) fn set_memory(&self, memory: Arc<GuestMemory>) -> Result<(), WorkerError> {
        self.ask(Command::Memory(memory)).map(drop)
    }

    fn ask(&self, command: Command) -> Result<Answer, WorkerError> {
        let thread = &self.thread;
        if thread.hangs.load(Ordering::Relaxed) || thread.commands.send((self.place, command)).is_err() {
            return Err(WorkerError::Hangs(self.index));
        }
        match self.answer()? {
            Answer::Faulted(fault) => Err(WorkerError::Ring {
                index: self.index,
                fault,
            }),
            answer => Ok(answer),
        }
    }

    fn answer(&self) -> Result<Answer, WorkerError> {
        let thread = &self.thread;
        thread.answers.receive(thread.deadline).map_err(|_| {
            thread.hangs.store(true, Ordering::Relaxed);
            WorkerError::Hangs(self.index)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_answer_is_not_taken_for_another_one() {
        let (commands, _inbox) = mailbox().unwrap();
        let (outbox, answers) = mailbox().unwrap();
        let thread = Thread {
            commands,
            answers,
            watch: Mutex::new(Watch::new(Arc::default())),
            deadline: Duration::from_millis(1),
            hangs: AtomicBool::new(false),
        };
        let worker = Worker::new(7, &Arc::new(thread), 0);
        assert!(matches!(worker.set_call(None), Err(WorkerError::Hangs(7))));
        assert!(outbox.send(Answer::Done).is_ok());
        assert!(matches!(worker.stop(), Err(WorkerError::Hangs(7))), "I/O runs on");
    }
}
