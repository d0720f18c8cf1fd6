//! TAPs of the host's that vanish, and what comes in their place.
//!
//! A process that finds no TAP, at its start too, serves with its link down. The connector, asked once, opens
//! the TAP again; processes that the spawner is asked for from then on have it.
//!
//! Behind a private TAP a relay may lose its passt. The connector, which hears of it, starts another and gives it
//! to the relay: the process that serves the NIC goes on.

use super::Supervisor;
use super::devices::event;
use super::outcome::Outcome;
use crate::wire_fds::send_with_fds;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use vm_spec::control::exit_code;
use vm_spec::events::EventKind;
use vm_spec::spec::OnDeviceDeath;
use vm_spec::supervise::FromSupervisor;

/// What is known of a NIC's TAP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Tap {
    /// Nobody misses it.
    Present,
    /// It is gone.
    Lost,
    /// There is another, which the process that serves or starts does not have.
    Back,
    /// It leads to no passt, since then.
    Cut(Instant),
}

impl Tap {
    /// The spawner is asked for a process, which it gives the latest TAP.
    pub(super) fn begin_process(&mut self) {
        if *self == Self::Back {
            *self = Self::Present;
        }
    }
}

impl Supervisor {
    /// A process says so. Each that starts without its TAP does: it is news once.
    pub(super) fn tap_lost(&mut self, index: usize, detail: &str) {
        let process = &mut self.processes[index];
        if process.tap != Tap::Present {
            return;
        }
        process.tap = Tap::Lost;
        let wanted = process.about.tap;
        self.note(index, EventKind::TapLost, Duration::ZERO, detail);
        if let Some(tap) = wanted.filter(|_| self.restarts_devices()) {
            self.ask_connector(tap);
        }
    }

    /// The connector says that the NIC's relay has lost its passt.
    pub(super) fn passt_lost(&mut self, device: u16, now: Instant) {
        let Some(index) = self.nic_of(device) else { return };
        self.processes[index].tap = Tap::Cut(now);
        self.note_nic(index, EventKind::Disconnected, Duration::ZERO, "passt is gone");
        if self.restarts_devices() {
            self.ask_connector(device);
        } else if self.on_device_death == OnDeviceDeath::End {
            self.conclude(Outcome {
                code: exit_code::BACKEND_LOST,
                line: Some(format!("{}: passt is gone", self.processes[index].about.name)),
            });
            self.stop_vmm(now);
        }
    }

    /// What the connector was asked for is there: another passt, or a TAP's `queues`.
    pub(super) fn nic_came_back(&mut self, index: usize, queues: &[OwnedFd], now: Instant) {
        let process = &mut self.processes[index];
        match process.tap {
            Tap::Cut(since) => {
                process.tap = Tap::Present;
                self.note_nic(index, EventKind::Reconnected, now.duration_since(since), "");
            }
            _ => self.tap_came_back(index, queues, now),
        }
    }

    /// Which process serves what the connector counts as `device`.
    pub(super) fn nic_of(&self, device: u16) -> Option<usize> {
        self.processes.iter().position(|p| p.about.tap == Some(device))
    }

    /// An event of no process of ours.
    fn note_nic(&mut self, index: usize, kind: EventKind, took: Duration, detail: &str) {
        let process = &mut self.processes[index];
        let event = event(&process.about.name, &mut process.counters, kind, took, detail);
        self.tell_spawner(FromSupervisor::Event(event));
    }

    /// The TAP goes to the spawner, and a new process takes over with it.
    pub(super) fn tap_came_back(&mut self, index: usize, queues: &[OwnedFd], now: Instant) {
        if !self.restarts_devices() || self.processes[index].recovery.is_lost() {
            return;
        }
        // There was no room for them.
        if queues.is_empty() {
            if let Some(tap) = self.processes[index].about.tap {
                self.ask_connector(tap);
            }
            return;
        }
        // The index fits: a VM has at most 32 devices.
        let message = FromSupervisor::Tap {
            process: index as u16,
        };
        if send_with_fds(self.spawner.as_fd(), 0, message, queues).is_err() {
            return self.say("the spawner cannot be given a TAP");
        }
        self.note(index, EventKind::TapBack, Duration::ZERO, "");
        self.processes[index].tap = Tap::Back;
        self.renew_tap(index, now);
    }

    /// A process that serves without the TAP that is back makes room for one with it. One that is about to serve,
    /// or to end, does so first.
    pub(super) fn renew_tap(&mut self, index: usize, now: Instant) {
        if self.processes[index].tap == Tap::Back {
            let order = self.processes[index].recovery.renew(now, "its TAP is back");
            self.carry_out(index, order);
        }
    }
}
