//! The supervisor: relays the console and the logs, holds the deadlines, and decides how the VM
//! ended. It is jailed: it asks the spawner for what it cannot do itself.
//!
//! ```text
//!   Running --person--> PoweringOff --grace--> Stopping --+
//!      |  \--person, before the guest runs---> Stopping --+
//!      |  \--what cannot be replaced is lost-> Stopping --+--> WindingDown --> Finished
//!      +------------------- Ended(reason) ----------------+    (all exited, or killed)
//! ```

mod audience;
mod clients;
mod console;
mod devices;
mod hearing;
mod logs;
mod orders;
mod outcome;
mod plug;
#[cfg(test)]
mod plug_tests;
mod quota;
mod ready;
mod recovery;
mod remote;
mod taps;
#[cfg(test)]
mod tests;
mod upgrade;

use crate::escape::Command;
use crate::inherit;
use crate::sandbox::{self, LockdownError, Locked, Role, SeccompMode};
use crate::tell::{name_vm, speak_json};
use crate::wire::{Received, TransferError, receive_message, send_message};
use clients::Clients;
pub use clients::{MOST_CLIENTS, NO_REQUEST};
use console::Console;
use devices::Counters;
use logs::{Log, LogPipe};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use orders::Orders;
use outcome::Outcome;
use plug::{Membership, Plugs};
use quota::Quota;
use ready::Ready;
use recovery::Recovery;
use remote::Remote;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use taps::Tap;
use upgrade::Upgrade;
use vm_spec::control::{FdNumber, ToVmm, exit_code};
use vm_spec::spec::OnDeviceDeath;
use vm_spec::supervise::{FromSupervisor, SupervisedProcess, SupervisorConfig, ToSupervisor};

/// The spawner's first message comes within this time.
const CONFIG_DEADLINE: Duration = Duration::from_secs(5);
/// A vmm that was asked to stop, and every process once the VM is over, ends within this time.
/// Below the 2 s within which nothing may be left.
const EXIT_DEADLINE: Duration = Duration::from_millis(1500);
/// A device process that exits with code 0 has seen its socket close: the vmm, which closed it, has
/// this long to say why.
const EXPLANATION_DEADLINE: Duration = Duration::from_millis(500);
/// A guest that was asked to power off is asked again after this time: one that boots may not have heard.
const PRESS_AGAIN: Duration = Duration::from_secs(2);
/// A reader of our output has this long to take the last of it.
const DRAIN_DEADLINE: Duration = Duration::from_millis(500);

/// Lines and events that the vmm may cause within [`VMM_PERIOD`], besides those that are told once: one of each
/// device, and some.
const VMM_LINES: u32 = 64;
/// See [`VMM_LINES`].
const VMM_PERIOD: Duration = Duration::from_secs(10);

