//! Carrying out what [`super::recovery`] decides: asks of the spawner and of the vmm, and the
//! events that people read.

use super::outcome::Outcome;
use super::plug::Membership;
use super::quota::Quota;
use super::recovery::Order;
use super::{EXIT_DEADLINE, Phase, Supervisor};
use crate::sandbox::EXIT_HUNG;
use crate::tell::printable;
use crate::wire_fds::send_with_fds;
use nix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use vm_spec::control::{Loss, ToVmm};
use vm_spec::events::{EventKind, MAX_DETAIL, MOST_TOLD, TOLD_PERIOD, VmEvent};
use vm_spec::spec::OnDeviceDeath;
use vm_spec::supervise::{ExitStatus, FromSupervisor};

/// The only hang that is seen from outside the process; the vmm tells of those that it meets.
const HUNG: &str = "its process was stopped by a signal, and not continued in time";

/// How many events of each kind a device has had.
pub(super) type Counters = BTreeMap<EventKind, u64>;

/// What a device's process may tell of itself.
pub(super) fn of_telling(now: Instant) -> Quota {
    Quota::new(MOST_TOLD, TOLD_PERIOD, now)
}

impl Supervisor {
    /// Whether a device's process that ends now is to have a successor.
    pub(super) fn restarts_devices(&self) -> bool {
        self.on_device_death == OnDeviceDeath::Restart && self.needs_devices()
    }

    /// Whether the guest is to be served: a device's process that hangs is killed. Its end is then that of the VM
    /// where it is to have no successor.
    pub(super) fn needs_devices(&self) -> bool {
        self.vmm.is_some()
            && self.outcome.is_none()
            && matches!(self.phase, Phase::Running | Phase::PoweringOff { .. })
    }

    /// The next time at which a device wants something.
    pub(super) fn devices_deadline(&self) -> Option<Instant> {
        if !self.needs_devices() {
            return None;
        }
        self.processes.iter().filter_map(|p| p.recovery.deadline()).min()
    }

    /// Looks at every device's time.
    pub(super) fn judge_devices(&mut self, now: Instant) {
        if !self.needs_devices() {
            return;
        }
        if self.vmm_stopped {
            self.excuse_vmm(now);
        }
        for index in 0..self.processes.len() {
            let recovery = &mut self.processes[index].recovery;
            let hung = recovery.is_hung(now);
            let order = recovery.due(now);
            if hung {
                self.condemned(index, EventKind::Hung, HUNG);
            }
            self.carry_out(index, order);
        }
    }

    /// A device's process was reaped.
    pub(super) fn device_ended(&mut self, index: usize, status: ExitStatus, now: Instant) {
        let process = &mut self.processes[index];
        let line = Outcome::of_process(&process.about, status)
            .line
            .unwrap_or_default();
        // It saw its socket closed before the vmm's word that it had closed it came here.
        if status == ExitStatus::Code(0) && process.recovery.is_releasing() {
            process.recovery.released(now);
        }
        let told = process.recovery.is_told();
        let order = process.recovery.ended(now, &line);
        if !told {
            let event = match status {
                ExitStatus::Code(EXIT_HUNG) => EventKind::Hung,
                ExitStatus::OutOfMemory => EventKind::OutOfMemory,
                _ => EventKind::Died,
            };
            self.say(&line);
            self.note(index, event, Duration::ZERO, &line);
        }
        self.candidate_failed(index, &line, now);
        self.carry_out(index, order);
    }

    /// The vmm no longer talks to this device's back end.
    pub(super) fn device_lost(
        &mut self,
        index: usize,
        generation: u32,
        loss: Loss,
        reason: &str,
        now: Instant,
    ) {
        let process = &mut self.processes[index];
        if !process.alive || !process.recovery.is_latest(generation) {
            return;
        }
        if loss == Loss::Closed && self.on_device_death == OnDeviceDeath::End {
            // Its end says why. One that goes on has shut the guest out.
            let outcome = Outcome::of_loss(&process.about.name, reason);
            self.suspicion.get_or_insert((now + EXIT_DEADLINE, outcome));
            return;
        }
        let order = process.recovery.condemn(now, reason);
        let event = match loss {
            // Most often its process has ended, and will be reaped in a moment: that says more.
            // If not, the vmm does not trust it any more, and killing costs nothing.
            Loss::Closed => None,
            Loss::Silent => Some(EventKind::Hung),
            Loss::Broken => Some(EventKind::Died),
        };
        if let Some(event) = event.filter(|_| order.is_some()) {
            self.condemned(index, event, reason);
        }
        self.carry_out(index, order);
    }

