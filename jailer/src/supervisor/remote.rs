//! The devices that someone else's back ends serve. Whoever runs those starts them again; here they
//! are only connected to again, for as long as the VM lives.
//!
//! ```text
//!  Serving --lost--> Resting --due--> Connecting --socket--> Joining --vmm: done--> Serving
//!                       ^                                       |
//!                       +-------------- vmm: failed, late ------+
//! ```

use super::Supervisor;
use super::devices::{Counters, event};
use super::outcome::Outcome;
use super::recovery::JOIN_DEADLINE;
use crate::wire::{Received, send_message};
use crate::wire_fds::receive_with_fds;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use vm_spec::control::{ToVmm, exit_code};
use vm_spec::events::EventKind;
use vm_spec::spec::OnDeviceDeath;
use vm_spec::supervise::{FromConnector, FromSupervisor, RemoteDevice, ToConnector};

/// A back end that served this long is connected to again at once.
const HEALTHY: Duration = Duration::from_secs(1);
/// The rest after the first back end that did not serve. It doubles each time.
const FIRST_REST: Duration = Duration::from_millis(10);
/// The longest rest.
const LONGEST_REST: Duration = Duration::from_secs(1);

/// Where one device's back end is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Since that time.
    Serving(Instant),
    /// The connector is asked at that time.
    Resting(Instant),
    /// The connector was asked.
    Connecting,
    /// The vmm was given a socket, by this request.
    Joining(Instant, u64),
    /// There is nobody who could connect.
    Lost,
}

/// One device.
pub(super) struct Remote {
    about: RemoteDevice,
    stage: Stage,
    rest: Duration,
    /// Which of its back ends the vmm was given last.
    generation: u32,
    /// When the guest was served last.
    lost: Instant,
    /// Requests that the guest had under way then.
    outstanding: u32,
    /// Why the latest one did not serve: said once, not each time.
    why: String,
    counters: Counters,
    /// It was attached by a command that is over: nobody can connect to its back end again.
    attached: bool,
}

impl Remote {
    /// One that was attached.
    pub(super) fn attached(about: RemoteDevice, now: Instant) -> Self {
        Self {
            attached: true,
            ..Self::new(about, now)
        }
    }

    /// Gives the vmm its whole time for what it was given.
    pub(super) fn excuse_vmm(&mut self, now: Instant) {
        if let Stage::Joining(until, _) = &mut self.stage {
            *until = now + JOIN_DEADLINE;
        }
    }

    /// Its device's id; empty once it has been detached.
    pub(super) fn name(&self) -> &String {
        &self.about.name
    }

    /// Its PCI slot; 0 once it has been detached.
    pub(super) fn slot(&self) -> u8 {
        self.about.slot
    }

    /// Another may have its place, which the connector does not know.
    pub(super) fn is_gone(&self) -> bool {
        self.attached && self.about.slot == 0
    }

    /// The guest has let go of it.
    pub(super) fn detach(&mut self) {
        self.stage = Stage::Lost;
        self.about.slot = 0;
        self.about.name.clear();
    }

    pub(super) fn new(about: RemoteDevice, now: Instant) -> Self {
        Self {
            about,
            stage: Stage::Serving(now),
            rest: FIRST_REST,
            generation: 0,
            lost: now,
            outstanding: 0,
            why: String::new(),
            counters: Counters::new(),
            attached: false,
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::Serving(_) | Stage::Connecting | Stage::Lost => None,
            Stage::Resting(at) | Stage::Joining(at, _) => Some(at),
        }
    }

    /// The latest back end does not serve. One that did not for long is given time.
    fn rest(&mut self, now: Instant) {
        let served = match self.stage {
            Stage::Serving(since) => now.duration_since(since),
            _ => Duration::ZERO,
        };
        let rest = if served >= HEALTHY {
            self.rest = FIRST_REST;
            Duration::ZERO
        } else {
            let longer = (2 * self.rest).min(LONGEST_REST);
            std::mem::replace(&mut self.rest, longer)
        };
        self.stage = Stage::Resting(now + rest);
    }

    fn not_connected(&mut self, now: Instant) {
        if self.stage == Stage::Connecting {
            self.rest(now);
        }
    }

    fn joins_by(&self, id: u64) -> bool {
        matches!(self.stage, Stage::Joining(_, wanted) if wanted == id)
    }
}

impl Supervisor {
    /// The place of the device of this name.
    pub(super) fn remote(&self, name: &str) -> Option<usize> {
        self.remotes.iter().position(|remote| remote.about.name == name)
    }

    /// The next time at which one of them wants something.
    pub(super) fn remotes_deadline(&self) -> Option<Instant> {
        if !self.restarts_devices() {
            return None;
        }
        self.remotes.iter().filter_map(Remote::deadline).min()
    }

    /// Looks at the time.
    pub(super) fn judge_remotes(&mut self, now: Instant) {
        if !self.restarts_devices() {
            return;
        }
        for index in 0..self.remotes.len() {
            let remote = &mut self.remotes[index];
            if remote.deadline().is_none_or(|at| now < at) {
                continue;
            }
            match remote.stage {
                Stage::Resting(_) => self.connect(index),
                _ => remote.rest(now),
            }
        }
    }

    fn connect(&mut self, index: usize) {
        let attached = self.remotes[index].attached;
        // The index fits: a VM has at most 32 devices.
        if !attached && self.ask_connector(index as u16) {
            self.remotes[index].stage = Stage::Connecting;
            return;
        }
        self.remotes[index].stage = Stage::Lost;
        let slot = self.remotes[index].about.slot;
        let reason = match attached {
            true => "its back end is gone: detach it, and attach it again",
            false => "the process that connects to back ends has ended",
        };
        let reason = reason.to_owned();
        self.tell_vmm(ToVmm::GiveUpBackend { slot, reason });
    }

