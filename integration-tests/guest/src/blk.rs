//! Block requests (virtio 1.3, 5.2): the driver, and the scenarios `blk`, `msix-mask`, `needs-reset`, `reboot`.

use crate::{
    cpu, memory,
    parameters::Parameters,
    pci::Function,
    queue::{NEXT, Queue, WRITE, wait_any},
    scenario::{Failure, after_work, before_work},
    serial::line,
    virtio::{Device, EVENT_IDX, Mask},
};
use guest_contract::{Checksum, fill, holds};

const BLOCK_DEVICE: u16 = 2;
const FLUSH_FEATURE: u64 = 1 << 9;
const MULTI_QUEUE: u64 = 1 << 12;
const DISCARD_FEATURE: u64 = 1 << 13;

pub(crate) const READ: u32 = 0;
pub(crate) const WRITE_OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const DISCARD: u32 = 11;

pub(crate) const SECTOR: u64 = 512;
/// Bytes before a slot's data: request header at 0, status at 16, discard segment at 32.
pub(crate) const HEADER: usize = 512;
pub(crate) const MAX_QUEUES: usize = 4;
pub(crate) const MAX_DEPTH: u64 = 64;
/// Descriptors of one request.
const CHAIN: u16 = 3;

/// Kind, number and the slot's memory of a request that is done.
pub(crate) type Completion<'a> = (u32, u64, &'a mut [u8]);

/// One queue with its request slots; slot `n` owns descriptors `3 n` to `3 n + 2`.
pub(crate) struct Slots {
    memory: &'static mut [u8],
    stride: usize,
    depth: u16,
    /// The request in each slot: kind and number.
    requests: [Option<(u32, u64)>; MAX_DEPTH as usize],
}

impl Slots {
    fn new(depth: u16, size: usize) -> Result<Self, Failure> {
        let stride = (HEADER + size).next_multiple_of(512);
        Ok(Self {
            memory: memory::pages(stride * usize::from(depth))?,
            stride,
            depth,
            requests: [None; MAX_DEPTH as usize],
        })
    }

    pub(crate) fn slot(&mut self, slot: u16) -> &mut [u8] {
        let start = usize::from(slot) * self.stride;
        &mut self.memory[start..start + self.stride]
    }

    pub(crate) fn free(&self) -> Option<u16> {
        (0..self.depth).find(|slot| self.requests[usize::from(*slot)].is_none())
    }

    fn busy(&self) -> bool {
        self.requests.iter().any(Option::is_some)
    }

    /// Writes the segment of a discard in `slot`: `count` sectors from `sector`.
    pub(crate) fn describe_discard(&mut self, slot: u16, sector: u64, count: u32) {
        let memory = self.slot(slot);
        memory[32..40].copy_from_slice(&sector.to_le_bytes());
        memory[40..44].copy_from_slice(&count.to_le_bytes());
        memory[44..48].fill(0);
    }

    /// Puts a request into `queue`. `size` bytes of data follow the header.
    pub(crate) fn submit(
        &mut self,
        queue: &mut Queue,
        slot: u16,
        kind: u32,
        number: u64,
        sector: u64,
        size: u32,
    ) {
        let memory = self.slot(slot);
        memory[..4].copy_from_slice(&kind.to_le_bytes());
        memory[4..8].fill(0);
        memory[8..16].copy_from_slice(&sector.to_le_bytes());
        memory[16] = 0xEE;
        let start = memory.as_ptr() as u64;
        let data = if kind == DISCARD {
            start + 32
        } else {
            start + HEADER as u64
        };
        let first = slot * CHAIN;
        let to_driver = if kind == READ { WRITE } else { 0 };
        let after_header = if size == 0 { first + 2 } else { first + 1 };
        queue.describe(first, (start, 16), NEXT, after_header);
        queue.describe(first + 1, (data, size), NEXT | to_driver, first + 2);
        queue.describe(first + 2, (start + 16, 1), WRITE, 0);
        self.requests[usize::from(slot)] = Some((kind, number));
        queue.submit(first);
    }

    /// Takes one completion: kind, number, and the slot's memory.
    pub(crate) fn complete(&mut self, queue: &mut Queue) -> Result<Option<Completion<'_>>, Failure> {
        let Some((head, _)) = queue.pop() else {
            return Ok(None);
        };
        let slot = head / CHAIN;
        let request = self.requests.get_mut(usize::from(slot)).and_then(Option::take);
        let Some((kind, number)) = request else {
            return Err("a request completed that was not in flight");
        };
        let memory = self.slot(slot);
        if memory[16] != 0 {
            return Err("a request failed");
        }
        Ok(Some((kind, number, memory)))
    }
}

