//! What the spawner and the vmm tell the supervisor.

use super::devices::shortened;
use super::outcome::{Outcome, SIGSYS};
use super::{EXPLANATION_DEADLINE, Phase, Supervisor, SupervisorError};
use crate::wire::{Received, receive_message};
use crate::wire_fds::receive_with_fds;
use std::os::fd::AsFd;
use std::time::Instant;
use vm_spec::control::{FromVmm, exit_code};
use vm_spec::run_state::ProcessRole;
use vm_spec::supervise::{ExitStatus, FromSupervisor, ToSupervisor};

/// Most messages that are heard of one peer before the others get their turn; the rest wakes again.
pub(super) const MESSAGES_A_TURN: usize = 64;
/// Of one whose word matters before a death is judged: more than its socket holds.
const LAST_MESSAGES: usize = 4096;

impl Supervisor {
    pub(super) fn hear_spawner(&mut self, now: Instant) -> Result<(), SupervisorError> {
        for _ in 0..MESSAGES_A_TURN {
            let (received, fds) = receive_with_fds(self.spawner.as_fd())?;
            match received {
                Received::Nothing => break,
                Received::End => return Err(SupervisorError::SpawnerGone),
                Received::Message(_, ToSupervisor::Start(_)) => {}
                Received::Message(_, ToSupervisor::PowerOff) => self.power_off(now),
                Received::Message(_, ToSupervisor::Exited { process, status }) => {
                    self.process_ended(process.into(), status, now);
                }
                Received::Message(_, ToSupervisor::Stopped { process, stopped }) => {
                    self.process_stopped(process.into(), stopped, now);
                }
                Received::Message(_, ToSupervisor::Respawned { process, pid }) => {
                    self.device_spawned(process.into(), pid, &fds, now);
                }
                Received::Message(_, ToSupervisor::Killed { process }) => {
                    if let Some(process) = self.processes.get_mut(usize::from(process)) {
                        process.recovery.killed(now);
                    }
                }
                Received::Message(_, ToSupervisor::Removed { process }) => {
                    self.process_removed(process.into(), now);
                }
                Received::Message(_, ToSupervisor::NotRespawned { process, why }) => {
                    self.device_not_spawned(process.into(), &why, now);
                }
            }
        }
        Ok(())
    }

    pub(super) fn process_ended(&mut self, index: usize, status: ExitStatus, now: Instant) {
        // What the vmm said before this happened counts first.
        self.hear_vmm(LAST_MESSAGES, now);
        let Some(process) = self.processes.get_mut(index) else {
            return;
        };
        process.alive = false;
        process.log.read(&mut self.log, now);
        let is_device = process.about.role.is_device();
        // What it told of was so before its end.
        self.note_told(now);
        if self.is_apart(index) {
            let line = Outcome::of_process(&self.processes[index].about, status).line;
            self.apart_ended(
                index,
                &line.unwrap_or_else(|| "its process ended".to_owned()),
                now,
            );
            return;
        }
        if is_device && self.restarts_devices() && (self.guest_runs || was_killed(status)) {
            return self.device_ended(index, status, now);
        }
        if self.outcome.is_some() {
            return;
        }
        let process = &self.processes[index];
        let mut outcome = Outcome::of_process(&process.about, status);
        if !self.guest_runs {
            outcome = outcome.at_start(&process.about);
        }
        if process.about.role == ProcessRole::Vmm {
            self.conclude(outcome);
            self.wind_down(now);
        } else if status == ExitStatus::Code(0) {
            self.suspicion
                .get_or_insert((now + EXPLANATION_DEADLINE, outcome));
        } else {
            self.conclude(outcome);
            self.stop_vmm(now);
        }
    }

    /// At most `most` messages; the rest wakes again.
    pub(super) fn hear_vmm(&mut self, most: usize, now: Instant) {
        for _ in 0..most {
            let Some(vmm) = &self.vmm else { return };
            match receive_message(vmm.as_fd()) {
                Ok(Received::Nothing) => return,
                Ok(Received::End) => self.vmm = None,
                Ok(Received::Message(id, message)) => self.vmm_says(id, message, now),
                Err(error) => {
                    self.conclude(Outcome {
                        code: exit_code::ERROR,
                        line: Some(format!("the vmm broke the control protocol: {error}")),
                    });
                    self.vmm = None;
                    self.wind_down(now);
                }
            }
        }
    }

    fn vmm_says(&mut self, id: u64, message: FromVmm, now: Instant) {
        match message {
            FromVmm::Running {
                started_ns,
                first_instruction_ns,
            } => {
                if std::mem::replace(&mut self.guest_runs, true) {
                    return;
                }
                self.tell_spawner(FromSupervisor::Running {
                    started_ns,
                    first_instruction_ns,
                });
            }
            FromVmm::BackendLost {
                device,
                generation,
                loss,
                outstanding,
                reason,
            } => {
                let reason = shortened(&reason);
                match self.processes.iter().position(|p| p.about.name == device) {
                    Some(index) if self.needs_devices() => {
                        self.processes[index].outstanding = outstanding;
                        self.device_lost(index, generation, loss, &reason, now);
                    }
                    // The end of a process of ours is told by whoever reaps it, with its cause.
                    Some(_) => {}
                    None => {
                        if let Some(index) = self.remote(&device) {
                            self.remote_lost(index, generation, outstanding, &reason, now);
                        }
                    }
                }
            }
            FromVmm::DeviceFault { device, reason } => self.device_faulted(&device, &shortened(&reason), now),
            FromVmm::Error { what, cause, hint } => {
                let what = shortened(&what);
                let mut lines = match self.guest_runs {
                    true => format!("the VM cannot go on: {what}"),
                    false => what,
                };
                for (name, text) in [("cause", cause), ("hint", hint)] {
                    if !text.is_empty() {
                        lines.push_str(&format!("\n  {name}: {}", shortened(&text)));
                    }
                }
                self.conclude(Outcome {
                    code: exit_code::ERROR,
                    line: Some(lines),
                });
                self.wind_down(now);
            }
            FromVmm::Ended(reason) => {
                self.conclude(Outcome::of_guest(reason));
                self.wind_down(now);
            }
            FromVmm::Failed(why) => {
                let why = shortened(&why);
                if !self.device_answered(id, Err(&why), now) && self.may_vmm_speak(now) {
                    self.say(&format!("the vmm refused a request: {why}"));
                }
            }
            FromVmm::Done => {
                self.device_answered(id, Ok(()), now);
            }
            FromVmm::Detached { slot } => self.device_detached(slot, now),
            FromVmm::Rebooted => {
                // The guest that was asked is no more.
                if let Phase::PoweringOff { press, .. } = &mut self.phase {
                    *press = now;
                }
            }
            FromVmm::Stats(_) => {}
        }
    }

    /// Whether one more line that only the vmm has caused is told: it may have been broken into.
    pub(super) fn may_vmm_speak(&mut self, now: Instant) -> bool {
        let may = self.vmm_words.take(now);
        if self.vmm_words.is_just_spent() {
            self.say("the vmm says too much: some of it is left out");
        }
        may
    }
}

/// A process that exits by itself before the guest runs cannot serve (its image is refused, say),
/// nor can one that its filter stopped: another would do no better.
fn was_killed(status: ExitStatus) -> bool {
    match status {
        ExitStatus::Signal(signal) => signal != SIGSYS,
        ExitStatus::OutOfMemory => true,
        ExitStatus::Code(_) => false,
    }
}
