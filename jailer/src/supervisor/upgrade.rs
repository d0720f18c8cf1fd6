//! Replacing a running device process by another build of it.
//!
//! ```text
//! vmm: release (drains, forgets the socket) -> kill -> spawner: start the new build -> vmm: replace
//!                                                          | does not start, does not fit
//!                                                          +-> spawner: start the old build again
//! ```
//! The old process ends before the new one opens the image: an image is never open in two of them.

use super::Supervisor;
use super::clients::Asker;
use crate::wire_fds::send_with_fd;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;
use vm_spec::client::Answer;
use vm_spec::control::ToVmm;
use vm_spec::events::EventKind;
use vm_spec::supervise::{Build, FromSupervisor};

/// An upgrade under way.
pub(super) struct Upgrade {
    asker: Asker,
    began: Instant,
    /// A process of the new build was asked for.
    tried: bool,
}

/// Why a request for a device fails that has no process any more.
pub(super) fn given_up(device: &str) -> String {
    format!("'{device}' was given up, for as long as the VM lives")
}

impl Supervisor {
    /// Begins; the answer follows.
    ///
    /// # Errors
    /// Why it cannot.
    pub(super) fn upgrade(
        &mut self,
        device: &str,
        binary: &OwnedFd,
        asker: Asker,
        now: Instant,
    ) -> Result<(), String> {
        self.may_change()?;
        let found = self.processes.iter().position(|p| p.about.name == device);
        let device_at = |index: usize| Some((index, self.processes[index].about.slot?));
        let (index, slot) = found
            .and_then(device_at)
            .ok_or_else(|| format!("the VM has no device process '{device}'"))?;
        let id = self.requests + 1;
        let process = &mut self.processes[index];
        if process.recovery.is_lost() {
            return Err(given_up(device));
        }
        if process.upgrade.is_some() || !process.recovery.release(now, id) {
            return Err(format!("'{device}' is not served at the moment: try again"));
        }
        let candidate = FromSupervisor::Candidate {
            // The index fits: a VM has at most 32 devices.
            process: index as u16,
        };
        if let Err(error) = send_with_fd(self.spawner.as_fd(), 0, candidate, binary.as_fd()) {
            self.processes[index].recovery.keep(now);
            return Err(format!("the spawner cannot be told: {error}"));
        }
        if let Err(why) = self.give_to_vmm(id, ToVmm::ReleaseBackend { slot }, &[]) {
            self.processes[index].recovery.keep(now);
            return Err(why);
        }
        self.requests = id;
        self.processes[index].upgrade = Some(Upgrade {
            asker,
            began: now,
            tried: false,
        });
        Ok(())
    }

    /// The vmm let go of a device's back end. Where it could not (`why`), that one is lost too.
    pub(super) fn device_released(&mut self, index: usize, answer: Result<(), &str>, now: Instant) {
        let order = match answer {
            Ok(()) => self.processes[index].recovery.released(now),
            Err(why) => {
                self.fail_upgrade(index, why, now);
                self.processes[index].recovery.condemn(now, why)
            }
        };
        self.carry_out(index, order);
    }

    /// Which build the next process of a device is made of.
    pub(super) fn next_build(&mut self, index: usize) -> Build {
        match &mut self.processes[index].upgrade {
            Some(upgrade) => {
                upgrade.tried = true;
                Build::Candidate
            }
            None => Build::Current,
        }
    }

    /// A device is served again. False: not by a new build.
    pub(super) fn candidate_joined(&mut self, index: usize, now: Instant) -> bool {
        let Some(upgrade) = self.processes[index].upgrade.take() else {
            return false;
        };
        let took = now.duration_since(upgrade.began);
        self.tell_spawner(FromSupervisor::Adopt {
            // The index fits: a VM has at most 32 devices.
            process: index as u16,
        });
        self.note(index, EventKind::Upgraded, took, "");
        let answer = Answer::Upgraded {
            pid: self.processes[index].about.pid,
            took_us: took.as_micros() as u64,
        };
        self.clients.answer(upgrade.asker, answer, now);
        true
    }

    /// A device's process cannot serve. If it is of a new build, the old one is started next.
    pub(super) fn candidate_failed(&mut self, index: usize, why: &str, now: Instant) {
        if self.processes[index].upgrade.as_ref().is_some_and(|u| u.tried) {
            self.fail_upgrade(index, why, now);
        }
    }

    /// No process of a new build is to come.
    pub(super) fn fail_upgrade(&mut self, index: usize, why: &str, now: Instant) {
        let process = &mut self.processes[index];
        if let Some(upgrade) = process.upgrade.take() {
            let line = format!("{}: not upgraded: {why}", process.about.name);
            self.say(&line);
            self.clients.answer(upgrade.asker, Answer::Failed(line), now);
        }
    }
}