/// The scenario's parameters.
struct Work {
    requests: u64,
    size: usize,
    seed: u64,
    polled: bool,
    depth: u64,
}

impl Work {
    fn sectors(&self) -> u64 {
        self.size as u64 / SECTOR
    }
}

/// A disk with its queues.
pub(crate) struct Disk {
    device: Device,
    queues: [Option<(Queue, Slots)>; MAX_QUEUES],
}

impl Disk {
    pub(crate) fn new(parameters: Parameters<'_>, depth: u64, size: usize) -> Result<Self, Failure> {
        Self::at(parameters.number("disk", 0), parameters, depth, size)
    }

    /// Disk `number` of those on the bus.
    pub(crate) fn at(
        number: u64,
        parameters: Parameters<'_>,
        depth: u64,
        size: usize,
    ) -> Result<Self, Failure> {
        let mut wanted = FLUSH_FEATURE | MULTI_QUEUE | DISCARD_FEATURE;
        if parameters.number("event-idx", 1) == 1 {
            wanted |= EVENT_IDX;
        }
        let function = Function::find(BLOCK_DEVICE, number)?;
        let device = Device::new(function, wanted)?;
        let count = parameters.number("queues", 1).clamp(1, MAX_QUEUES as u64) as u16;
        if count > device.num_queues() {
            return Err("the device has fewer queues");
        }
        if depth == 0 || depth > MAX_DEPTH {
            return Err("depth is 1 to 64");
        }
        let mut queues = [const { None }; MAX_QUEUES];
        for (index, place) in (0..count).zip(&mut queues) {
            let queue = device.queue(index, 256)?;
            let depth = (depth as u16).min(queue.size() / CHAIN);
            *place = Some((queue, Slots::new(depth, size)?));
        }
        device.start();
        Ok(Self { device, queues })
    }

    /// Sectors.
    pub(crate) fn capacity(&self) -> u64 {
        let config = self.device.config;
        u64::from(config.read32(0)) | u64::from(config.read32(4)) << 32
    }

    /// Runs `requests` requests of `kind` on all queues in turn; returns the sum of the blocks'
    /// checksums.
    fn run(&mut self, work: &Work, kind: u32) -> Result<u64, Failure> {
        let (mut next, mut done, mut sum) = (0, 0, 0_u64);
        while done < work.requests {
            for (queue, slots) in self.queues.iter_mut().flatten() {
                let mut submitted = false;
                while next < work.requests {
                    let Some(slot) = slots.free() else { break };
                    if kind == WRITE_OUT {
                        fill(&mut slots.slot(slot)[HEADER..HEADER + work.size], work.seed, next);
                    }
                    slots.submit(queue, slot, kind, next, next * work.sectors(), work.size as u32);
                    next += 1;
                    submitted = true;
                }
                if submitted {
                    queue.notify();
                }
            }
            self.wait(work);
            for (queue, slots) in self.queues.iter_mut().flatten() {
                while let Some((kind, number, memory)) = slots.complete(queue)? {
                    done += 1;
                    let data = &memory[HEADER..HEADER + work.size];
                    if kind == READ && !holds(data, work.seed, number) {
                        return Err("data differs");
                    }
                    let mut checksum = Checksum::default();
                    checksum.update(data);
                    sum = sum.wrapping_add(checksum.0);
                }
            }
        }
        Ok(sum)
    }

    /// The queues with their slots.
    pub(crate) fn queues(&mut self) -> impl Iterator<Item = &mut (Queue, Slots)> {
        self.queues.iter_mut().flatten()
    }

    /// Whether a request is under way.
    pub(crate) fn busy(&self) -> bool {
        self.queues.iter().flatten().any(|(_, slots)| slots.busy())
    }

    /// Whether the device discards.
    pub(crate) fn can_discard(&self) -> bool {
        self.device.features & DISCARD_FEATURE != 0
    }

    /// Asks for an interrupt at the next used chain; whether there is one already.
    pub(crate) fn arm(&mut self) -> bool {
        self.queues().for_each(|(queue, _)| queue.arm());
        self.queues.iter().flatten().any(|(queue, _)| queue.has_used())
    }

