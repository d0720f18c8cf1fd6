//! The spawner after every process runs: it reaps and reports, passes signals on, kills when
//! told or when nobody is left to tell it, and ends last. Before it reads the first message it gives
//! up whatever else it could do: its filter is `spawner.policy`, and the forker makes processes for it.

use super::children::{Change, Worker, describe, next_change};
use super::forker::Forker;
use super::respawn::Respawner;
use super::signals::ENDING;
use super::spawn::Running;
use crate::failure::Failure;
use crate::sandbox::lockdown_spawner;
use crate::tell::tell;
use crate::wire::{Received, TransferError, send_message};
use crate::wire_fds::{receive_with_fds, send_with_fds};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::SignalFd;
use nix::unistd::Pid;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use vm_spec::control::exit_code;
use vm_spec::events::VmEvent;
use vm_spec::supervise::{AddedProcess, Build, ExitStatus, FromSupervisor, MOST_PROCESSES, ToSupervisor};

/// Messages of the supervisor's that are heard before signals and deaths get their turn.
const MESSAGES_A_TURN: usize = 64;
/// Of one that is dead, or about to be: more than its socket holds.
const LAST_MESSAGES: usize = 4096;
/// The supervisor, which keeps the deadlines, has this long beyond the guest's grace; then the
/// spawner ends everything without it.
const SUPERVISOR_GRACE: Duration = Duration::from_secs(5);
/// Killed processes are reaped within this time, or left to init.
const REAP_DEADLINE: Duration = Duration::from_secs(2);
/// What comes within this time of the first request is the same one: `timeout` and some shells signal a process and
/// then its group.
const ONE_REQUEST: Duration = Duration::from_millis(500);

/// What the loop tells its caller about.
pub(crate) enum Event<'a> {
    /// The guest runs.
    Running {
        started_ns: u64,
        first_instruction_ns: u64,
    },
    /// There is a forker from here on.
    Forked(Pid),
    /// A device's process has a successor.
    Respawned { predecessor: Pid, pid: Pid },
    /// There is one more process, who it is by its place among the VM's ids.
    Added {
        plan: Box<AddedProcess>,
        place: usize,
        pid: Pid,
    },
    /// A device's process has ended for good; set the process that held its NIC's namespace, which may end now.
    Removed {
        name: &'a str,
        holder: &'a mut Option<Pid>,
    },
    /// A process was ended by a signal; set what is known of why.
    Signalled(Pid, u8, &'a mut ExitStatus),
    /// The guest was asked to power off, or the VM is over; told once.
    Ending,
    /// To be written down.
    Happened(VmEvent),
}

