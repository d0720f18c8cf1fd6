//! The driver's side of one split ring (virtio 1.3, 2.7).

use super::memory::{BASE, Memory, USER_BASE};
use anyhow::{Context, Result, bail, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use std::{
    collections::BTreeMap,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    time::{Duration, Instant},
};

/// VIRTQ_DESC_F_NEXT.
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub const INDIRECT: u16 = 4;
/// Longest chain that [`Ring::push`] takes.
const MAX_CHAIN: usize = 16;

/// One buffer of a chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// The device writes it.
    pub writable: bool,
}

/// A split ring; its parts lie one behind the other in guest memory.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<Memory>,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    tables: u64,
    event_idx: bool,
    indirect: bool,
    free: Vec<u16>,
    in_flight: BTreeMap<u16, Vec<u16>>,
    next_available: u16,
    kicked: u16,
    next_used: u16,
    /// Doorbell.
    pub kick: EventFd,
    /// Interrupt.
    pub call: EventFd,
    /// Fault.
    pub error: EventFd,
}

impl Ring {
    /// Guest memory that a ring of `size` takes.
    #[must_use]
    pub fn footprint(size: u16) -> u64 {
        let size = u64::from(size);
        let plain = size * 16 + 6 + size * 2 + 6 + size * 8;
        plain.next_multiple_of(4096) + size * 16 * MAX_CHAIN as u64
    }

    /// An empty ring at guest physical address `at` (a multiple of 4096).
    ///
    /// # Errors
    /// When the system has no eventfd left, or `at` is not memory.
    pub fn new(memory: Arc<Memory>, at: u64, size: u16, event_idx: bool, indirect: bool) -> Result<Self> {
        ensure!(size.is_power_of_two(), "ring size {size}");
        let available = at + u64::from(size) * 16;
        let used = (available + 6 + u64::from(size) * 2).next_multiple_of(4);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        memory.write(at, &vec![0; usize::try_from(Self::footprint(size))?])?;
        Ok(Self {
            memory,
            size,
            descriptors: at,
            available,
            used,
            tables: (used + 6 + u64::from(size) * 8).next_multiple_of(4096),
            event_idx,
            indirect,
            free: (0..size).rev().collect(),
            in_flight: BTreeMap::new(),
            next_available: 0,
            kicked: 0,
            next_used: 0,
            kick: EventFd::from_flags(flags)?,
            call: EventFd::from_flags(flags)?,
            error: EventFd::from_flags(flags)?,
        })
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Chains that the device has not given back.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The used index, as SET_VRING_BASE restarts a ring that has no in-flight region.
    #[must_use]
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Guest physical addresses of descriptor table, available ring and used ring, for drivers that
    /// lay out their chains themselves.
    #[must_use]
    pub fn parts(&self) -> [u64; 3] {
        [self.descriptors, self.available, self.used]
    }

    /// The payload of SET_VRING_ADDR for queue `index`.
    #[must_use]
    pub fn address_message(&self, index: u32) -> Vec<u8> {
        let mut payload = Vec::with_capacity(40);
        payload.extend(index.to_le_bytes());
        payload.extend(0_u32.to_le_bytes());
        for at in [self.descriptors, self.used, self.available] {
            payload.extend((at - BASE + USER_BASE).to_le_bytes());
        }
        payload.extend(0_u64.to_le_bytes());
        payload
    }

    /// Writes descriptor `index` as it is given, valid or not.
    ///
    /// # Errors
    /// When `index` is past the ring.
    pub fn write_descriptor(&self, index: u16, segment: Segment, flags: u16, next: u16) -> Result<()> {
        ensure!(index < self.size, "descriptor {index}");
        self.write_at(self.descriptors + u64::from(index) * 16, segment, flags, next)
    }

    fn write_at(&self, at: u64, segment: Segment, flags: u16, next: u16) -> Result<()> {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&segment.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&segment.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write(at, &bytes)
    }

    /// Makes a chain and puts it into the available ring; [`Ring::notify`] tells the device.
    /// Returns its head.
    ///
    /// # Errors
    /// When the ring is full.
    pub fn push(&mut self, chain: &[Segment]) -> Result<u16> {
        ensure!(
            !chain.is_empty() && chain.len() <= MAX_CHAIN,
            "chain of {}",
            chain.len()
        );
        let need = if self.indirect { 1 } else { chain.len() };
        ensure!(self.free.len() >= need, "the ring is full");
        let taken: Vec<u16> = (0..need).filter_map(|_| self.free.pop()).collect();
        let head = taken[0];
        let flags = |at: usize| {
            let more = if at + 1 < chain.len() { NEXT } else { 0 };
            more | if chain[at].writable { WRITE } else { 0 }
        };
        if self.indirect {
            let table = self.tables + u64::from(head) * 16 * MAX_CHAIN as u64;
            for (at, segment) in chain.iter().enumerate() {
                self.write_at(table + at as u64 * 16, *segment, flags(at), at as u16 + 1)?;
            }
            let table = Segment {
                address: table,
                length: chain.len() as u32 * 16,
                writable: false,
            };
            self.write_descriptor(head, table, INDIRECT, 0)?;
        } else {
            for (at, segment) in chain.iter().enumerate() {
                let next = taken.get(at + 1).copied().unwrap_or(0);
                self.write_descriptor(taken[at], *segment, flags(at), next)?;
            }
        }
        self.in_flight.insert(head, taken);
        self.offer(head)?;
        Ok(head)
    }

    /// Puts `head` into the available ring, whatever it names; for chains made by hand.
    ///
    /// # Errors
    /// When the ring is no longer memory.
    pub fn offer(&mut self, head: u16) -> Result<()> {
        let slot = u64::from(self.next_available % self.size);
        self.memory
            .write(self.available + 4 + slot * 2, &head.to_le_bytes())?;
        self.next_available = self.next_available.wrapping_add(1);
        self.memory.publish(self.available + 2, self.next_available)
    }

    /// Sets the available index to anything.
    ///
    /// # Errors
    /// When the ring is no longer memory.
    pub fn set_available_index(&mut self, index: u16) -> Result<()> {
        self.next_available = index;
        self.memory.publish(self.available + 2, index)
    }

    /// Takes descriptors out of [`Ring::push`]'s hands, for chains made by hand.
    pub fn reserve(&mut self, index: u16) {
        self.free.retain(|free| *free != index);
    }

    /// Rings the doorbell if the device wants to hear of what was pushed since last time.
    ///
    /// # Errors
    /// When the eventfd refuses.
    pub fn notify(&mut self) -> Result<bool> {
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.memory.observe(self.used + 4 + u64::from(self.size) * 8)?;
            let new = self.next_available;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(self.kicked)
        } else {
            self.memory.observe(self.used)? & 1 == 0
        };
        self.kicked = self.next_available;
        if wanted {
            self.kick.write(1)?;
        }
        Ok(wanted)
    }