    /// False: there is nobody who could connect.
    pub(super) fn ask_connector(&self, device: u16) -> bool {
        let connector = self.connector.as_ref();
        let asked = connector.map(|c| send_message(c.as_fd(), 0, ToConnector::Connect { device }));
        matches!(asked, Some(Ok(())))
    }

    /// The vmm no longer talks to a back end.
    pub(super) fn remote_lost(
        &mut self,
        index: usize,
        generation: u32,
        outstanding: u32,
        why: &str,
        now: Instant,
    ) {
        let remote = &mut self.remotes[index];
        // Of one that is replaced already the vmm's answer tells.
        if remote.generation != generation || !matches!(remote.stage, Stage::Serving(_)) {
            return;
        }
        (remote.lost, remote.outstanding) = (now, outstanding);
        remote.rest(now);
        let line = format!("{}: {why}", remote.about.name);
        self.say(&line);
        self.note_remote(index, EventKind::Disconnected, Duration::ZERO, why);
        if self.on_device_death == OnDeviceDeath::End && self.outcome.is_none() {
            self.conclude(Outcome {
                code: exit_code::BACKEND_LOST,
                line: None,
            });
            self.stop_vmm(now);
        }
    }

    /// What the connector says.
    pub(super) fn hear_connector(&mut self, now: Instant) {
        while let Some(connector) = &self.connector {
            match receive_with_fds(connector.as_fd()) {
                Ok((Received::Nothing, _)) => return,
                Ok((Received::Message(_, FromConnector::Connected { device }), fds)) => {
                    if let Some(index) = self.nic_of(device) {
                        self.nic_came_back(index, &fds, now);
                    } else if !fds.is_empty() {
                        self.connected(device.into(), &fds, now);
                    } else if let Some(remote) = self.remotes.get_mut(usize::from(device)) {
                        // There was no room for them.
                        remote.not_connected(now);
                    }
                }
                Ok((Received::Message(_, FromConnector::Lost { device }), _)) => self.passt_lost(device, now),
                Ok((Received::End, _)) | Err(_) => {
                    self.connector = None;
                    if self.needs_devices() {
                        self.say(
                            "the connector has ended: what it would connect to or open again stays lost",
                        );
                    }
                    // Those that it was asked for are told now, the others when they are lost.
                    for remote in &mut self.remotes {
                        if remote.stage == Stage::Connecting {
                            remote.stage = Stage::Resting(now);
                        }
                    }
                }
            }
        }
    }

    /// There is a connection: it goes to the vmm.
    fn connected(&mut self, index: usize, sockets: &[OwnedFd], now: Instant) {
        let id = self.requests + 1;
        let Some(remote) = self.remotes.get_mut(index) else {
            return;
        };
        if remote.stage != Stage::Connecting {
            return;
        }
        self.requests = id;
        remote.generation = remote.generation.wrapping_add(1);
        let (slot, generation) = (remote.about.slot, remote.generation);
        let message = ToVmm::ReplaceBackend { slot, generation };
        let given = self.give_to_vmm(id, message, sockets);
        let remote = &mut self.remotes[index];
        match given {
            Ok(()) => remote.stage = Stage::Joining(now + JOIN_DEADLINE, id),
            Err(_) => remote.rest(now),
        }
    }

    /// The vmm answered request `id`. False: it was none of these devices'.
    pub(super) fn remote_answered(&mut self, id: u64, answer: Result<(), &str>, now: Instant) -> bool {
        let Some(index) = self.remotes.iter().position(|remote| remote.joins_by(id)) else {
            return false;
        };
        let remote = &mut self.remotes[index];
        match answer {
            Ok(()) => {
                remote.stage = Stage::Serving(now);
                remote.why.clear();
                let took = now.duration_since(remote.lost);
                self.note_remote(index, EventKind::Reconnected, took, "");
            }
            Err(why) => {
                remote.rest(now);
                if remote.why != why {
                    why.clone_into(&mut remote.why);
                    let line = format!("{}: the back end cannot take over: {why}", remote.about.name);
                    self.say(&line);
                }
            }
        }
        true
    }

    pub(super) fn note_remote(&mut self, index: usize, kind: EventKind, took: Duration, detail: &str) {
        let remote = &mut self.remotes[index];
        let mut event = event(&remote.about.name, &mut remote.counters, kind, took, detail);
        if kind == EventKind::Reconnected {
            event.outstanding = remote.outstanding;
        }
        self.tell_spawner(FromSupervisor::Event(event));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_served_is_sought_at_once_and_one_that_does_not_ever_later_without_end() {
        let mut now = Instant::now();
        let about = RemoteDevice {
            name: "disk0".into(),
            slot: 1,
        };
        let mut remote = Remote::new(about, now);
        now += HEALTHY;
        remote.rest(now);
        assert_eq!(remote.stage, Stage::Resting(now));
        let mut rests = Vec::new();
        for _ in 0..10_000 {
            remote.stage = Stage::Joining(now + JOIN_DEADLINE, 1);
            remote.rest(now);
            rests.push(remote.deadline().unwrap() - now);
            now = remote.deadline().unwrap();
        }
        assert_eq!(rests[..3], [1, 2, 4].map(|n| n * FIRST_REST));
        assert!(rests.iter().all(|rest| *rest <= LONGEST_REST));
        // One that serves for a moment does not start from the first rest.
        remote.stage = Stage::Serving(now);
        remote.rest(now);
        assert_eq!(remote.stage, Stage::Resting(now + LONGEST_REST));
    }
}
