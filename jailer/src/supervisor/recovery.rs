//! Whether and when a device's process is started again: the policy of one device, without the
//! doing.
//!
//! ```text
//!  Serving --ended--> Waiting --due--> Spawning --socket--> Joining --vmm: done--> Serving
//!     |                  ^                |                   |  |
//!     |                  +---- failed ----+------- ended -----+  |
//!     |                  +--- ended ---+                         |
//!     +-- lost, hung ------> Ending <--+------ refused, late ----+
//!                               |
//!                             killed -- does not end --> Lost <-- too many failures in a row
//! ```
//!
//! A successor is asked for only once its predecessor was reaped. What that had under way for the guest has ended with
//! it, or the successor waits for it before it serves (`cache=none`), so that nothing of it lands in the image later.
//!
//! The spawner has no deadline: it may be stopped, and answers all that it hears. Its end is that of the VM.

use std::time::{Duration, Instant};

/// A process that served this long makes up for one failure. One that dies of what the guest asked, which its successor
/// is asked again, does so sooner; one that is killed after this is no reason to make the guest wait for the next.
const HEALTHY: Duration = Duration::from_millis(10);
/// The wait before the second attempt in a row; the first comes at once. It doubles each time.
const FIRST_DELAY: Duration = Duration::from_millis(10);
/// The longest wait between attempts.
const LONGEST_DELAY: Duration = Duration::from_secs(2);
/// One failure in a row more than this, with 6.55 s of waits between them, is the end of the device.
const MOST_FAILURES: u32 = 11;
/// More deaths than this, less one for each second that passes, are the end of a device whose
/// processes live too long to count as failures and yet die again and again.
const MOST_DEATHS: u32 = 600;
/// What the spawner could not be told, since it is stopped and its socket full, it is told again after this time.
const TELL_AGAIN: Duration = Duration::from_secs(2);
/// The vmm, whose own deadlines are shorter, says within this time whether a successor serves.
pub(super) const JOIN_DEADLINE: Duration = Duration::from_secs(40);
/// The vmm lets go of a process within this time: its drain deadline, and some.
const RELEASE_DEADLINE: Duration = Duration::from_secs(35);
/// A process that is stopped for this long, as by a debugger, is hung.
const STOP_DEADLINE: Duration = Duration::from_secs(2);
/// SIGKILL, once it is sent, ends a process within this time, unless the kernel holds it (state D).
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Where a device's process is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Serving,
    /// The vmm was asked, by this request, to let go of it.
    Releasing(Instant, u64),
    /// It ended; the next is started at that time.
    Waiting(Instant),
    /// The spawner was asked for the next, which it answers when it runs; or it is asked again at that time.
    Spawning(Option<Instant>),
    /// The vmm was given its socket, by this request.
    Joining(Instant, u64),
    /// The spawner was asked to kill it, which it answers when it runs; or it is asked again at that time.
    Ending(Option<Instant>),
    /// It was killed, and ends until then.
    Killed(Instant),
    /// The guest has been told, or is to be, that there is no device any more.
    Lost,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Order {
    /// Ask the spawner for a process.
    Respawn,
    /// Kill the process that there is.
    Kill,
    /// Tell the guest: NEEDS_RESET.
    GiveUp(String),
}

/// One device's process.
pub(super) struct Recovery {
    stage: Stage,
    failures: u32,
    /// When it began to serve.
    since: Instant,
    /// When its predecessor ended, until the guest is served again.
    ended: Option<Instant>,
    /// What went wrong last.
    why: String,
    /// A stopped process has until then to go on.
    stopped: Option<Instant>,
    /// See [`MOST_DEATHS`].
    deaths: u32,
    /// When one was forgiven last.
    forgiven: Instant,
    /// Which of the device's processes the vmm was given last.
    generation: u32,
    /// What is wrong with the process was told before it ended.
    told: bool,
    /// Its end is no failure.
    planned: bool,
}