    /// Rings the doorbell in any case.
    ///
    /// # Errors
    /// When the eventfd refuses.
    pub fn force_kick(&mut self) -> Result<()> {
        self.kicked = self.next_available;
        self.kick.write(1)?;
        Ok(())
    }

    /// The next chain that the device has used, if there is one: its head, and the bytes written.
    ///
    /// # Errors
    /// When the device gives back what it was not given, or has been given back already.
    pub fn take_used(&mut self) -> Result<Option<(u16, u32)>> {
        let published = self.memory.observe(self.used + 2)?;
        if published == self.next_used {
            return Ok(None);
        }
        ensure!(
            published.wrapping_sub(self.next_used) <= self.size,
            "used index {published} is more than a ring ahead of {}",
            self.next_used
        );
        let slot = u64::from(self.next_used % self.size);
        let element = self.memory.read(self.used + 4 + slot * 8, 8)?;
        let head = u32::from_le_bytes([element[0], element[1], element[2], element[3]]);
        let length = u32::from_le_bytes([element[4], element[5], element[6], element[7]]);
        let head = u16::try_from(head).context("used element names no descriptor")?;
        let Some(chain) = self.in_flight.remove(&head) else {
            bail!("the device completed head {head}, which is not in flight");
        };
        self.free.extend(chain.into_iter().rev());
        self.next_used = self.next_used.wrapping_add(1);
        Ok(Some((head, length)))
    }

    /// Waits for the next used chain.
    ///
    /// # Errors
    /// As [`Ring::take_used`]; and when none comes before `deadline` has passed.
    pub fn wait_used(&mut self, deadline: Duration) -> Result<(u16, u32)> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(used) = self.take_used()? {
                return Ok(used);
            }
            if self.event_idx {
                let at = self.available + 4 + u64::from(self.size) * 2;
                self.memory.publish(at, self.next_used)?;
                fence(Ordering::SeqCst);
                if let Some(used) = self.take_used()? {
                    return Ok(used);
                }
            }
            self.wait_call(end)?;
        }
    }

    fn wait_call(&self, end: Instant) -> Result<()> {
        let left = end.saturating_duration_since(Instant::now());
        let mut polled = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        let ready = poll(
            &mut polled,
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
        )?;
        ensure!(
            ready > 0,
            "no interrupt in time, {} chains in flight",
            self.in_flight.len()
        );
        self.call.read()?;
        Ok(())
    }

    /// Waits until the back end signals the call or the error eventfd; true for the latter.
    ///
    /// # Errors
    /// When it does neither before `deadline` has passed.
    pub fn wait_signal(&self, deadline: Duration) -> Result<bool> {
        let mut polled = [
            PollFd::new(self.call.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.error.as_fd(), PollFlags::POLLIN),
        ];
        let ready = poll(
            &mut polled,
            PollTimeout::try_from(deadline).unwrap_or(PollTimeout::MAX),
        )?;
        ensure!(ready > 0, "neither an interrupt nor an error in time");
        Ok(polled[1].any().unwrap_or(false))
    }
}