    /// Halts until a queue has a used chain; returns at once where nothing is under way.
    pub(crate) fn wait_used(&mut self) {
        while self.busy() {
            let seen = cpu::interrupts();
            if self.arm() {
                return;
            }
            cpu::wait_for_interrupt(seen);
        }
    }

    /// Until a queue has a used chain.
    fn wait(&mut self, work: &Work) {
        loop {
            let seen = cpu::interrupts();
            for (queue, _) in self.queues.iter_mut().flatten() {
                if work.polled { queue.disarm() } else { queue.arm() }
            }
            if self.queues.iter().flatten().any(|(queue, _)| queue.has_used()) {
                return;
            }
            if work.polled {
                core::hint::spin_loop();
            } else {
                cpu::wait_for_interrupt(seen);
            }
        }
    }

    /// One request on the first queue, to its end.
    pub(crate) fn one(&mut self, kind: u32, sector: u64, size: usize) -> Result<&mut [u8], Failure> {
        let Some((queue, slots)) = &mut self.queues[0] else {
            return Err("no queue");
        };
        slots.submit(queue, 0, kind, 0, sector, size as u32);
        queue.notify();
        wait_any(core::slice::from_mut(queue));
        match slots.complete(queue)? {
            Some((_, _, memory)) => Ok(memory),
            None => Err("nothing completed"),
        }
    }

    /// Where the first slot's data goes before [`Disk::one`].
    fn data(&mut self) -> Result<&mut [u8], Failure> {
        match &mut self.queues[0] {
            Some((_, slots)) => Ok(slots.slot(0)),
            None => Err("no queue"),
        }
    }

    fn discard(&mut self, sector: u64, count: u32) -> Result<(), Failure> {
        if let Some((_, slots)) = &mut self.queues[0] {
            slots.describe_discard(0, sector, count);
        }
        self.one(DISCARD, 0, 16).map(drop)
    }

    fn report(&self) {
        let interrupts = self.queues.iter().flatten().map(|(queue, _)| queue.interrupts());
        let kicks = self.queues.iter().flatten().map(|(queue, _)| queue.kicks);
        line!("interrupts={}", interrupts.sum::<u64>());
        line!("doorbells={}", kicks.sum::<u64>());
    }
}

/// `blk`: writes `requests / 2` blocks, flushes, reads them back and checks them.
pub(crate) fn scenario(parameters: Parameters<'_>) -> Result<(), Failure> {
    let work = Work {
        requests: parameters.number("requests", 10_000) / 2,
        size: parameters.number("size", 4096).clamp(SECTOR, 65536) as usize / SECTOR as usize
            * SECTOR as usize,
        seed: parameters.number("seed", 1),
        polled: parameters.text("mode") == Some("poll"),
        depth: parameters.number("depth", 32),
    };
    match parameters.number("neighbour", 0) {
        0 => {}
        number => leave_waiting(number, parameters)?,
    }
    let mut disk = Disk::new(parameters, work.depth, work.size)?;
    line!("capacity={}", disk.capacity());
    if work.requests * work.sectors() > disk.capacity() {
        return Err("the disk is too small");
    }
    before_work(parameters);
    let start = cpu::time();
    let written = disk.run(&work, WRITE_OUT)?;
    if disk.device.features & FLUSH_FEATURE != 0 {
        disk.one(FLUSH, 0, 0)?;
    }
    let read = disk.run(&work, READ)?;
    let cycles = cpu::time() - start;
    after_work(parameters);
    line!("cycles={cycles}");
    line!("requests={}", work.requests * 2);
    line!("checksum={read:016x}");
    disk.report();
    if written != read {
        return Err("what was read is not what was written");
    }
    if parameters.number("discard", 0) == 1 {
        discard_half(&mut disk, &work)?;
    }
    Ok(())
}

/// Drives another disk, with a request under way of which nothing is expected.
/// The queue's memory is never given back. Not inlined: a disk takes a good part of the stack.
#[inline(never)]
fn leave_waiting(number: u64, parameters: Parameters<'_>) -> Result<(), Failure> {
    let mut disk = Disk::at(number, parameters, 1, SECTOR as usize)?;
    for (queue, slots) in disk.queues() {
        slots.submit(queue, 0, READ, 0, 0, SECTOR as u32);
        queue.notify();
    }
    Ok(())
}