    /// Says why a process is killed; that it ends then is no news.
    fn condemned(&mut self, index: usize, event: EventKind, reason: &str) {
        let name = &self.processes[index].about.name;
        self.say(&format!("{name}: {reason}: it is killed"));
        self.note(index, event, Duration::ZERO, reason);
        self.processes[index].recovery.tell();
    }

    /// A process was stopped, or goes on. Whoever stops the vmm wants a pause: the guest has no other.
    pub(super) fn process_stopped(&mut self, index: usize, stopped: bool, now: Instant) {
        let Some(process) = self.processes.get_mut(index) else {
            return;
        };
        if process.about.role.is_device() {
            process.recovery.stopped(now, stopped);
        } else {
            self.vmm_stopped = stopped;
            self.excuse_vmm(now);
        }
    }

    /// Gives the vmm its whole time for what it was asked.
    fn excuse_vmm(&mut self, now: Instant) {
        for process in &mut self.processes {
            process.recovery.excuse_vmm(now);
        }
        for remote in &mut self.remotes {
            remote.excuse_vmm(now);
        }
    }

    /// The spawner made a process: its sockets go to the vmm.
    pub(super) fn device_spawned(&mut self, index: usize, pid: i32, sockets: &[OwnedFd], now: Instant) {
        let id = self.requests + 1;
        let Some(process) = self.processes.get_mut(index) else {
            return;
        };
        process.about.pid = pid;
        process.alive = true;
        let slot = process.about.slot;
        if !matches!(process.membership, Membership::Member | Membership::Coming(_)) {
            // It was on its way when its device went.
            return self.carry_out(index, Some(Order::Kill));
        }
        let (Some(slot), Some(_)) = (slot, &self.vmm) else {
            // It sees its socket close, and ends.
            return;
        };
        let Some(generation) = process.recovery.spawned(now, id) else {
            return;
        };
        self.requests = id;
        if let Some(given) = self.first_sockets(index, id, sockets) {
            if let Err(why) = given {
                self.attach_failed(index, &why, now);
            }
            return;
        }
        let message = ToVmm::ReplaceBackend { slot, generation };
        if let Err(why) = self.give_to_vmm(id, message, sockets) {
            let order = self.processes[index].recovery.condemn(now, &why);
            self.carry_out(index, order);
        }
    }

    /// Passes a back end's sockets on with a message.
    ///
    /// # Errors
    /// Why it cannot.
    pub(super) fn give_to_vmm(&self, id: u64, message: ToVmm, sockets: &[OwnedFd]) -> Result<(), String> {
        let vmm = self.vmm.as_ref().ok_or("the VM is over")?;
        send_with_fds(vmm.as_fd(), id, message, sockets)
            .map_err(|error| format!("the vmm cannot be told: {error}"))
    }

    /// The spawner could make no process.
    pub(super) fn device_not_spawned(&mut self, index: usize, why: &str, now: Instant) {
        if self.processes.get(index).is_some() && self.is_apart(index) {
            self.apart_ended(index, why, now);
        } else if let Some(process) = self.processes.get_mut(index) {
            if !process.recovery.is_spawning() {
                return;
            }
            let order = process.recovery.ended(now, why);
            let line = format!("{}: no other process: {why}", process.about.name);
            self.say(&line);
            self.candidate_failed(index, why, now);
            self.carry_out(index, order);
        }
    }

    /// The vmm answered request `id`. False: it was no device's.
    pub(super) fn device_answered(&mut self, id: u64, answer: Result<(), &str>, now: Instant) -> bool {
        if let Some(index) = self.processes.iter().position(|p| p.recovery.releases_by(id)) {
            self.device_released(index, answer, now);
            return true;
        }
        let Some(index) = self.processes.iter().position(|p| p.recovery.joins_by(id)) else {
            return self.plug_answered(id, answer, now) || self.remote_answered(id, answer, now);
        };
        match answer {
            Ok(()) => {
                let took = self.processes[index].recovery.joined(now);
                if !self.device_attached(index, now) && !self.candidate_joined(index, now) {
                    self.note(index, EventKind::Restarted, took, "");
                }
                self.renew_tap(index, now);
            }
            Err(why) if self.attach_failed(index, why, now) => {}
            Err(why) => {
                let name = &self.processes[index].about.name;
                self.say(&format!("{name}: the new process cannot take over: {why}"));
                let order = self.processes[index].recovery.condemn(now, why);
                self.candidate_failed(index, why, now);
                self.carry_out(index, order);
            }
        }
        true
    }