/// The loop's state.
pub(crate) struct Spawner {
    /// By place in the plan, then those that were added.
    workers: Vec<Worker>,
    /// How many the plan has.
    planned: usize,
    /// Until there is a forker.
    respawner: Option<Respawner>,
    /// From the first message on, until it ends.
    forker: Option<Forker>,
    /// Everything was to be killed: nothing is started any more.
    ending: bool,
    supervisor: Option<Pid>,
    /// Processes whose end ends the VM: the reaper, the holders of network namespaces.
    guards: Vec<(Pid, &'static str)>,
    control: Option<std::os::fd::OwnedFd>,
    signals: SignalFd,
    code: Option<u8>,
    /// When the spawner stops waiting for the supervisor.
    deadline: Option<Instant>,
    grace: Duration,
    /// Since when the guest is asked to power off.
    asked: Option<Instant>,
    told_ending: bool,
}

impl Spawner {
    pub(crate) fn new(
        running: Running,
        guards: Vec<(Pid, &'static str)>,
        signals: SignalFd,
        grace: Duration,
    ) -> Self {
        let Running {
            workers,
            supervisor,
            control,
            respawner,
        } = running;
        Self {
            planned: workers.len(),
            workers: workers.iter().map(|child| Worker::running(child.pid)).collect(),
            respawner: Some(respawner),
            forker: None,
            ending: false,
            supervisor: Some(supervisor.pid),
            guards,
            control: Some(control),
            signals,
            code: None,
            deadline: None,
            grace,
            asked: None,
            told_ending: false,
        }
    }

    /// Serves until the supervisor is gone, then ends what is left. Returns the exit code.
    pub(crate) fn serve(mut self, on_event: &mut dyn FnMut(Event<'_>)) -> u8 {
        while self.supervisor.is_some() {
            if let Err(error) = self.wait() {
                tell(format_args!("bulkhead: the spawner cannot wait: {error}"));
                break;
            }
            if let Err(failure) = self.confine(on_event) {
                tell(format_args!("bulkhead: {failure}"));
                break;
            }
            self.hear_supervisor(MESSAGES_A_TURN, on_event);
            self.take_signals();
            self.tell_ending(on_event);
            self.reap(on_event);
            if self.deadline.is_some_and(|at| Instant::now() >= at) {
                tell(format_args!("bulkhead: the VM did not end in time: killed"));
                self.code.get_or_insert(exit_code::TIMEOUT);
                break;
            }
        }
        self.hear_supervisor(LAST_MESSAGES, on_event);
        self.kill_all();
        self.tell_ending(on_event);
        if let Some(pid) = self.supervisor {
            let _ = kill(pid, Signal::SIGKILL);
        }
        self.reap_rest(on_event);
        if let Some(forker) = self.forker.take() {
            forker.end();
        }
        self.code.unwrap_or(exit_code::ERROR)
    }

    /// At the first call: leaves the making of processes to the forker, and gives up all that it takes.
    fn confine(&mut self, on_event: &mut dyn FnMut(Event)) -> Result<(), Failure> {
        let Some(respawner) = self.respawner.take() else {
            return Ok(());
        };
        let seccomp = respawner.seccomp();
        let forker = Forker::start(respawner)?;
        self.guards.push((forker.pid, "forker"));
        on_event(Event::Forked(forker.pid));
        self.forker = Some(forker);
        lockdown_spawner(seccomp).map_err(|e| Failure::host("cannot confine the spawner").because(&e))
    }

    fn wait(&self) -> nix::Result<()> {
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        fds.extend(
            self.control
                .as_ref()
                .map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)),
        );
        let timeout = self.deadline.map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// At most `most` messages; the rest wakes again.
    fn hear_supervisor(&mut self, most: usize, on_event: &mut dyn FnMut(Event<'_>)) {
        for _ in 0..most {
            let Some(control) = &self.control else { return };
            match receive_with_fds(control.as_fd()) {
                Ok((Received::Nothing, _)) => return,
                Ok((Received::Message(_, message), mut fds)) => match message {
                    FromSupervisor::Running {
                        started_ns,
                        first_instruction_ns,
                    } => on_event(Event::Running {
                        started_ns,
                        first_instruction_ns,
                    }),
                    FromSupervisor::Respawn { process, build } => self.respawn(process, build, on_event),
                    FromSupervisor::Candidate { process } => {
                        if let (Some(forker), Some(binary)) = (&self.forker, fds.pop()) {
                            forget(forker.keep_candidate(process, binary.as_fd()));
                        }
                    }
                    FromSupervisor::Adopt { process } => {
                        if let Some(forker) = &self.forker {
                            forget(forker.adopt(process));
                        }
                    }
                    FromSupervisor::Tap { process } => {
                        if let Some(forker) = &self.forker {
                            forget(forker.keep_tap(process, &fds));
                        }
                    }
                    FromSupervisor::Add { process, plan } => self.add(process, plan, &fds),
                    FromSupervisor::Remove { process, name } => self.remove(process, &name, on_event),
                    FromSupervisor::Kill { process } => {
                        self.kill_one(process);
                        self.tell(ToSupervisor::Killed { process });
                    }
                    FromSupervisor::Event(event) => on_event(Event::Happened(event)),
                    FromSupervisor::KillAll => self.kill_all(),
                    FromSupervisor::Finished { code } => {
                        self.code.get_or_insert(code);
                    }
                },
                // Its death is heard as a signal; a supervisor that breaks the protocol is ended.
                Ok((Received::End, _)) => {
                    self.control = None;
                    self.end_within(SUPERVISOR_GRACE);
                }
                Err(error) => {
                    tell(format_args!(
                        "bulkhead: the supervisor broke the control protocol: {error}"
                    ));
                    self.control = None;
                    self.end_within(SUPERVISOR_GRACE);
                    if let Some(pid) = self.supervisor {
                        let _ = kill(pid, Signal::SIGKILL);
                    }
                }
            }
        }
    }

    fn tell_ending(&mut self, on_event: &mut dyn FnMut(Event<'_>)) {
        let ends = self.asked.is_some() || self.ending || self.code.is_some();
        if ends && !std::mem::replace(&mut self.told_ending, true) {
            on_event(Event::Ending);
        }
    }

    fn take_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let Some(signal) = ENDING.into_iter().find(|s| *s as u32 == info.ssi_signo) else {
                continue;
            };
            let now = Instant::now();
            match self.asked {
                None => {
                    self.asked = Some(now);
                    self.end_within(self.grace + SUPERVISOR_GRACE);
                    self.tell(ToSupervisor::PowerOff);
                }
                // A terminal that is closed hangs up twice: by its shell, and by itself.
                Some(first) if signal == Signal::SIGHUP || now < first + ONE_REQUEST => {}
                Some(_) => {
                    tell(format_args!("bulkhead: asked twice: the VM is killed"));
                    // The number fits: signals end at 64.
                    self.code.get_or_insert(128 + signal as u8);
                    self.kill_all();
                }
            }
        }
    }

    /// Reaps every child that has ended.
    fn reap(&mut self, on_event: &mut dyn FnMut(Event<'_>)) {
        while let Some((pid, change)) = next_change() {
            let mut status = match change {
                Change::Ended(status) => status,
                Change::Stopped(stopped) => {
                    self.tell_stopped(pid, stopped);
                    continue;
                }
            };
            if let ExitStatus::Signal(signal) = status {
                on_event(Event::Signalled(pid, signal, &mut status));
            }
            if let Some(n) = self.workers.iter().position(|w| w.alive() == Some(pid)) {
                self.workers[n].reaped = true;
                // The index fits: a VM has at most 32 devices.
                let process = n as u16;
                self.tell(ToSupervisor::Exited { process, status });
            } else if self.supervisor == Some(pid) {
                self.supervisor = None;
                // Its last message may have come after the last look.
                self.hear_supervisor(LAST_MESSAGES, on_event);
                if self.code.is_none() {
                    let (code, how) = describe(status);
                    tell(format_args!(
                        "bulkhead: the supervisor (pid {pid}) {how}: its VM was ended"
                    ));
                    self.code = Some(code);
                }
            } else if let Some((_, name)) = self.guards.iter().find(|(p, _)| *p == pid) {
                // Its number may be another's from here on.
                self.forker.take_if(|forker| forker.pid == pid);
                if self.code.is_some() {
                    continue;
                }
                let (code, how) = describe(status);
                tell(format_args!(
                    "bulkhead: the {name} (pid {pid}) {how}: its VM was ended"
                ));
                self.code = Some(code);
                // Why is said; the supervisor need not find reasons for what follows, nor be told of it.
                self.control = None;
                if let Some(pid) = self.supervisor {
                    let _ = kill(pid, Signal::SIGKILL);
                }
                self.kill_all();
            }
        }
    }

    fn tell_stopped(&mut self, pid: Pid, stopped: bool) {
        if let Some(n) = self.workers.iter().position(|w| w.alive() == Some(pid)) {
            // The index fits: a VM has at most 32 devices.
            let process = n as u16;
            self.tell(ToSupervisor::Stopped { process, stopped });
        }
    }

    fn tell(&mut self, message: ToSupervisor) {
        let Some(control) = &self.control else { return };
        if let Err(error) = send_message(control.as_fd(), 0, message) {
            // It is gone or stuck; its end, or the deadline, ends the VM.
            tell(format_args!("bulkhead: cannot tell the supervisor: {error}"));
            self.end_within(SUPERVISOR_GRACE);
        }
    }

    /// The supervisor ends by then, or is not waited for.
    fn end_within(&mut self, limit: Duration) {
        let end = Instant::now() + limit;
        self.deadline = Some(self.deadline.map_or(end, |at| at.min(end)));
    }

    /// Starts the successor of a device's process that was reaped. Its sockets go to the
    /// supervisor at once: what the vmm writes waits in one while the jail is built.
    fn respawn(&mut self, process: u16, build: Build, on_event: &mut dyn FnMut(Event<'_>)) {
        let place = usize::from(process);
        let started = match (self.workers.get(place), &self.forker) {
            (Some(worker), Some(forker)) if worker.reaped && !self.ending => forker.successor(process, build),
            _ => Err(Failure::host("it still runs, or the VM ends")),
        };
        let (pid, sockets) = match started {
            Ok(successor) => successor,
            Err(failure) => {
                let why = failure.line();
                return self.tell(ToSupervisor::NotRespawned { process, why });
            }
        };
        let before = std::mem::replace(&mut self.workers[place], Worker::running(pid));
        let message = ToSupervisor::Respawned {
            process,
            pid: pid.as_raw(),
        };
        if let Some(control) = &self.control
            && let Err(error) = send_with_fds(control.as_fd(), 0, message, &sockets)
        {
            tell(format_args!("bulkhead: cannot tell the supervisor: {error}"));
            self.end_within(SUPERVISOR_GRACE);
        }
        on_event(match before.coming {
            Some(plan) => Event::Added {
                plan,
                // The supervisor's is behind the plan's.
                place: place + usize::from(place >= self.planned),
                pid,
            },
            None => Event::Respawned {
                predecessor: before.pid,
                pid,
            },
        });
    }

    /// Makes a place for one more process, which a request for its successor starts.
    fn add(&mut self, process: u16, plan: Box<AddedProcess>, fds: &[OwnedFd]) {
        let place = usize::from(process);
        let free = match self.workers.get(place) {
            Some(worker) => worker.removed,
            None => place == self.workers.len() && place < MOST_PROCESSES,
        };
        let Some(forker) = self.forker.as_ref().filter(|_| free) else {
            return;
        };
        forget(forker.add(process, plan.clone(), fds));
        let worker = Worker {
            coming: Some(plan),
            ..Worker::reaped()
        };
        match self.workers.get_mut(place) {
            Some(free) => *free = worker,
            None => self.workers.push(worker),
        }
    }

    /// A process that was added, or any device's, has no successor.
    fn remove(&mut self, process: u16, name: &str, on_event: &mut dyn FnMut(Event<'_>)) {
        let Some(worker) = self.workers.get_mut(usize::from(process)) else {
            return;
        };
        if worker.reaped && !worker.removed && process > 0 {
            *worker = Worker {
                removed: true,
                ..Worker::reaped()
            };
            if let Some(Err(failure)) = self.forker.as_ref().map(|forker| forker.remove(process)) {
                tell(format_args!("bulkhead: {failure}"));
            }
            let mut holder = None;
            on_event(Event::Removed {
                name,
                holder: &mut holder,
            });
            self.guards.retain(|(pid, _)| Some(*pid) != holder);
            self.tell(ToSupervisor::Removed { process });
        }
    }

    fn kill_one(&self, process: u16) {
        if let Some(pid) = self.workers.get(usize::from(process)).and_then(Worker::alive) {
            // Not reaped, so the number is still this child's. A pid namespace dies with its
            // first process.
            let _ = kill(pid, Signal::SIGKILL);
        }
    }

    fn kill_all(&mut self) {
        self.ending = true;
        for process in 0..self.workers.len() {
            // The index fits: a VM has at most 32 devices.
            self.kill_one(process as u16);
        }
    }

    fn reap_rest(&mut self, on_event: &mut dyn FnMut(Event<'_>)) {
        let deadline = Instant::now() + REAP_DEADLINE;
        while (self.workers.iter().any(|w| !w.reaped) || self.supervisor.is_some())
            && Instant::now() < deadline
        {
            self.deadline = Some(deadline);
            let _ = self.wait();
            while let Ok(Some(_)) = self.signals.read_signal() {}
            self.control = None;
            self.reap(on_event);
        }
    }
}

/// A forker that does not take an order is gone, or will not answer the next: that is told then.
fn forget(sent: Result<(), TransferError>) {
    if let Err(error) = sent {
        tell(format_args!("bulkhead: cannot tell the forker: {error}"));
    }
}
