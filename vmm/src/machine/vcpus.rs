//! vCPU threads and the orders they follow. A thread makes its vCPU, confines itself, and then
//! holds, resets or runs as ordered, once all others are that far; each order but `Run` and `Quit`
//! is answered.

use super::events::{Events, GuestEvent};
use super::exits::{ExitCounters, Platform};
use crate::error::Error;
use crate::kvm::{Entry, Kicker, Vcpu, Vm};
use jailer::clock::monotonic_ns;
use jailer::sandbox::{Role, SeccompMode, lockdown_thread};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest that a vCPU thread may take to answer an order.
const ANSWER: Duration = Duration::from_secs(5);

#[derive(Clone)]
enum Order {
    Hold,
    Reset,
    Run(Entry, Arc<Platform>),
    Quit,
}

struct State {
    order: Order,
    number: u64,
    answers: usize,
    /// Threads that have not yet made and confined their vCPU: until then no order is followed.
    starting: usize,
    /// When the last of them was that far.
    ready_ns: u64,
    failure: Option<Error>,
    kickers: Vec<Arc<Kicker>>,
}

struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// All vCPUs of the machine.
pub(super) struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
    counters: Vec<Arc<ExitCounters>>,
    seccomp: SeccompMode,
}

struct Thread {
    index: u8,
    gate: Arc<Gate>,
    events: Arc<Events>,
    counters: Arc<ExitCounters>,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an order newer than `seen`.
    fn next(&self, seen: u64) -> (u64, Order) {
        let state = self
            .changed
            .wait_while(self.lock(), |state| state.number == seen || state.starting > 0)
            .unwrap_or_else(PoisonError::into_inner);
        (state.number, state.order.clone())
    }

    /// A vCPU exists and its thread is confined.
    fn started(&self) {
        let mut state = self.lock();
        state.starting -= 1;
        if state.starting == 0 {
            state.ready_ns = monotonic_ns();
            self.changed.notify_all();
        }
    }

    fn fail(&self, error: Error) {
        self.lock().failure.get_or_insert(error);
        self.changed.notify_all();
    }

    fn answer(&self, result: Result<(), Error>) {
        let mut state = self.lock();
        state.answers += 1;
        if let Err(error) = result {
            state.failure.get_or_insert(error);
        }
        self.changed.notify_all();
    }
}

impl Vcpus {
    /// Starts one thread a vCPU; they make their vCPUs while the caller goes on. Follow with
    /// [`Vcpus::ready`].
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub(super) fn spawn(vm: &Arc<Vm>, events: &Arc<Events>, seccomp: SeccompMode) -> Result<Self, Error> {
        let gate = Arc::new(Gate {
            state: Mutex::new(State {
                order: Order::Hold,
                number: 0,
                answers: 0,
                starting: usize::from(vm.cpus()),
                ready_ns: 0,
                failure: None,
                kickers: Vec::new(),
            }),
            changed: Condvar::new(),
        });
        let mut vcpus = Self {
            gate: gate.clone(),
            threads: Vec::new(),
            counters: Vec::new(),
            seccomp,
        };
        for index in 0..vm.cpus() {
            let counters = Arc::new(ExitCounters::default());
            let thread = Thread {
                index,
                gate: gate.clone(),
                events: events.clone(),
                counters: counters.clone(),
            };
            let vm = vm.clone();
            let handle = std::thread::Builder::new()
                .name(format!("vcpu-{index}"))
                .spawn(move || thread.run(&vm, seccomp))
                .map_err(Error::system("start a vCPU thread"))?;
            vcpus.threads.push(handle);
            vcpus.counters.push(counters);
        }
        Ok(vcpus)
    }

    /// Waits until every vCPU exists and its thread is confined, and says when that was
    /// (CLOCK_MONOTONIC, nanoseconds).
    ///
    /// # Errors
    /// The first thread's failure, or [`Error::VcpuTimeout`].
    pub(super) fn ready(&self) -> Result<u64, Error> {
        self.wait("start", |state| state.starting)?;
        Ok(self.gate.lock().ready_ns)
    }

    /// Enters the guest, once all vCPUs are ready: the boot CPU at `entry`, the others wait for INIT.
    pub(super) fn enter(&self, entry: Entry, platform: Arc<Platform>) {
        self.order(Order::Run(entry, platform));
    }

