//! The loop of a thread: it serves one queue, or several in turn.

use super::lane::Lane;
use super::mailbox::{Gone, Receiver, Sender};
use super::watch::Pulse;
use super::{Answer, Command};
use crate::wait::{is_ready, wait};
use nix::poll::{PollFd, PollFlags};
use std::array;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// Most queues of one thread.
pub(super) const MOST_LANES: usize = 8;
/// What a queue waits for: its kick, and two of its handler's own.
const FDS_OF_A_LANE: usize = 3;
const MOST_FDS: usize = 1 + MOST_LANES * FDS_OF_A_LANE;

/// What a thread waits for: the session, then its queues' fds.
pub(super) struct Polled<'f> {
    fds: [PollFd<'f>; MOST_FDS],
    /// Whose each is.
    owners: [Owner; MOST_FDS],
    count: usize,
    lane: usize,
}

#[derive(Clone, Copy)]
struct Owner {
    lane: usize,
    kick: bool,
}

/// What a wait found of one queue's.
#[derive(Clone, Copy, Default)]
pub(super) struct Causes {
    /// Its kick.
    pub(super) kicked: bool,
    source: bool,
}

impl Causes {
    /// Anything.
    pub(super) fn any(self) -> bool {
        self.kicked || self.source
    }
}

impl<'f> Polled<'f> {
    fn new(inbox: BorrowedFd<'f>) -> Self {
        Self {
            fds: array::from_fn(|_| PollFd::new(inbox, PollFlags::POLLIN)),
            owners: [Owner { lane: 0, kick: false }; MOST_FDS],
            count: 1,
            lane: 0,
        }
    }

    /// A ring's kick.
    pub(super) fn kick(&mut self, fd: BorrowedFd<'f>) {
        self.push(fd, PollFlags::POLLIN, true);
    }

    /// A handler's own.
    pub(super) fn source(&mut self, fd: BorrowedFd<'f>, interest: PollFlags) {
        self.push(fd, interest, false);
    }

    fn push(&mut self, fd: BorrowedFd<'f>, interest: PollFlags, kick: bool) {
        let lane = self.lane;
        if let (Some(place), Some(owner)) = (self.fds.get_mut(self.count), self.owners.get_mut(self.count)) {
            *place = PollFd::new(fd, interest);
            *owner = Owner { lane, kick };
            self.count += 1;
        }
    }

    /// Waits; whether the session has something, and what each queue has.
    fn wait(&mut self, limit: Option<Duration>) -> (bool, [Causes; MOST_LANES]) {
        let fds = &mut self.fds[..self.count];
        if let Err(error) = wait(fds, limit) {
            tracing::error!(%error, "cannot wait");
        }
        let mut found = [Causes::default(); MOST_LANES];
        for (_, owner) in fds
            .iter()
            .zip(&self.owners)
            .skip(1)
            .filter(|(fd, _)| is_ready(fd))
        {
            let causes = &mut found[owner.lane];
            if owner.kick {
                causes.kicked = true;
            } else {
                causes.source = true;
            }
        }
        (fds.first().is_some_and(is_ready), found)
    }
}

/// All that a thread owns: at most [`MOST_LANES`] queues.
pub(super) struct Crew {
    pub(super) lanes: Vec<Lane>,
    /// For the queue at this place.
    pub(super) inbox: Receiver<(usize, Command)>,
    pub(super) pulse: Arc<Pulse>,
}

impl Crew {
    /// Serves until the session is gone, then waits for the end of the process.
    pub(super) fn run(mut self, outbox: &Sender<Answer>) -> ! {
        loop {
            self.pulse.beat();
            match self.inbox.try_receive() {
                Err(Gone) => break,
                Ok(Some((place, command))) => {
                    let lane = self.lanes.get_mut(place);
                    let answer = lane.map_or(Answer::Done, |lane| lane.obey(command));
                    if outbox.send(answer).is_err() {
                        break;
                    }
                }
                Ok(None) => self.turn(),
            }
        }
        for lane in &mut self.lanes {
            lane.stop();
        }
        // A thread that ends makes calls of its own; the end of the process takes this one along.
        loop {
            std::thread::park();
        }
    }

    /// Waits for a cause, then serves each queue that has one.
    fn turn(&mut self) {
        let mut polled = Polled::new(self.inbox.as_fd());
        let mut limit: Option<Duration> = None;
        for (place, lane) in self.lanes.iter().enumerate() {
            polled.lane = place;
            let most = lane.watch(&mut polled);
            limit = [limit, most].into_iter().flatten().min();
        }
        let (woken, found) = polled.wait(limit);
        if woken {
            self.inbox.acknowledge();
        }
        for (lane, causes) in self.lanes.iter_mut().zip(found) {
            lane.heed(causes);
        }
    }
}
