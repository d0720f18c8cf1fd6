//! Devices that come and go while the guest runs.
//!
//! ```text
//!  Attach --> spawner: add, respawn --> vmm: attach --done--> member --detach--> the guest lets go --> its process
//!     |            | no process            | refused                                                  ends --> gone
//!     |            +-----------------------+--> killed --> gone
//!     +-- someone else's socket --> vmm: attach
//! ```

use super::clients::Asker;
use super::devices::{Counters, of_telling};
use super::logs::LogPipe;
use super::orders::Orders;
use super::recovery::{Order, Recovery};
use super::remote::Remote;
use super::taps::Tap;
use super::{Process, Supervisor};
use crate::wire_fds::send_with_fds;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use vm_spec::client::{Answer, Attachment, Refusal};
use vm_spec::control::{BACKEND_FDS, DeviceConfig, FdNumber, ToVmm};
use vm_spec::events::EventKind;
use vm_spec::spec::OnDeviceDeath;
use vm_spec::supervise::{AddedProcess, FromSupervisor, MOST_PROCESSES, RemoteDevice, SupervisedProcess};

/// A guest that is asked to let go of a device does so within this time, or the asker is told that it has not.
const EJECT_DEADLINE: Duration = Duration::from_secs(30);
/// A process whose device is gone ends within this time: what it flushes may take a while.
const LEAVE_DEADLINE: Duration = Duration::from_secs(30);

/// Whether a device's process belongs to the VM.
#[derive(Debug)]
pub(super) enum Membership {
    /// It does.
    Member,
    /// It is being attached.
    Coming(Box<Coming>),
    /// It does not any more, and is to end by that time; who is told what then.
    Leaving(Instant, Option<(Asker, Answer)>),
    /// It has ended, and the spawner is to say that nothing of it is kept; who is told what then.
    Ended(Option<(Asker, Answer)>),
    /// Nothing is left of it; another may have its place.
    Gone,
}

/// A device that is being attached.
#[derive(Debug)]
pub(super) struct Coming {
    asker: Asker,
    device: DeviceConfig,
}

/// A device that the guest was asked to let go of.
#[derive(Debug)]
pub(super) struct Asked {
    slot: u8,
    /// The request to the vmm.
    id: u64,
    until: Instant,
    asker: Asker,
}

/// Someone else's device that is being attached.
#[derive(Debug)]
pub(super) struct ComingRemote {
    id: u64,
    asker: Asker,
    device: DeviceConfig,
}

/// What there is under way, and where more may come.
#[derive(Debug, Default)]
pub(super) struct Plugs {
    /// Empty slots.
    spares: Vec<u8>,
    asked: Vec<Asked>,
    remotes: Vec<ComingRemote>,
}

impl Plugs {
    pub(super) fn new(spares: Vec<u8>) -> Self {
        Self {
            spares,
            ..Self::default()
        }
    }

    /// The slot, or (0) any.
    fn take(&mut self, slot: u8) -> Result<u8, String> {
        let wanted = |spare: &u8| slot == 0 || *spare == slot;
        match self.spares.iter().position(wanted) {
            Some(at) => Ok(self.spares.remove(at)),
            None if slot == 0 => {
                Err("no PCI slot is left for it: start the VM with more (hotplug)".to_owned())
            }
            None => Err(format!(
                "slot {slot} is taken, or not kept for devices that are attached; free: {}",
                self.free()
            )),
        }
    }

    /// The empty slots, in words.
    pub(super) fn free(&self) -> String {
        match &*self.spares {
            [] => "none".to_owned(),
            spares => spares.iter().map(u8::to_string).collect::<Vec<_>>().join(", "),
        }
    }

    fn give(&mut self, slot: u8) {
        self.spares.push(slot);
        self.spares.sort_unstable();
    }
}

fn sound(name: &str) -> bool {
    let of_names = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && name.len() <= 64 && !name.starts_with(['.', '-']) && name.chars().all(of_names)
}

impl Supervisor {
    /// Whether devices may come, go and be replaced.
    ///
    /// # Errors
    /// Why they may not.
    pub(super) fn may_change(&self) -> Result<(), String> {
        let why = if self.on_device_death == OnDeviceDeath::End {
            "the VM has the devices that it started with, as on-device-death is end"
        } else if !self.needs_devices() {
            "the VM ends"
        } else if !self.guest_runs {
            "the VM starts: try again in a moment"
        } else {
            return Ok(());
        };
        Err(why.to_owned())
    }