    /// The guest was told that a device needs a reset. It may reset it, and break it again, without end.
    pub(super) fn device_faulted(&mut self, device: &str, reason: &str, now: Instant) {
        let process = self.processes.iter().position(|p| p.about.name == device);
        let remote = self.remote(device);
        if process.or(remote).is_none() || !self.may_vmm_speak(now) {
            return;
        }
        self.say(&format!("{device}: the device needs a reset: {reason}"));
        if let Some(index) = process {
            self.note(index, EventKind::NeedsReset, Duration::ZERO, reason);
        } else if let Some(index) = remote {
            self.note_remote(index, EventKind::NeedsReset, Duration::ZERO, reason);
        }
    }

    /// Writes down what processes told of by their logs. A device's process can tell of itself only.
    pub(super) fn note_told(&mut self, now: Instant) {
        for index in 0..self.processes.len() {
            for (kind, detail) in std::mem::take(&mut self.processes[index].log.told) {
                let process = &mut self.processes[index];
                if process.about.slot.is_none() {
                    continue;
                }
                if kind == EventKind::TapLost {
                    // Where it is news, which it is once.
                    self.tap_lost(index, &detail);
                } else if process.told.take(now) {
                    self.note(index, kind, Duration::ZERO, &detail);
                } else {
                    *process.counters.entry(kind).or_default() += 1;
                }
            }
        }
    }

    pub(super) fn carry_out(&mut self, index: usize, order: Option<Order>) {
        // The index fits: a VM has at most 32 devices.
        let process = index as u16;
        if let Some(Order::GiveUp(reason)) = &order {
            self.fail_upgrade(index, reason, Instant::now());
        }
        match order {
            None => {}
            Some(Order::Respawn) => {
                let build = self.next_build(index);
                self.processes[index].tap.begin_process();
                self.order_process(index, FromSupervisor::Respawn { process, build });
            }
            Some(Order::Kill) => self.order_process(index, FromSupervisor::Kill { process }),
            Some(Order::GiveUp(reason)) if self.on_device_death == OnDeviceDeath::End => {
                let outcome = Outcome::of_loss(&self.processes[index].about.name, &reason);
                self.conclude(outcome);
                self.stop_vmm(Instant::now());
            }
            Some(Order::GiveUp(reason)) if self.attach_failed(index, &reason, Instant::now()) => {}
            Some(Order::GiveUp(reason)) => {
                if let Some(slot) = self.processes[index].about.slot {
                    // The vmm's DeviceFault, which follows, is what is said and written down.
                    self.tell_vmm(ToVmm::GiveUpBackend { slot, reason });
                }
            }
        }
    }

    fn order_process(&mut self, index: usize, message: FromSupervisor) {
        if !self.tell_spawner(message) {
            self.processes[index].recovery.not_told(Instant::now());
        }
    }

    pub(super) fn note(&mut self, index: usize, kind: EventKind, took: Duration, detail: &str) {
        let process = &mut self.processes[index];
        let mut event = event(&process.about.name, &mut process.counters, kind, took, detail);
        event.pid = process.about.pid;
        if kind == EventKind::Restarted {
            event.outstanding = process.outstanding;
        }
        self.tell_spawner(FromSupervisor::Event(event));
    }
}

/// An event of now, counted.
pub(super) fn event(
    device: &str,
    counters: &mut Counters,
    kind: EventKind,
    took: Duration,
    detail: &str,
) -> VmEvent {
    let count = counters.entry(kind).or_default();
    *count += 1;
    VmEvent {
        time_ns: clock_gettime(ClockId::CLOCK_MONOTONIC)
            .map_or(0, |now| Duration::from(now).as_nanos() as u64),
        device: device.to_owned(),
        event: kind,
        pid: 0,
        count: *count,
        outstanding: 0,
        took_us: took.as_micros() as u64,
        detail: shortened(detail),
    }
}

/// A back end's words can be in it: one line, of bounded length.
pub(super) fn shortened(detail: &str) -> String {
    let mut line = printable(detail);
    line.truncate(line.floor_char_boundary(MAX_DETAIL));
    line
}
