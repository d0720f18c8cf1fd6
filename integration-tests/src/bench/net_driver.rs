//! A network driver that costs little: chains laid out once, no allocation for a frame, EVENT_IDX.

use crate::frontend_harness::{INDIRECT, Memory, NEXT, Ring, Segment, WRITE};
use anyhow::{Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

/// Bytes of the virtio-net header.
pub(super) const HEADER: u64 = 12;
/// `num_buffers` in it.
const NUM_BUFFERS: u64 = 10;
const PAGE: u64 = 4096;

/// How a buffer is made of descriptors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Shape {
    /// One descriptor of so many bytes.
    Whole(u64),
    /// The header, the rest of its page, and whole pages: the 19 descriptors that Linux posts for
    /// super-frames without mergeable buffers, in an indirect table; less for fewer bytes in all.
    Chain(u64),
}

impl Shape {
    /// From one slot to the next.
    fn stride(self) -> u64 {
        match self {
            Self::Whole(length) => length.next_multiple_of(512),
            Self::Chain(_) => 20 * PAGE,
        }
    }

    /// Where a slot's buffer begins, behind its indirect table if it has one.
    fn start(self) -> u64 {
        match self {
            Self::Whole(_) => 0,
            Self::Chain(_) => PAGE,
        }
    }

    /// Offsets and lengths in a slot.
    fn parts(self) -> Vec<(u64, u64)> {
        match self {
            Self::Whole(length) => vec![(0, length)],
            Self::Chain(length) => {
                let first = [(PAGE, HEADER), (PAGE + HEADER, PAGE - HEADER)];
                let pages = (2..19).map(|page| (page * PAGE, PAGE));
                let end = PAGE + length;
                let parts = first.into_iter().chain(pages).filter(|(at, _)| *at < end);
                parts.map(|(at, length)| (at, length.min(end - at))).collect()
            }
        }
    }
}

/// One ring whose slot `n` is descriptor `n`.
pub(super) struct Lane {
    memory: Arc<Memory>,
    kick: OwnedFd,
    call: OwnedFd,
    size: u16,
    available: u64,
    used: u64,
    slots: u64,
    shape: Shape,
    next_available: u16,
    kicked: u16,
    next_used: u16,
}

impl Lane {
    /// Guest memory for the slots of a ring.
    pub(super) fn footprint(size: u16, shape: Shape) -> u64 {
        (u64::from(size) * shape.stride()).next_multiple_of(PAGE)
    }

    /// Lays out a buffer of `shape` in each slot, for the device to write or to read.
    pub(super) fn new(
        memory: &Arc<Memory>,
        ring: &Ring,
        slots: u64,
        shape: Shape,
        writable: bool,
    ) -> Result<Self> {
        let [_, available, used] = ring.parts();
        let lane = Self {
            memory: Arc::clone(memory),
            kick: ring.kick.as_fd().try_clone_to_owned()?,
            call: ring.call.as_fd().try_clone_to_owned()?,
            size: ring.size(),
            available,
            used,
            slots,
            shape,
            next_available: 0,
            kicked: 0,
            next_used: 0,
        };
        let flag = if writable { WRITE } else { 0 };
        for slot in 0..lane.size {
            let at = lane.slot(slot);
            let parts = shape.parts();
            let segment = |&(offset, length): &(u64, u64)| Segment {
                address: at + offset,
                length: length as u32,
                writable,
            };
            if let [only] = parts.as_slice() {
                ring.write_descriptor(slot, segment(only), flag, 0)?;
                continue;
            }
            for (index, part) in parts.iter().enumerate() {
                let last = index + 1 == parts.len();
                let flags = flag | if last { 0 } else { NEXT };
                lane.write_entry(at + index as u64 * 16, segment(part), flags, index as u16 + 1)?;
            }
            let table = Segment {
                address: at,
                length: parts.len() as u32 * 16,
                writable: false,
            };
            ring.write_descriptor(slot, table, INDIRECT, 0)?;
        }
        Ok(lane)
    }

    fn write_entry(&self, at: u64, segment: Segment, flags: u16, next: u16) -> Result<()> {
        let mut bytes = segment.address.to_le_bytes().to_vec();
        bytes.extend(segment.length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write(at, &bytes)
    }

    fn slot(&self, slot: u16) -> u64 {
        self.slots + u64::from(slot) * self.shape.stride()
    }

    /// Slots.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Writes header and frame into `slot`, whose parts follow each other in memory.
    pub(super) fn fill(&self, slot: u16, bytes: &[u8]) -> Result<()> {
        self.memory.write(self.slot(slot) + self.shape.start(), bytes)
    }

    /// Buffers that the frame that starts in `slot` occupies.
    pub(super) fn buffers(&self, slot: u16) -> Result<u16> {
        self.memory
            .observe(self.slot(slot) + self.shape.start() + NUM_BUFFERS)
    }

    /// Makes `slot` available at the next [`Lane::publish`].
    pub(super) fn offer(&mut self, slot: u16) -> Result<()> {
        let entry = self.available + 4 + u64::from(self.next_available % self.size) * 2;
        self.next_available = self.next_available.wrapping_add(1);
        self.memory.write(entry, &slot.to_le_bytes())
    }

    /// Shows the device what was offered, and rings the doorbell if it wants to hear of it.
    pub(super) fn publish(&mut self) -> Result<()> {
        if self.kicked == self.next_available {
            return Ok(());
        }
        self.memory.publish(self.available + 2, self.next_available)?;
        fence(Ordering::SeqCst);
        let event = self.memory.observe(self.used + 4 + u64::from(self.size) * 8)?;
        let new = self.next_available;
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(self.kicked) {
            write(&self.kick, &1_u64.to_ne_bytes())?;
        }
        self.kicked = new;
        Ok(())
    }

    /// The next slot that the device has used.
    pub(super) fn take(&mut self) -> Result<Option<u16>> {
        if self.memory.observe(self.used + 2)? == self.next_used {
            return Ok(None);
        }
        let entry = self.used + 4 + u64::from(self.next_used % self.size) * 8;
        let slot = self.memory.observe(entry)?;
        ensure!(slot < self.size, "the device used slot {slot}");
        self.next_used = self.next_used.wrapping_add(1);
        Ok(Some(slot))
    }

    /// Asks for an interrupt when `more` further slots are used; true if there is a used slot already.
    pub(super) fn arm(&self, more: u16) -> Result<bool> {
        let event = self.next_used.wrapping_add(more);
        self.memory
            .publish(self.available + 4 + u64::from(self.size) * 2, event)?;
        fence(Ordering::SeqCst);
        Ok(self.memory.observe(self.used + 2)?.wrapping_sub(self.next_used) > more)
    }

    /// Slots that the device holds or has not been seen to have used.
    pub(super) fn outstanding(&self) -> u16 {
        self.next_available.wrapping_sub(self.next_used)
    }
}

/// Waits until the device interrupts on one of `lanes`; false if it does not before `deadline`.
pub(super) fn wait(lanes: &[&Lane], deadline: Duration) -> Result<bool> {
    let mut fds: Vec<_> = lanes
        .iter()
        .map(|lane| PollFd::new(lane.call.as_fd(), PollFlags::POLLIN))
        .collect();
    let ready = poll(&mut fds, PollTimeout::try_from(deadline)?)?;
    let woken: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
    for (lane, _) in lanes.iter().zip(woken).filter(|(_, woken)| *woken) {
        read(&lane.call, &mut [0; 8])?;
    }
    Ok(ready > 0)
}
