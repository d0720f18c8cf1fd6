//! A block driver that costs little: fixed chains, no allocation for a request, EVENT_IDX.

use crate::frontend_harness::{DEADLINE, Memory, NEXT, Ring, STATUS_OK, Segment, WRITE};
use anyhow::{Result, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{read, write},
};
use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    time::{Duration, Instant},
};

/// Descriptors of a chain: header, data, status.
const CHAIN: u16 = 3;
/// Header and status, before the data.
const SLOT_HEADER: u64 = 4096;
const STATUS_AT: u64 = 16;
const SECTOR: u64 = 512;

/// What requests do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Operation {
    Read,
    Write,
}

/// Where they do it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pattern {
    Random,
    Sequential,
    /// Each request in the next of all 64 KiB clusters, in an order that scatters them.
    Clusters,
}

/// The requests of one queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub(super) operation: Operation,
    pub(super) pattern: Pattern,
    /// Bytes of a request.
    pub(super) block: u64,
    /// Requests in flight.
    pub(super) depth: u16,
    /// Bytes of the disk that are touched.
    pub(super) span: u64,
    /// A FLUSH after so many requests; 0 for none.
    pub(super) flush_every: u64,
}

/// When a turn ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Limit {
    Time(Duration),
    Requests(u64),
}

/// One queue.
pub(super) struct Lane {
    memory: Arc<Memory>,
    kick: OwnedFd,
    call: OwnedFd,
    size: u16,
    available: u64,
    used: u64,
    slots: u64,
    work: Work,
    next_available: u16,
    kicked: u16,
    next_used: u16,
    in_flight: u16,
    count: u64,
    random: u64,
}

impl Lane {
    /// Lays out chains for `work` in `ring`; the requests' memory starts at `slots`.
    pub(super) fn new(memory: &Arc<Memory>, ring: &Ring, slots: u64, work: Work, seed: u64) -> Result<Self> {
        ensure!(
            work.depth * CHAIN <= ring.size(),
            "depth {} needs a longer ring",
            work.depth
        );
        let [_, available, used] = ring.parts();
        let lane = Self {
            memory: Arc::clone(memory),
            kick: ring.kick.as_fd().try_clone_to_owned()?,
            call: ring.call.as_fd().try_clone_to_owned()?,
            size: ring.size(),
            available,
            used,
            slots,
            work,
            next_available: 0,
            kicked: 0,
            next_used: 0,
            in_flight: 0,
            count: 0,
            random: seed | 1,
        };
        for slot in 0..work.depth {
            lane.lay_out(ring, slot)?;
        }
        Ok(lane)
    }

    /// Guest memory that the requests take.
    pub(super) fn footprint(work: &Work) -> u64 {
        u64::from(work.depth) * Self::stride(work)
    }

    fn stride(work: &Work) -> u64 {
        SLOT_HEADER + work.block.next_multiple_of(4096)
    }

    fn slot(&self, slot: u16) -> u64 {
        self.slots + u64::from(slot) * Self::stride(&self.work)
    }

    fn lay_out(&self, ring: &Ring, slot: u16) -> Result<()> {
        let (at, head) = (self.slot(slot), slot * CHAIN);
        let segment = |address, length, writable| Segment {
            address,
            length,
            writable,
        };
        let reads = self.work.operation == Operation::Read;
        let data = NEXT | if reads { WRITE } else { 0 };
        let length = u32::try_from(self.work.block)?;
        self.memory.write(
            at + SLOT_HEADER,
            &vec![slot as u8 | 0x40; self.work.block as usize],
        )?;
        ring.write_descriptor(head, segment(at, 16, false), NEXT, head + 1)?;
        ring.write_descriptor(head + 1, segment(at + SLOT_HEADER, length, reads), data, head + 2)?;
        ring.write_descriptor(head + 2, segment(at + STATUS_AT, 1, true), WRITE, 0)
    }

    /// Runs requests for one turn and waits for the last of them; how many there were.
    pub(super) fn run(&mut self, limit: Limit) -> Result<u64> {
        let start = Instant::now();
        let before = self.count;
        for slot in 0..self.work.depth {
            self.offer(slot)?;
        }
        loop {
            self.memory.publish(self.available + 2, self.next_available)?;
            self.notify()?;
            self.wait()?;
            let over = match limit {
                Limit::Time(time) => start.elapsed() >= time,
                Limit::Requests(requests) => self.count - before >= requests,
            };
            let published = self.memory.observe(self.used + 2)?;
            while self.next_used != published {
                let slot = self.take()?;
                if !over {
                    self.offer(slot)?;
                }
            }
            if self.in_flight == 0 {
                return Ok(self.count - before);
            }
        }
    }

    fn next_sector(&mut self) -> u64 {
        let blocks = self.work.span / self.work.block;
        let block = match self.work.pattern {
            Pattern::Random => {
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                self.random % blocks
            }
            Pattern::Sequential => self.count % blocks,
            Pattern::Clusters => {
                let clusters = self.work.span >> 16;
                // An odd step visits every one of a power of two.
                let cluster = self.count.wrapping_mul(0x9E37_79B1) % clusters;
                (cluster << 16) / self.work.block
            }
        };
        block * self.work.block / SECTOR
    }

    fn offer(&mut self, slot: u16) -> Result<()> {
        let kind = match self.work.operation {
            Operation::Read => 0_u32,
            Operation::Write => 1,
        };
        let sector = self.next_sector();
        self.count += 1;
        let (kind, sector) = match self.work.flush_every {
            every if every > 0 && self.count.is_multiple_of(every) => (4, 0),
            _ => (kind, sector),
        };
        let mut header = [0; 17];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&sector.to_le_bytes());
        header[16] = 0xEE;
        self.memory.write(self.slot(slot), &header)?;
        let entry = self.available + 4 + u64::from(self.next_available % self.size) * 2;
        self.memory.write(entry, &(slot * CHAIN).to_le_bytes())?;
        self.next_available = self.next_available.wrapping_add(1);
        self.in_flight += 1;
        Ok(())
    }

    fn take(&mut self) -> Result<u16> {
        let entry = self.used + 4 + u64::from(self.next_used % self.size) * 8;
        let slot = self.memory.observe(entry)? / CHAIN;
        self.next_used = self.next_used.wrapping_add(1);
        self.in_flight -= 1;
        let status = self.memory.observe(self.slot(slot) + STATUS_AT)? as u8;
        ensure!(status == STATUS_OK, "a request came back with status {status}");
        Ok(slot)
    }

    fn notify(&mut self) -> Result<()> {
        fence(Ordering::SeqCst);
        let event = self.memory.observe(self.used + 4 + u64::from(self.size) * 8)?;
        let new = self.next_available;
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(self.kicked) {
            write(&self.kick, &1_u64.to_ne_bytes())?;
        }
        self.kicked = new;
        Ok(())
    }

    /// Until something was used.
    fn wait(&mut self) -> Result<()> {
        loop {
            if self.memory.observe(self.used + 2)? != self.next_used {
                return Ok(());
            }
            let event = self.available + 4 + u64::from(self.size) * 2;
            self.memory.publish(event, self.next_used)?;
            fence(Ordering::SeqCst);
            if self.memory.observe(self.used + 2)? != self.next_used {
                return Ok(());
            }
            let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PollTimeout::try_from(DEADLINE)?)?;
            ensure!(
                ready > 0,
                "no interrupt in time, {} requests in flight",
                self.in_flight
            );
            read(&self.call, &mut [0; 8])?;
        }
    }
}