/// Why the supervisor cannot work.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// The first message did not come.
    #[error("the spawner sent no configuration")]
    NoConfig,
    /// The spawner is gone. The reaper says so.
    #[error("the spawner is gone")]
    SpawnerGone,
    /// The control socket failed.
    #[error("cannot talk to the spawner")]
    Spawner(#[from] TransferError),
    /// A descriptor that the configuration names.
    #[error("descriptor {0} was not inherited")]
    Descriptor(i32, #[source] io::Error),
    /// The jail.
    #[error(transparent)]
    Lockdown(#[from] LockdownError),
    /// Waiting.
    #[error("poll")]
    Poll(#[source] io::Error),
}

/// Reads the configuration from descriptor 3, locks itself down, and serves until the VM is over.
///
/// # Errors
/// Any [`SupervisorError`]; the spawner then ends the VM.
pub fn run(mode: SeccompMode) -> Result<(), SupervisorError> {
    let spawner = take(FdNumber(3))?;
    let config = first_message(&spawner)?;
    let supervisor = Supervisor::new(spawner, config)?;
    let locked = sandbox::lockdown(Role::Supervisor, mode)?;
    supervisor.serve(&locked)
}

fn take(number: FdNumber) -> Result<OwnedFd, SupervisorError> {
    inherit::take(number).map_err(|e| SupervisorError::Descriptor(number.0, e))
}

fn first_message(spawner: &OwnedFd) -> Result<SupervisorConfig, SupervisorError> {
    let mut ready = [PollFd::new(spawner.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(CONFIG_DEADLINE).unwrap_or(PollTimeout::MAX);
    poll(&mut ready, timeout).map_err(|e| SupervisorError::Poll(e.into()))?;
    match receive_message(spawner.as_fd())? {
        Received::Message(_, ToSupervisor::Start(config)) => Ok(*config),
        // The launcher failed, and says in what.
        Received::End => Err(SupervisorError::SpawnerGone),
        _ => Err(SupervisorError::NoConfig),
    }
}

/// Where the VM is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// From the start until someone wants the end.
    Running,
    /// The guest was asked to power off, may take until then, and is asked again at times.
    PoweringOff { until: Instant, press: Instant },
    /// The vmm was told to stop.
    Stopping(Instant),
    /// The VM is over; its processes exit.
    WindingDown(Instant),
    /// The spawner was asked to kill what is left.
    Killing(Instant),
}

struct Process {
    about: SupervisedProcess,
    log: LogPipe,
    alive: bool,
    recovery: Recovery,
    counters: Counters,
    /// Of events that it tells of itself.
    told: Quota,
    /// Requests that the guest had under way when the latest back end was lost.
    outstanding: u32,
    upgrade: Option<Upgrade>,
    orders: Option<Orders>,
    tap: Tap,
    membership: Membership,
}

struct Supervisor {
    spawner: OwnedFd,
    vmm: Option<OwnedFd>,
    console: Console,
    clients: Clients,
    processes: Vec<Process>,
    remotes: Vec<Remote>,
    connector: Option<OwnedFd>,
    plugs: Plugs,
    log: Log,
    grace: Duration,
    phase: Phase,
    outcome: Option<Outcome>,
    /// What to conclude at that time, unless the vmm explains it before.
    suspicion: Option<(Instant, Outcome)>,
    requests: u64,
    /// Of what the vmm may have us say.
    vmm_words: Quota,
    on_device_death: OnDeviceDeath,
    /// The vmm has every device's first back end.
    guest_runs: bool,
    /// By a signal.
    vmm_stopped: bool,
}

impl Supervisor {
    fn new(spawner: OwnedFd, config: SupervisorConfig) -> Result<Self, SupervisorError> {
        let now = Instant::now();
        if config.log_json {
            speak_json();
            name_vm(&config.name);
        }
        let console = Console::new(
            take(config.console)?,
            config.input.map(take).transpose()?,
            config.output.map(take).transpose()?,
            config.escape,
        );
        let processes = config
            .processes
            .into_iter()
            .map(|about| {
                Ok(Process {
                    log: LogPipe::new(about.name.clone(), take(about.log)?, now),
                    orders: about.orders.map(take).transpose()?.map(Orders::new),
                    about,
                    alive: true,
                    recovery: Recovery::new(now),
                    counters: Counters::new(),
                    told: devices::of_telling(now),
                    outstanding: 0,
                    upgrade: None,
                    tap: Tap::Present,
                    membership: Membership::Member,
                })
            })
            .collect::<Result<_, SupervisorError>>()?;
        Ok(Self {
            spawner,
            vmm: Some(take(config.vmm)?),
            console,
            clients: Clients::new(take(config.clients)?),
            processes,
            remotes: config
                .remotes
                .into_iter()
                .map(|about| Remote::new(about, now))
                .collect(),
            connector: config.connector.map(take).transpose()?,
            plugs: Plugs::new(config.spares),
            log: Log::new(config.log_json),
            grace: Duration::from_secs(config.power_off_grace.into()),
            phase: Phase::Running,
            outcome: None,
            suspicion: None,
            requests: 0,
            vmm_words: Quota::new(VMM_LINES, VMM_PERIOD, now),
            on_device_death: config.on_device_death,
            guest_runs: false,
            vmm_stopped: false,
        })
    }

    fn serve(mut self, _locked: &Locked) -> Result<(), SupervisorError> {
        while self.processes.iter().any(|p| p.alive) {
            let deadlines = [
                self.deadline(),
                self.devices_deadline(),
                self.remotes_deadline(),
                self.clients.deadline(),
                self.orders_deadline(),
                self.plugs_deadline(),
            ];
            self.wait(deadlines.into_iter().flatten().min())?;
            let now = Instant::now();
            self.note_told(now);
            // The vmm first: its own account of the end comes before what the end of its sockets
            // does to the devices.
            self.hear_vmm(hearing::MESSAGES_A_TURN, now);
            self.hear_spawner(now)?;
            self.hear_clients(now);
            self.hear_orders(now);
            self.hear_connector(now);
            self.judge_devices(now);
            self.judge_remotes(now);
            self.judge_plugs(now);
            self.judge_deadlines(now);
        }
        self.finish()
    }

    /// Waits for any event or `deadline`, and serves console and logs.
    fn wait(&mut self, deadline: Option<Instant>) -> Result<(), SupervisorError> {
        let timeout = deadline.map_or(PollTimeout::NONE, |at| {
            // One more millisecond, so that the deadline has passed when poll returns.
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let ready = Ready::poll(self, timeout)?;
        // Not before: a wait may have been long, and deadlines count from here.
        let now = Instant::now();
        let command = ready.input.then(|| self.console.read_input()).flatten();
        if ready.guest_readable {
            self.console.read_guest();
        }
        self.console.serve_listeners(&ready.console_listeners);
        // What was just read goes on at once, where it can.
        if ready.guest_writable {
            self.console.write_guest();
        }
        if ready.output
            && let Some(why) = self.console.write_output()
        {
            self.say(&format!(
                "standard output has no room: what the guest writes is lost: {why}"
            ));
        }
        for (process, readable) in self.processes.iter_mut().zip(ready.logs) {
            if readable {
                process.log.read(&mut self.log, now);
            }
        }
        self.log.audience.serve(&ready.log_listeners, None);
        if command == Some(Command::Leave) {
            self.conclude(Outcome {
                code: exit_code::POWER_OFF,
                line: None,
            });
            self.stop_vmm(now);
        }
        Ok(())
    }

    fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Running => None,
            Phase::PoweringOff { until, press } => Some(until.min(press)),
            Phase::Stopping(at) | Phase::WindingDown(at) | Phase::Killing(at) => Some(at),
        }
    }

    fn judge_deadlines(&mut self, now: Instant) {
        if let Some((_, outcome)) = self.suspicion.take_if(|(at, _)| now >= *at)
            && self.outcome.is_none()
        {
            self.conclude(outcome);
            self.stop_vmm(now);
        }
        if self.deadline().is_none_or(|at| now < at) {
            return;
        }
        match self.phase {
            Phase::Running => {}
            Phase::PoweringOff { until, .. } if now < until => self.press_power_button(until, now),
            Phase::PoweringOff { .. } => {
                let grace = self.grace.as_secs();
                self.conclude(Outcome {
                    code: exit_code::TIMEOUT,
                    line: Some(format!("the guest did not power off within {grace} s")),
                });
                self.stop_vmm(now);
            }
            Phase::Stopping(_) | Phase::WindingDown(_) => {
                let late: Vec<&str> = self
                    .processes
                    .iter()
                    .filter(|p| p.alive)
                    .map(|p| p.about.name.as_str())
                    .collect();
                self.say(&format!("{} did not exit in time: killed", late.join(", ")));
                self.conclude(Outcome {
                    code: exit_code::TIMEOUT,
                    line: None,
                });
                self.tell_spawner(FromSupervisor::KillAll);
                self.phase = Phase::Killing(now + EXIT_DEADLINE);
            }
            // The spawner does not answer: leaving makes it end everything.
            Phase::Killing(_) => self.processes.iter_mut().for_each(|p| p.alive = false),
        }
    }

    /// The first reason stands; what follows from it does not replace it.
    fn conclude(&mut self, outcome: Outcome) {
        if self.outcome.is_none() {
            if let Some(line) = &outcome.line {
                self.say(line);
            }
            self.outcome = Some(outcome);
            self.suspicion = None;
        }
    }

    fn power_off(&mut self, now: Instant) {
        if self.phase != Phase::Running {
            return;
        }
        if self.guest_runs {
            return self.press_power_button(now + self.grace, now);
        }
        self.conclude(Outcome {
            code: exit_code::ERROR,
            line: Some("the VM was stopped before its guest ran".to_owned()),
        });
        self.stop_vmm(now);
    }

    fn press_power_button(&mut self, until: Instant, now: Instant) {
        self.tell_vmm(ToVmm::PowerButton);
        let press = now + PRESS_AGAIN;
        self.phase = Phase::PoweringOff { until, press };
    }

    fn stop_vmm(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Running | Phase::PoweringOff { .. }) {
            self.tell_vmm(ToVmm::Stop);
            self.phase = Phase::Stopping(now + EXIT_DEADLINE);
        }
    }

    fn wind_down(&mut self, now: Instant) {
        if !matches!(self.phase, Phase::WindingDown(_) | Phase::Killing(_)) {
            self.phase = Phase::WindingDown(now + EXIT_DEADLINE);
        }
    }

    /// A vmm that cannot be told is either gone, which is heard, or stuck, which its deadline ends.
    fn tell_vmm(&mut self, message: ToVmm) {
        self.requests += 1;
        if let Some(vmm) = &self.vmm
            && let Err(error) = send_message(vmm.as_fd(), self.requests, message)
        {
            self.say(&format!("cannot tell the vmm: {error}"));
        }
    }

    /// False: it was not told. One that is stopped hears it when it goes on.
    fn tell_spawner(&mut self, message: FromSupervisor) -> bool {
        let told = send_message(self.spawner.as_fd(), 0, message);
        if let Err(error) = &told {
            self.say(&format!("cannot tell the spawner: {error}"));
        }
        told.is_ok()
    }

    fn say(&mut self, text: &str) {
        for line in text.lines() {
            self.log.line("bulkhead", line);
        }
    }

    /// Passes the last output on, and leaves.
    fn finish(mut self) -> Result<(), SupervisorError> {
        let now = Instant::now();
        let deadline = now + DRAIN_DEADLINE;
        for process in &mut self.processes {
            process.log.read(&mut self.log, now);
        }
        while !(self.console.drained() && self.log.audience.drained()) && Instant::now() < deadline {
            self.wait(Some(deadline))?;
        }
        let code = self.outcome.as_ref().map_or(exit_code::ERROR, |o| o.code);
        self.tell_spawner(FromSupervisor::Finished { code });
        Ok(())
    }
}