    /// Begins to attach a device; the answer follows.
    ///
    /// # Errors
    /// Why it cannot be.
    pub(super) fn attach(
        &mut self,
        attachment: Attachment,
        fds: Vec<OwnedFd>,
        asker: Asker,
        now: Instant,
    ) -> Result<(), Refusal> {
        let refused = |why: &str| Err(Refusal::Because(why.to_owned()));
        self.may_change().map_err(Refusal::Because)?;
        let Attachment { mut device, process } = attachment;
        if !sound(&device.id)
            || process
                .as_ref()
                .is_some_and(|p| p.name != device.id || !p.role.is_device())
        {
            return refused("its name, or its process, is none of a device");
        }
        if self.taken_ids().any(|taken| taken == device.id) {
            return Err(Refusal::IdTaken);
        }
        let wanted = process
            .as_ref()
            .map_or(BACKEND_FDS, |process| 2 + process.descriptors());
        if fds.len() != wanted {
            let came = fds.len();
            return refused(&format!("{came} descriptors came with it, and {wanted} were to"));
        }
        device.ours = process.is_some();
        device.slot = self.plugs.take(device.slot).map_err(Refusal::Because)?;
        let slot = device.slot;
        let begun = match process {
            Some(process) => self.add_process(device, process, fds, asker, now),
            None => self.attach_remote(device, &fds, asker),
        };
        begun.map_err(|why| {
            self.plugs.give(slot);
            Refusal::Because(why)
        })
    }

    /// What no device that is attached may be called: of those that come and go, too.
    pub(super) fn taken_ids(&self) -> impl Iterator<Item = &str> {
        let processes = self.processes.iter().map(|process| &process.about.name);
        let coming = self.plugs.remotes.iter().map(|coming| &coming.device.id);
        let all = processes
            .chain(self.remotes.iter().map(Remote::name))
            .chain(coming);
        all.map(String::as_str).filter(|name| !name.is_empty())
    }

    /// The place of a device's process.
    fn device_place(&self, name: &str) -> Option<usize> {
        self.processes.iter().position(|p| p.about.name == name)
    }

    fn add_process(
        &mut self,
        device: DeviceConfig,
        plan: AddedProcess,
        fds: Vec<OwnedFd>,
        asker: Asker,
        now: Instant,
    ) -> Result<(), String> {
        let gone = |p: &Process| matches!(p.membership, Membership::Gone);
        let index = self
            .processes
            .iter()
            .position(gone)
            .unwrap_or(self.processes.len());
        if index >= MOST_PROCESSES {
            return Err("the VM has too many processes".to_owned());
        }
        let mut fds = fds.into_iter();
        let (Some(log), Some(orders)) = (fds.next(), fds.next()) else {
            return Err("its log and its orders are missing".to_owned());
        };
        let given: Vec<OwnedFd> = fds.collect();
        let (name, role) = (plan.name.clone(), plan.role);
        let order = FromSupervisor::Add {
            // The index fits: see MOST_PROCESSES.
            process: index as u16,
            plan: Box::new(plan),
        };
        send_with_fds(self.spawner.as_fd(), 0, order, &given)
            .map_err(|error| format!("the spawner cannot be told: {error}"))?;
        let process = Process {
            log: LogPipe::new(name.clone(), log, now),
            orders: Some(Orders::new(orders)),
            about: SupervisedProcess {
                name,
                role,
                serves: None,
                pid: 0,
                log: FdNumber::NONE,
                slot: Some(device.slot),
                tap: None,
                orders: None,
            },
            alive: false,
            recovery: Recovery::coming(now),
            counters: Counters::new(),
            told: of_telling(now),
            outstanding: 0,
            upgrade: None,
            tap: Tap::Present,
            membership: Membership::Coming(Box::new(Coming { asker, device })),
        };
        match self.processes.get_mut(index) {
            Some(place) => *place = process,
            None => self.processes.push(process),
        }
        Ok(())
    }

    fn attach_remote(&mut self, device: DeviceConfig, fds: &[OwnedFd], asker: Asker) -> Result<(), String> {
        let id = self.requests + 1;
        self.give_to_vmm(id, ToVmm::Attach(Box::new(device.clone())), fds)?;
        self.requests = id;
        self.plugs.remotes.push(ComingRemote { id, asker, device });
        Ok(())
    }

    /// What gives a new process's sockets to the vmm, as request `id`, where the device is not there yet.
    pub(super) fn first_sockets(
        &self,
        index: usize,
        id: u64,
        sockets: &[OwnedFd],
    ) -> Option<Result<(), String>> {
        match &self.processes[index].membership {
            Membership::Coming(coming) => {
                let message = ToVmm::Attach(Box::new(coming.device.clone()));
                Some(self.give_to_vmm(id, message, sockets))
            }
            _ => None,
        }
    }

    /// Whether a device's process is no member, or not yet.
    pub(super) fn is_apart(&self, index: usize) -> bool {
        !matches!(self.processes[index].membership, Membership::Member)
    }