impl Recovery {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            stage: Stage::Serving,
            failures: 0,
            since: now,
            ended: None,
            why: String::new(),
            stopped: None,
            deaths: 0,
            forgiven: now,
            generation: 0,
            told: false,
            planned: false,
        }
    }

    /// Of a device that is being attached: its first process is started at once.
    pub(super) fn coming(now: Instant) -> Self {
        Self {
            stage: Stage::Waiting(now),
            // The first is 0.
            generation: u32::MAX,
            ..Self::new(now)
        }
    }

    /// There is to be no process any more.
    pub(super) fn give_up(&mut self) {
        self.stage = Stage::Lost;
        self.stopped = None;
    }

    /// Whether the spawner was asked for a process, and has not answered.
    pub(super) fn is_spawning(&self) -> bool {
        matches!(self.stage, Stage::Spawning(_))
    }

    /// Whether the vmm has not said yet whether it can use the process.
    pub(super) fn is_joining(&self) -> bool {
        matches!(self.stage, Stage::Joining(..))
    }

    /// When to look again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::Lost => None,
            Stage::Serving => self.stopped,
            Stage::Joining(at, _) | Stage::Releasing(at, _) => {
                Some(self.stopped.map_or(at, |stop| stop.min(at)))
            }
            Stage::Spawning(at) | Stage::Ending(at) => at,
            Stage::Waiting(at) | Stage::Killed(at) => Some(at),
        }
    }

    /// The process was stopped by a signal, or goes on.
    pub(super) fn stopped(&mut self, now: Instant, stopped: bool) {
        self.stopped = stopped.then(|| now + STOP_DEADLINE);
    }

    /// What the vmm was asked is given its whole time anew: it was stopped meanwhile.
    pub(super) fn excuse_vmm(&mut self, now: Instant) {
        match &mut self.stage {
            Stage::Releasing(until, _) => *until = now + RELEASE_DEADLINE,
            Stage::Joining(until, _) => *until = now + JOIN_DEADLINE,
            _ => {}
        }
    }

    /// Whether what [`Recovery::due`] answers next is for a process that stays stopped.
    pub(super) fn is_hung(&self, now: Instant) -> bool {
        self.is_of_use() && self.stopped.is_some_and(|at| now >= at)
    }

    /// The process was reaped, or none could be made.
    pub(super) fn ended(&mut self, now: Instant, why: &str) -> Option<Order> {
        self.stopped = None;
        if self.stage == Stage::Lost {
            return None;
        }
        self.forgive(now);
        // Its end says less than why it was killed.
        if !matches!(self.stage, Stage::Ending(_) | Stage::Killed(_)) {
            why.clone_into(&mut self.why);
        }
        self.ended.get_or_insert(now);
        if std::mem::take(&mut self.planned) {
            self.stage = Stage::Waiting(now);
            return None;
        }
        self.failures += 1;
        self.deaths += 1;
        if self.deaths > MOST_DEATHS {
            let how = format!("its processes died {MOST_DEATHS} times more than seconds passed, the last: ");
            return Some(self.lose(how));
        }
        if self.failures > MOST_FAILURES {
            return Some(self.lose(format!("{} processes failed in a row, the last: ", self.failures)));
        }
        let delay = match self.failures {
            1 => Duration::ZERO,
            n => (FIRST_DELAY * 2u32.saturating_pow(n - 2)).min(LONGEST_DELAY),
        };
        self.stage = Stage::Waiting(now + delay);
        None
    }

    /// Looks at the time.
    pub(super) fn due(&mut self, now: Instant) -> Option<Order> {
        if self.deadline().is_none_or(|at| now < at) {
            return None;
        }
        if self.is_hung(now) {
            return self.condemn(now, "it was stopped by a signal");
        }
        match self.stage {
            Stage::Waiting(_) | Stage::Spawning(_) => {
                self.stage = Stage::Spawning(None);
                Some(Order::Respawn)
            }
            Stage::Releasing(..) => self.condemn(now, "the vmm did not let go of it in time"),
            Stage::Joining(..) => self.condemn(now, "the vmm could not use it in time"),
            Stage::Ending(_) => {
                self.stage = Stage::Ending(None);
                Some(Order::Kill)
            }
            Stage::Killed(_) => Some(self.lose("its process does not end when killed: ".to_owned())),
            Stage::Serving | Stage::Lost => None,
        }
    }

    /// The spawner made a process, and request `id` gives its socket to the vmm as the device's
    /// back end of the generation that is returned. `None`: nobody waits for it.
    pub(super) fn spawned(&mut self, now: Instant, id: u64) -> Option<u32> {
        if !matches!(self.stage, Stage::Spawning(_)) {
            return None;
        }
        self.stage = Stage::Joining(now + JOIN_DEADLINE, id);
        self.generation = self.generation.wrapping_add(1);
        self.told = false;
        Some(self.generation)
    }

    /// Whether the vmm means the latest process.
    pub(super) fn is_latest(&self, generation: u32) -> bool {
        self.generation == generation
    }

    /// What is wrong with the process has been told: its end, which follows, is no news.
    pub(super) fn tell(&mut self) {
        self.told = true;
    }

    /// Whether [`Recovery::tell`] was called for this process.
    pub(super) fn is_told(&self) -> bool {
        self.told
    }

    /// Whether the vmm was asked, by request `id`, to use this process.
    pub(super) fn joins_by(&self, id: u64) -> bool {
        matches!(self.stage, Stage::Joining(_, wanted) if wanted == id)
    }

    /// The guest is served again; how long it was not.
    pub(super) fn joined(&mut self, now: Instant) -> Duration {
        self.stage = Stage::Serving;
        self.since = now;
        self.ended
            .take()
            .map_or(Duration::ZERO, |ended| now.duration_since(ended))
    }

    /// The process is of no use: it is to be killed. Nothing, where it has ended or is ending.
    pub(super) fn condemn(&mut self, now: Instant, why: &str) -> Option<Order> {
        if !self.is_of_use() {
            return None;
        }
        self.forgive(now);
        why.clone_into(&mut self.why);
        self.ended.get_or_insert(now);
        self.stage = Stage::Ending(None);
        Some(Order::Kill)
    }

    /// The spawner could not be told what was ordered last.
    pub(super) fn not_told(&mut self, now: Instant) {
        if let Stage::Spawning(again) | Stage::Ending(again) = &mut self.stage {
            *again = Some(now + TELL_AGAIN);
        }
    }

    /// The spawner has sent the signal.
    pub(super) fn killed(&mut self, now: Instant) {
        if matches!(self.stage, Stage::Ending(_)) {
            self.stage = Stage::Killed(now + KILL_DEADLINE);
        }
    }

    fn is_of_use(&self) -> bool {
        matches!(
            self.stage,
            Stage::Serving | Stage::Releasing(..) | Stage::Joining(..)
        )
    }

    /// The vmm is asked, by request `id`, to let go of the process. False: it does not serve.
    pub(super) fn release(&mut self, now: Instant, id: u64) -> bool {
        let serves = self.stage == Stage::Serving && self.stopped.is_none();
        if serves {
            self.forgive(now);
            self.stage = Stage::Releasing(now + RELEASE_DEADLINE, id);
        }
        serves
    }

    /// Undoes [`Recovery::release`].
    pub(super) fn keep(&mut self, now: Instant) {
        if matches!(self.stage, Stage::Releasing(..)) {
            self.stage = Stage::Serving;
            self.since = now;
        }
    }

    /// Whether the vmm was asked, by request `id`, to let go of this process.
    pub(super) fn releases_by(&self, id: u64) -> bool {
        matches!(self.stage, Stage::Releasing(_, wanted) if wanted == id)
    }

    /// Whether the vmm was asked to let go of the process.
    pub(super) fn is_releasing(&self) -> bool {
        matches!(self.stage, Stage::Releasing(..))
    }

    /// The vmm has let go: the process is to end, which is no failure, and the next to start.
    pub(super) fn released(&mut self, now: Instant) -> Option<Order> {
        self.replaced(now, "it was replaced by another build")
    }

    /// Another process is wanted in the place of the one that serves, if one does.
    pub(super) fn renew(&mut self, now: Instant, why: &str) -> Option<Order> {
        let serves = self.stage == Stage::Serving;
        serves.then(|| self.replaced(now, why)).flatten()
    }

    fn replaced(&mut self, now: Instant, why: &str) -> Option<Order> {
        self.planned = true;
        self.told = true;
        self.condemn(now, why)
    }

    /// The guest has been told, or is to be, that there is no device any more.
    pub(super) fn is_lost(&self) -> bool {
        self.stage == Stage::Lost
    }

    /// Time served, and time passed, make up for failures.
    fn forgive(&mut self, now: Instant) {
        if self.stage == Stage::Serving {
            let served = now.duration_since(self.since).as_millis() / HEALTHY.as_millis();
            self.failures = self
                .failures
                .saturating_sub(u32::try_from(served).unwrap_or(u32::MAX));
        }
        let seconds = now.duration_since(self.forgiven).as_secs();
        self.forgiven += Duration::from_secs(seconds);
        self.deaths = self
            .deaths
            .saturating_sub(u32::try_from(seconds).unwrap_or(u32::MAX));
    }

    fn lose(&mut self, how: String) -> Order {
        self.stage = Stage::Lost;
        Order::GiveUp(how + &self.why)
    }
}

#[cfg(test)]
mod tests;
