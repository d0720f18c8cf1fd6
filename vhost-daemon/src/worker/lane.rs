//! One queue: stopped, running or broken.

use super::crew::{Causes, Polled};
use super::{Answer, Command, QueueState, RingStart};
use crate::faults::{self, Step};
use crate::memory::GuestMemory;
use crate::ring::{Ring, RingFault, RingSetup};
use crate::wait::{is_ready, wait};
use crate::{QueueHandler, Wait};
use nix::poll::{PollFd, PollFlags};
use std::fmt::Display;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two lines about a broken ring: a guest can break it and reset the device in a loop.
const WARNING_INTERVAL: Duration = Duration::from_secs(1);

/// Whether chains are taken from a ring.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Served,
    /// The memory table lacks it: until one has it again.
    Away,
    /// The driver broke it: until it is started again.
    Broken,
}

/// A started ring.
struct Running {
    ring: Ring,
    setup: RingSetup,
    kick: OwnedFd,
    wait: Wait,
    /// There is something to do that no fd tells of.
    pending: bool,
    /// When the handler is to be called without another cause.
    alarm: Option<Instant>,
    state: State,
}

impl Running {
    /// How long to sleep at most.
    fn limit(&self) -> Option<Duration> {
        if self.pending {
            return Some(Duration::ZERO);
        }
        self.alarm
            .map(|alarm| alarm.saturating_duration_since(Instant::now()))
    }

    /// Takes a kick off the fd, if there is one: a front end may give an eventfd whose reader would wait.
    fn forget_kick(&self) {
        let mut fds = [PollFd::new(self.kick.as_fd(), PollFlags::POLLIN)];
        if wait(&mut fds, Some(Duration::ZERO)).is_ok() && is_ready(&fds[0]) {
            let _ = nix::unistd::read(&self.kick, &mut [0; 8]);
        }
    }

    /// Takes the causes that no fd tells of: whether there is one.
    fn take_cause(&mut self) -> bool {
        let rung = self.alarm.is_some_and(|alarm| alarm <= Instant::now());
        std::mem::take(&mut self.pending) || rung
    }
}

/// All that a queue has, save its thread.
pub(super) struct Lane {
    index: u16,
    handler: Box<dyn QueueHandler>,
    /// How long to look for more work before sleeping.
    patience: Duration,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    enabled: bool,
    /// The ring was disabled while it ran: what comes is given back unread.
    discards: bool,
    running: Option<Running>,
    /// When a broken ring is worth a line again.
    next_warning: Option<Instant>,
}

impl Lane {
    pub(super) fn new(index: u16, handler: Box<dyn QueueHandler>, patience: Duration) -> Self {
        Self {
            index,
            handler,
            patience,
            call: None,
            error: None,
            enabled: false,
            discards: false,
            running: None,
            next_warning: None,
        }
    }

    /// Does what the session asks.
    pub(super) fn obey(&mut self, command: Command) -> Answer {
        match command {
            Command::Start(start) => return self.start(*start),
            Command::Stop => return Answer::Stopped(self.stop()),
            Command::Leave => return Answer::Stopped(self.leave()),
            Command::Memory(memory) => return self.set_memory(memory),
            Command::Kick(kick) => {
                if let Some(running) = &mut self.running {
                    running.kick = kick;
                    // A kick on the old fd may have gone unseen.
                    running.pending = true;
                }
            }
            Command::Call(call) => {
                self.call = call;
                // An interrupt for what was published before this fd came may have gone nowhere.
                if self
                    .running
                    .as_ref()
                    .is_some_and(|running| running.ring.has_published())
                {
                    signal(self.call.as_ref());
                }
            }
            Command::Error(error) => self.error = error,
            Command::Fault => signal(self.error.as_ref()),
            Command::Enable(enabled) => self.set_enabled(enabled),
        }
        Answer::Done
    }

    fn start(&mut self, start: RingStart) -> Answer {
        self.stop();
        let RingStart {
            memory,
            setup,
            inflight,
            kick,
            features,
        } = start;
        match Ring::start(memory, &setup, inflight) {
            Ok(ring) => {
                self.handler.start(features);
                self.handler.resume(ring.position());
                self.running = Some(Running {
                    ring,
                    setup,
                    kick,
                    wait: Wait::AVAILABLE,
                    pending: true,
                    alarm: None,
                    state: State::Served,
                });
                Answer::Done
            }
            Err(fault) => Answer::Faulted(fault),
        }
    }

    pub(super) fn stop(&mut self) -> Option<QueueState> {
        self.drain();
        self.halt()
    }

    /// As [`Self::stop`], where the ring's record goes on.
    fn leave(&mut self) -> Option<QueueState> {
        self.finish(|handler, ring| handler.leave(ring));
        self.halt()
    }

    fn halt(&mut self) -> Option<QueueState> {
        self.discards = false;
        let running = self.running.take()?;
        Some(QueueState {
            base: running.ring.position(),
        })
    }

    fn set_enabled(&mut self, enabled: bool) {
        if !enabled {
            self.suspend();
        }
        self.enabled = enabled;
        self.discards = !enabled && self.running.is_some() && self.handler.discards_when_disabled();
        if let Some(running) = &mut self.running {
            running.pending = true;
        }
    }

    fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Answer {
        let grows = |running: &Running| memory.holds(running.ring.memory());
        if !self.running.as_ref().is_some_and(grows) {
            self.suspend();
        }
        if let Some(running) = &mut self.running {
            let found = running.ring.set_memory(memory, &running.setup);
            if running.state != State::Broken {
                running.state = if found.is_ok() { State::Served } else { State::Away };
                // One that came before is no news, and is heeded when the ring is served.
                running.forget_kick();
            }
            running.pending = true;
        }
        Answer::Done
    }