    /// The guest can see the device that process `index` serves.
    pub(super) fn device_attached(&mut self, index: usize, now: Instant) -> bool {
        let Some(coming) = self.take_coming(index, Membership::Member) else {
            return false;
        };
        let process = &mut self.processes[index];
        let answer = Answer::Attached {
            slot: coming.device.slot,
            pid: Some(process.about.pid),
        };
        let ended = (!process.alive).then(|| process.recovery.ended(now, "it ended as it was attached"));
        self.note(index, EventKind::Attached, Duration::ZERO, "");
        self.clients.answer(coming.asker, answer, now);
        if let Some(order) = ended {
            self.carry_out(index, order);
        }
        true
    }

    /// What is coming, which is something else from now on.
    fn take_coming(&mut self, index: usize, next: Membership) -> Option<Box<Coming>> {
        let membership = &mut self.processes[index].membership;
        match std::mem::replace(membership, next) {
            Membership::Coming(coming) => Some(coming),
            other => {
                *membership = other;
                None
            }
        }
    }

    /// A process that was to be attached cannot be. False: it is a member.
    pub(super) fn attach_failed(&mut self, index: usize, why: &str, now: Instant) -> bool {
        let until = now + LEAVE_DEADLINE;
        let Some(coming) = self.take_coming(index, Membership::Leaving(until, None)) else {
            return false;
        };
        let process = &mut self.processes[index];
        let answer = Some((coming.asker, Answer::Failed(why.to_owned())));
        process.membership = Membership::Leaving(until, answer);
        process.recovery.give_up();
        process.about.slot = None;
        let (alive, line) = (
            process.alive,
            format!("{}: not attached: {why}", process.about.name),
        );
        self.plugs.give(coming.device.slot);
        self.say(&line);
        match alive {
            true => self.carry_out(index, Some(Order::Kill)),
            false => self.bury(index),
        }
        true
    }

    /// A process that is apart was reaped. False: it is a member.
    pub(super) fn apart_ended(&mut self, index: usize, why: &str, now: Instant) -> bool {
        match self.processes[index].membership {
            Membership::Member => false,
            // The vmm, which sees its socket close, says whether it had the device by then.
            Membership::Coming(_) if self.processes[index].recovery.is_joining() => true,
            Membership::Coming(_) => self.attach_failed(index, why, now),
            Membership::Leaving(..) => {
                self.bury(index);
                true
            }
            // One that was made too late: it was killed.
            Membership::Ended(_) => {
                self.ask_removal(index);
                true
            }
            Membership::Gone => true,
        }
    }

    /// A process has ended for good: nothing of it is to be kept.
    fn bury(&mut self, index: usize) {
        let process = &mut self.processes[index];
        process.membership = match std::mem::replace(&mut process.membership, Membership::Gone) {
            Membership::Leaving(_, answer) => Membership::Ended(answer),
            _ => Membership::Ended(None),
        };
        process.orders = None;
        process.about.slot = None;
        self.ask_removal(index);
    }

    fn ask_removal(&mut self, index: usize) {
        let name = self.processes[index].about.name.clone();
        let told = self.tell_spawner(FromSupervisor::Remove {
            // The index fits: see MOST_PROCESSES.
            process: index as u16,
            name,
        });
        // What it could not be told it is told again.
        if !told && let Membership::Ended(answer) = &mut self.processes[index].membership {
            let answer = answer.take();
            self.processes[index].membership = Membership::Leaving(Instant::now() + LEAVE_DEADLINE, answer);
        }
    }

    /// The spawner keeps nothing of a process.
    pub(super) fn process_removed(&mut self, index: usize, now: Instant) {
        let Some(process) = self.processes.get_mut(index) else {
            return;
        };
        if !matches!(process.membership, Membership::Ended(_)) {
            return;
        }
        process.about.name.clear();
        if let Membership::Ended(Some((asker, answer))) =
            std::mem::replace(&mut process.membership, Membership::Gone)
        {
            self.clients.answer(asker, answer, now);
        }
    }

    /// Asks the guest to let go of a device; the answer follows.
    ///
    /// # Errors
    /// Why it cannot be asked.
    pub(super) fn detach(&mut self, device: &str, asker: Asker, now: Instant) -> Result<(), Refusal> {
        self.may_change().map_err(Refusal::Because)?;
        let member = |index: &usize| !self.is_apart(*index);
        let process = self.device_place(device).filter(member);
        let slot = process.and_then(|index| self.processes[index].about.slot);
        let slot = slot.or_else(|| Some(self.remotes[self.remote(device)?].slot()));
        let slot = slot.ok_or(Refusal::NoDevice)?;
        if self.plugs.asked.iter().any(|asked| asked.slot == slot) {
            let why = format!("the guest is asked for '{device}' already");
            return Err(Refusal::Because(why));
        }
        let id = self.requests + 1;
        self.give_to_vmm(id, ToVmm::Detach { slot }, &[])
            .map_err(Refusal::Because)?;
        self.requests = id;
        self.plugs.asked.push(Asked {
            slot,
            id,
            until: now + EJECT_DEADLINE,
            asker,
        });
        Ok(())
    }