/// Discards the first half of the blocks, and checks that they read as zeros.
fn discard_half(disk: &mut Disk, work: &Work) -> Result<(), Failure> {
    if disk.device.features & DISCARD_FEATURE == 0 {
        return Err("the device cannot discard");
    }
    let blocks = work.requests / 2;
    disk.discard(0, (blocks * work.sectors()) as u32)?;
    for block in 0..blocks {
        let data = disk.one(READ, block * work.sectors(), work.size)?;
        if data[HEADER..HEADER + work.size].iter().any(|byte| *byte != 0) {
            return Err("discarded data does not read as zeros");
        }
    }
    line!("discarded={blocks}");
    Ok(())
}

/// `needs-reset`: writes blocks, waits until the device asks to be reset, resets it, and works with it as before.
pub(crate) fn needs_reset_scenario(parameters: Parameters<'_>) -> Result<(), Failure> {
    let work = Work {
        requests: parameters.number("requests", 64),
        size: 4096,
        seed: parameters.number("seed", 1),
        polled: false,
        depth: 8,
    };
    let written = {
        let mut disk = Disk::new(parameters, work.depth, work.size)?;
        let written = disk.run(&work, WRITE_OUT)?;
        line!("ready=1");
        disk.device.await_needs_reset()?;
        written
    };
    let mut disk = Disk::new(parameters, work.depth, work.size)?;
    let read = disk.run(&work, READ)?;
    line!("checksum={read:016x}");
    if written != read || disk.run(&work, WRITE_OUT)? != read {
        return Err("what was read is not what was written");
    }
    Ok(())
}

/// `msix-mask`: masks and unmasks the queue's vector `rounds` times while requests complete. In
/// even rounds a request completes while the vector is masked: its interrupt must be pending, and
/// come with the unmasking. In odd rounds completion and unmasking race.
pub(crate) fn mask_scenario(parameters: Parameters<'_>) -> Result<(), Failure> {
    let rounds = parameters.number("rounds", 1000);
    let depth = parameters.number("depth", 8).clamp(1, MAX_DEPTH);
    let mut disk = Disk::new(parameters, depth, SECTOR as usize)?;
    let Disk { device, queues } = &mut disk;
    let Some((queue, slots)) = &mut queues[0] else {
        return Err("no queue");
    };
    before_work(parameters);
    let mut strict = 0;
    for round in 0..rounds {
        queue.arm();
        device.set_mask(0, Mask::Masked);
        let before = queue.interrupts();
        for number in 0..depth {
            let Some(slot) = slots.free() else { break };
            slots.submit(queue, slot, READ, number, number, SECTOR as u32);
        }
        queue.notify();
        if round % 2 == 0 {
            while !device.is_pending(0) {
                core::hint::spin_loop();
            }
            if queue.interrupts() != before {
                return Err("an interrupt came through the mask");
            }
            strict += 1;
        }
        device.set_mask(0, Mask::Unmasked);
        while queue.interrupts() == before {
            let seen = cpu::interrupts();
            if queue.interrupts() == before {
                cpu::wait_for_interrupt(seen);
            }
        }
        while slots.busy() {
            if slots.complete(queue)?.is_none() {
                wait_any(core::slice::from_mut(queue));
            }
        }
        // What was asked for beyond the first used chain has come, or never will.
        queue.disarm();
    }
    after_work(parameters);
    line!("rounds={rounds}");
    line!("masked_completions={strict}");
    disk.report();
    Ok(())
}

/// `reboot`: counts its boots in the disk's last sector, and resets until there were `reboots`.
pub(crate) fn reboot_scenario(parameters: Parameters<'_>) -> Result<(), Failure> {
    let mut disk = Disk::new(parameters, 1, SECTOR as usize)?;
    let sector = disk.capacity().saturating_sub(1);
    let data = disk.one(READ, sector, SECTOR as usize)?;
    let mut count = [0; 8];
    count.copy_from_slice(&data[HEADER..HEADER + 8]);
    let boots = u64::from_le_bytes(count) + 1;
    line!("boots={boots}");
    disk.data()?[HEADER..HEADER + 8].copy_from_slice(&boots.to_le_bytes());
    disk.one(WRITE_OUT, sector, SECTOR as usize)?;
    disk.one(FLUSH, 0, 0)?;
    if boots <= parameters.number("reboots", 1) {
        cpu::reset();
    }
    after_work(parameters);
    Ok(())
}