    /// Gets every vCPU out of the guest and waits until all hold.
    ///
    /// # Errors
    /// [`Error::VcpuTimeout`].
    pub(super) fn hold(&self) -> Result<(), Error> {
        self.order(Order::Hold);
        self.wait_for_answers("stop")
    }

    /// Brings every vCPU to power-on state; they must hold.
    ///
    /// # Errors
    /// KVM's refusal, or [`Error::VcpuTimeout`].
    pub(super) fn reset(&self) -> Result<(), Error> {
        self.order(Order::Reset);
        self.wait_for_answers("reset")
    }

    /// Exits to user space of all vCPUs together, by reason.
    #[must_use]
    pub(super) fn exits(&self) -> Vec<(String, u64)> {
        let mut sums = Vec::new();
        self.counters.iter().for_each(|c| c.add_to(&mut sums));
        sums
    }

    fn order(&self, order: Order) {
        let mut state = self.gate.lock();
        state.order = order;
        state.number += 1;
        state.answers = 0;
        self.gate.changed.notify_all();
        state.kickers.iter().for_each(|kicker| kicker.kick());
    }

    fn wait_for_answers(&self, what: &'static str) -> Result<(), Error> {
        let all = self.threads.len();
        self.wait(what, |state| all.saturating_sub(state.answers))
    }

    /// Waits until `missing` says that no thread is.
    fn wait(&self, what: &'static str, missing: impl Fn(&State) -> usize) -> Result<(), Error> {
        let deadline = Instant::now() + ANSWER;
        let mut state = self.gate.lock();
        while missing(&state) > 0 && state.failure.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let cpu = (self.threads.len() - missing(&state)) as u8;
                return Err(Error::VcpuTimeout { cpu, what });
            }
            (state, _) = self
                .gate
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.failure.take().map_or(Ok(()), Err)
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        if self.seccomp != SeccompMode::Off {
            // The policy has no call to end a thread with: the end of the process does it.
            return self.order(Order::Hold);
        }
        self.order(Order::Quit);
        for thread in self.threads.drain(..) {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

impl Thread {
    fn run(self, vm: &Vm, seccomp: SeccompMode) {
        let mut vcpu = match self.start(vm, seccomp) {
            Ok(vcpu) => vcpu,
            Err(error) => return self.gate.fail(error),
        };
        self.gate.started();
        let mut seen = 0;
        loop {
            let (number, order) = self.gate.next(seen);
            seen = number;
            match order {
                Order::Hold => self.gate.answer(Ok(())),
                Order::Reset => self.gate.answer(vcpu.reset()),
                Order::Quit => return,
                Order::Run(entry, platform) => {
                    if let Some(event) = self.enter(&mut vcpu, &entry, &platform, seen) {
                        tracing::debug!(cpu = self.index, ?event, "boot over");
                        self.events.tell_guest(event);
                    }
                }
            }
        }
    }

    fn start(&self, vm: &Vm, seccomp: SeccompMode) -> Result<Vcpu, Error> {
        let vcpu = vm.create_vcpu(self.index)?;
        self.gate.lock().kickers.push(vcpu.kicker());
        lockdown_thread(Role::Vcpu, seccomp).map_err(|e| Error::Lockdown(Box::new(e)))?;
        Ok(vcpu)
    }

    /// Runs the guest until order `number` is no longer the last one or this boot ends.
    fn enter(&self, vcpu: &mut Vcpu, entry: &Entry, platform: &Platform, number: u64) -> Option<GuestEvent> {
        if self.index == 0
            && let Err(error) = vcpu.enter_at(entry)
        {
            return Some(GuestEvent::KvmFailure(format!("{error}: {}", error.cause())));
        }
        loop {
            vcpu.acknowledge_kick();
            if self.gate.lock().number != number {
                return None;
            }
            loop {
                match vcpu.run() {
                    Ok(exit) => {
                        if let Some(event) = platform.handle(exit, &self.counters) {
                            return Some(event);
                        }
                    }
                    Err(error) if error.errno() == libc::EINTR => {
                        self.counters.count_kick();
                        break;
                    }
                    Err(error) if error.errno() == libc::EAGAIN => {}
                    Err(error) => return Some(GuestEvent::KvmFailure(format!("KVM_RUN: {error}"))),
                }
            }
        }
    }
}