    /// The vmm answered request `id`. False: it was none of these.
    pub(super) fn plug_answered(&mut self, id: u64, answer: Result<(), &str>, now: Instant) -> bool {
        if let Some(at) = self.plugs.asked.iter().position(|asked| asked.id == id) {
            if let Err(why) = answer {
                let asked = self.plugs.asked.remove(at);
                self.clients
                    .answer(asked.asker, Answer::Failed(why.to_owned()), now);
            }
            return true;
        }
        let Some(at) = self.plugs.remotes.iter().position(|coming| coming.id == id) else {
            return false;
        };
        let ComingRemote { asker, device, .. } = self.plugs.remotes.remove(at);
        let slot = device.slot;
        let answer = match answer {
            Ok(()) => {
                let about = RemoteDevice {
                    name: device.id,
                    slot,
                };
                let remote = Remote::attached(about, now);
                let gone = self.remotes.iter().position(Remote::is_gone);
                let index = gone.unwrap_or(self.remotes.len());
                match self.remotes.get_mut(index) {
                    Some(place) => *place = remote,
                    None => self.remotes.push(remote),
                }
                self.note_remote(index, EventKind::Attached, Duration::ZERO, "");
                Answer::Attached { slot, pid: None }
            }
            Err(why) => {
                self.plugs.give(slot);
                Answer::Failed(why.to_owned())
            }
        };
        self.clients.answer(asker, answer, now);
        true
    }

    /// The guest let go of the device in `slot`.
    pub(super) fn device_detached(&mut self, slot: u8, now: Instant) {
        // Of those that are gone.
        if slot == 0 {
            return;
        }
        let remote = self.remotes.iter().position(|remote| remote.slot() == slot);
        let process = self.processes.iter().position(|p| p.about.slot == Some(slot));
        if remote.or(process).is_none() {
            return;
        }
        let asked = self.plugs.asked.iter().position(|asked| asked.slot == slot);
        let asker = asked.map(|at| self.plugs.asked.remove(at).asker);
        if let Some(index) = remote {
            self.plugs.give(slot);
            self.note_remote(index, EventKind::Detached, Duration::ZERO, "");
            self.remotes[index].detach();
            if let Some(asker) = asker {
                self.clients.answer(asker, Answer::Detached, now);
            }
            return;
        }
        let Some(index) = process else { return };
        // The guest was not told of one that is still on its way.
        if self.attach_failed(index, "its slot was emptied", now) {
            return;
        }
        self.plugs.give(slot);
        self.note(index, EventKind::Detached, Duration::ZERO, "");
        self.fail_upgrade(index, "the guest let go of the device", now);
        let process = &mut self.processes[index];
        process.about.slot = None;
        // What becomes of its TAP, or its passt, is no matter any more.
        process.about.tap = None;
        let coming = process.recovery.is_spawning();
        process.recovery.give_up();
        let answer = asker.map(|asker| (asker, Answer::Detached));
        process.membership = Membership::Leaving(now + LEAVE_DEADLINE, answer);
        // One that lives sees its socket closed, flushes, and ends by itself. One that the spawner was asked for is
        // killed once it is there.
        if !process.alive && !coming {
            self.bury(index);
        }
    }

    pub(super) fn plugs_deadline(&self) -> Option<Instant> {
        let asked = self.plugs.asked.iter().map(|asked| asked.until);
        let leaving = self.processes.iter().filter_map(|p| match p.membership {
            Membership::Leaving(until, _) => Some(until),
            _ => None,
        });
        asked.chain(leaving).min()
    }

    /// Looks at the time.
    pub(super) fn judge_plugs(&mut self, now: Instant) {
        while let Some(at) = self.plugs.asked.iter().position(|asked| now >= asked.until) {
            let asked = self.plugs.asked.remove(at);
            let seconds = EJECT_DEADLINE.as_secs();
            let why = format!("its guest has not let go of it within {seconds} s, and may do so later");
            self.clients.answer(asked.asker, Answer::Failed(why), now);
        }
        for index in 0..self.processes.len() {
            let process = &mut self.processes[index];
            let Membership::Leaving(until, _) = &mut process.membership else {
                continue;
            };
            if now < *until {
                continue;
            }
            *until = now + LEAVE_DEADLINE;
            if process.alive {
                let line = format!("{}: does not end: killed", process.about.name);
                self.say(&line);
                self.carry_out(index, Some(Order::Kill));
            } else {
                // The spawner does not say whether it has made the last one.
                self.bury(index);
            }
        }
    }
}