    /// Ends the I/O under way, of a ring that goes on.
    fn suspend(&mut self) {
        self.finish(|handler, ring| handler.suspend(ring));
    }

    /// Finishes what was taken and publishes it.
    fn drain(&mut self) {
        self.finish(|handler, ring| handler.drain(ring));
    }

    fn finish(&mut self, how: impl FnOnce(&mut dyn QueueHandler, &mut Ring) -> Result<(), RingFault>) {
        let Some(running) = &mut self.running else { return };
        let drained = how(self.handler.as_mut(), &mut running.ring);
        if running.state != State::Served {
            return;
        }
        let published = drained.and_then(|()| publish(&mut running.ring, self.call.as_ref()));
        if let Err(fault) = published {
            self.break_ring(&fault);
        }
    }

    /// Says what to wait for, and how long at most.
    pub(super) fn watch<'l>(&'l self, polled: &mut Polled<'l>) -> Option<Duration> {
        let running = self.running.as_ref().filter(|_| self.takes())?;
        let kicks = match running.state {
            State::Served => running.wait.available,
            State::Away => true,
            State::Broken => false,
        };
        if kicks {
            polled.kick(running.kick.as_fd());
        }
        if running.state != State::Served {
            return None;
        }
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::POLLIN, running.wait.readable);
        interest.set(PollFlags::POLLOUT, running.wait.writable);
        if let Some(source) = self.handler.source().filter(|_| !interest.is_empty()) {
            polled.source(source, interest);
        }
        if let Some(source) = self.handler.ended_source() {
            polled.source(source, PollFlags::POLLIN);
        }
        running.limit()
    }

    /// What a wait found; a round of the handler, if there is a cause for one.
    pub(super) fn heed(&mut self, causes: Causes) {
        let takes = self.takes();
        let Some(running) = &mut self.running else { return };
        if causes.kicked {
            // The count does not matter, and a kick taken away by another reader neither.
            let _ = nix::unistd::read(&running.kick, &mut [0; 8]);
        }
        match running.state {
            State::Served => {
                if takes && (causes.any() || running.take_cause()) {
                    self.serve();
                }
            }
            State::Away => {
                if causes.kicked {
                    self.complain(&"the driver kicks a ring that is not in the memory table");
                }
            }
            State::Broken => {}
        }
    }

    /// Whether chains are taken, to be served or to be discarded.
    fn takes(&self) -> bool {
        self.enabled || self.discards
    }

    /// One round of the handler.
    fn serve(&mut self) {
        let Some(running) = &mut self.running else { return };
        let handler = self.handler.as_mut();
        let round = round(handler, running, self.call.as_ref(), self.patience, self.discards);
        if let Err(fault) = round {
            self.break_ring(&fault);
        }
    }

    /// The driver broke its ring: no further chain is taken, what runs is finished, the front end
    /// is told. The process and its other queues go on.
    fn break_ring(&mut self, fault: &RingFault) {
        let Some(running) = &mut self.running else { return };
        running.state = State::Broken;
        // Only the end of the I/O matters; nothing is published on a broken ring.
        let _ = self.handler.drain(&mut running.ring);
        self.complain(&format_args!("ring is broken until the device is reset: {fault}"));
    }

    /// Tells the front end of a ring that cannot be served, and whoever reads the log.
    fn complain(&mut self, why: &dyn Display) {
        let now = Instant::now();
        if self.next_warning.is_none_or(|next| now >= next) {
            self.next_warning = Some(now + WARNING_INTERVAL);
            tracing::warn!(queue = self.index, "{why}");
        }
        signal(self.error.as_ref());
    }
}

/// Gives everything back unread.
fn discard(ring: &mut Ring) -> Result<Wait, RingFault> {
    while let Some(chain) = ring.pop()? {
        ring.complete(chain, 0);
    }
    Ok(Wait::AVAILABLE)
}

fn round(
    handler: &mut dyn QueueHandler,
    running: &mut Running,
    call: Option<&OwnedFd>,
    patience: Duration,
    discards: bool,
) -> Result<(), RingFault> {
    let ring = &mut running.ring;
    ring.begin_round()?;
    running.wait = if discards {
        discard(ring)?
    } else {
        handler.process(ring)?
    };
    running.alarm = running.wait.pause.map(|pause| Instant::now() + pause);
    publish(ring, call)?;
    let had_budget = ring.renew_budget();
    if !had_budget || look(handler, ring, running.wait, patience)? {
        running.pending = true;
        return Ok(());
    }
    running.pending = running.wait.available && ring.enable_kicks()?;
    Ok(())
}

/// Looks for more work until `patience` is over: busy, so that the next request finds no sleeper.
fn look(
    handler: &mut dyn QueueHandler,
    ring: &Ring,
    wait: Wait,
    patience: Duration,
) -> Result<bool, RingFault> {
    if patience.is_zero() || ring.was_idle() {
        return Ok(false);
    }
    let end = Instant::now() + patience;
    loop {
        if (wait.available && ring.has_available()?) || (wait.readable && handler.is_ready()) {
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
        std::hint::spin_loop();
    }
}

fn publish(ring: &mut Ring, call: Option<&OwnedFd>) -> Result<(), RingFault> {
    ring.publish()?;
    faults::point(Step::BeforeNotify);
    if ring.needs_interrupt()? {
        signal(call);
    }
    faults::point(Step::AfterNotify);
    Ok(())
}

/// Adds 1 to an eventfd of the front end's.
fn signal(eventfd: Option<&OwnedFd>) {
    if let Some(eventfd) = eventfd {
        // EAGAIN: it is at its limit, so a signal is pending anyway.
        let _ = nix::unistd::write(eventfd, &1u64.to_ne_bytes());
    }
}
