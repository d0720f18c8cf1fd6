//! `storm`: random writes, reads, flushes and discards on all queues of one or two disks at full depth, until a byte
//! comes on the console; then everything is read back. Each block carries its number and its
//! generation, so that a write that was lost, doubled over a newer one, or went elsewhere is seen.

use crate::{
    blk::{self, DISCARD, Disk, FLUSH, HEADER, MAX_QUEUES, READ, SECTOR, WRITE_OUT},
    cpu, memory,
    parameters::Parameters,
    scenario::Failure,
    serial::{self, line},
};
use guest_contract::{Checksum, fill, holds, pattern_word};

/// Bytes of a block; it starts at a multiple of [`STRIDE`].
const SIZE: usize = 4096;
/// Sectors from block to block: a qcow2 cluster, so that each block has one of its own.
const STRIDE: u64 = 128;
/// A request for this block is under way.
const BUSY: u16 = 1 << 15;
/// The block was discarded: it holds its generation, or zeros.
const DISCARDED: u16 = 1 << 14;
const GENERATION: u16 = DISCARDED - 1;

/// What is known of every block.
struct Blocks {
    /// Two bytes each.
    states: &'static mut [u8],
    seed: u64,
    random: u64,
}

impl Blocks {
    fn count(&self) -> u64 {
        self.states.len() as u64 / 2
    }

    fn state(&self, block: u64) -> u16 {
        let at = block as usize * 2;
        u16::from_le_bytes([self.states[at], self.states[at + 1]])
    }

    fn set(&mut self, block: u64, state: u16) {
        let at = block as usize * 2;
        self.states[at..at + 2].copy_from_slice(&state.to_le_bytes());
    }

    fn random(&mut self) -> u64 {
        self.random += 1;
        pattern_word(self.seed, self.random, 1)
    }

    /// A block without a request.
    fn idle(&mut self) -> u64 {
        loop {
            let block = self.random() % self.count();
            if self.state(block) & BUSY == 0 {
                return block;
            }
        }
    }

    fn pattern(&self, generation: u16) -> u64 {
        self.seed << 16 | u64::from(generation)
    }

    /// Whether `data` is what the block holds, or one of what it may hold.
    fn fits(&self, block: u64, data: &[u8]) -> bool {
        let state = self.state(block);
        let generation = state & GENERATION;
        let zeros = generation == 0 || state & DISCARDED != 0;
        zeros && data.iter().all(|byte| *byte == 0)
            || generation != 0 && holds(data, self.pattern(generation), block)
    }
}

/// What there is beside writes and reads.
struct Mix {
    flushes: bool,
    discards: bool,
}

/// Counters.
#[derive(Default)]
struct Done {
    writes: u64,
    reads: u64,
    flushes: u64,
    discards: u64,
}

/// How long queues with requests under way completed nothing, in cycles.
struct Gaps {
    /// When each completed something last.
    since: [u64; MAX_QUEUES],
    longest: u64,
}

/// A disk in the storm.
struct Side {
    disk: Disk,
    blocks: Blocks,
    mix: Mix,
    done: Done,
    gaps: Gaps,
}

type Sides = [Option<Side>; 2];

impl Side {
    /// Disk `number`; what its blocks hold differs from disk to disk.
    fn new(parameters: Parameters<'_>, number: u64) -> Result<Self, Failure> {
        let count = parameters.number("blocks", 8192);
        let blocks = Blocks {
            states: memory::pages(count as usize * 2)?
                .get_mut(..count as usize * 2)
                .ok_or("memory")?,
            seed: parameters.number("seed", 1) + number,
            random: 0,
        };
        let depth = parameters.number("depth", blk::MAX_DEPTH);
        let disk = Disk::at(number, parameters, depth, SIZE)?;
        if count * STRIDE > disk.capacity() {
            return Err("the disk is too small");
        }
        let mix = Mix {
            flushes: parameters.number("flushes", 1) != 0,
            discards: disk.can_discard() && parameters.number("discards", 1) != 0,
        };
        Ok(Self {
            disk,
            blocks,
            mix,
            done: Done::default(),
            gaps: Gaps {
                since: [cpu::time(); MAX_QUEUES],
                longest: 0,
            },
        })
    }

    /// Lets it end, and reads everything back.
    fn finish(&mut self) -> Result<(), Failure> {
        while self.disk.busy() {
            self.disk.wait_used();
            complete(self)?;
        }
        self.disk.one(FLUSH, 0, 0)?;
        let sum = read_back(&mut self.disk, &self.blocks)?;
        line!("writes={}", self.done.writes);
        line!("reads={}", self.done.reads);
        line!("flushes={}", self.done.flushes);
        line!("discards={}", self.done.discards);
        line!("longest_gap={}", self.gaps.longest);
        line!("checksum={sum:016x}");
        Ok(())
    }
}

/// Runs the storm, on the first `disks` of the bus.
pub(crate) fn scenario(parameters: Parameters<'_>) -> Result<(), Failure> {
    let mut sides: Sides = [None, None];
    for (number, side) in (0..parameters.number("disks", 1)).zip(&mut sides) {
        *side = Some(Side::new(parameters, number)?);
    }
    serial::listen();
    line!("phase=work");
    let start = cpu::time();
    while !serial::heard() {
        sides.iter_mut().flatten().for_each(submit);
        wait_used(&mut sides);
        sides.iter_mut().flatten().try_for_each(complete)?;
    }
    line!("storm_cycles={}", cpu::time() - start);
    line!("phase=calm");
    sides.iter_mut().flatten().try_for_each(Side::finish)
}

/// Halts until a disk has a used chain.
fn wait_used(sides: &mut Sides) {
    loop {
        let seen = cpu::interrupts();
        let mut used = false;
        for side in sides.iter_mut().flatten() {
            used |= side.disk.arm();
        }
        if used {
            return;
        }
        cpu::wait_for_interrupt(seen);
    }
}

/// Fills every free slot.
fn submit(side: &mut Side) {
    let Side {
        disk, blocks, mix, ..
    } = side;
    for (queue, slots) in disk.queues() {
        let mut submitted = false;
        while let Some(slot) = slots.free() {
            let dice = blocks.random() % 100;
            submitted = true;
            if dice < 2 && mix.flushes {
                slots.submit(queue, slot, FLUSH, 0, 0, 0);
                continue;
            }
            let block = blocks.idle();
            let (state, sector) = (blocks.state(block), block * STRIDE);
            if dice < 50 {
                let generation = (state & GENERATION) % (GENERATION - 1) + 1;
                let pattern = blocks.pattern(generation);
                fill(&mut slots.slot(slot)[HEADER..HEADER + SIZE], pattern, block);
                blocks.set(block, BUSY | generation);
                slots.submit(queue, slot, WRITE_OUT, block, sector, SIZE as u32);
            } else if dice < 75 && mix.discards {
                blocks.set(block, state | BUSY | DISCARDED);
                slots.describe_discard(slot, sector, STRIDE as u32);
                slots.submit(queue, slot, DISCARD, block, 0, 16);
            } else {
                blocks.set(block, state | BUSY);
                slots.submit(queue, slot, READ, block, sector, SIZE as u32);
            }
        }
        if submitted {
            queue.notify();
        }
    }
}

/// Takes all completions that there are.
fn complete(side: &mut Side) -> Result<(), Failure> {
    let Side {
        disk,
        blocks,
        done,
        gaps,
        ..
    } = side;
    let now = cpu::time();
    for ((queue, slots), since) in disk.queues().zip(&mut gaps.since) {
        while let Some((kind, block, memory)) = slots.complete(queue)? {
            gaps.longest = gaps.longest.max(now - *since);
            *since = now;
            match kind {
                FLUSH => {
                    done.flushes += 1;
                    continue;
                }
                WRITE_OUT => done.writes += 1,
                DISCARD => done.discards += 1,
                _ if blocks.fits(block, &memory[HEADER..HEADER + SIZE]) => done.reads += 1,
                _ => {
                    line!("block={block}");
                    return Err("data differs");
                }
            }
            let state = blocks.state(block);
            blocks.set(block, state & !BUSY);
        }
    }
    Ok(())
}

/// Reads every block; the sum of their checksums.
fn read_back(disk: &mut Disk, blocks: &Blocks) -> Result<u64, Failure> {
    let (mut next, mut read, mut sum) = (0, 0, 0_u64);
    let start = cpu::time();
    while read < blocks.count() {
        for (queue, slots) in disk.queues() {
            while next < blocks.count() {
                let Some(slot) = slots.free() else { break };
                slots.submit(queue, slot, READ, next, next * STRIDE, SIZE as u32);
                next += 1;
            }
            queue.notify();
        }
        disk.wait_used();
        for (queue, slots) in disk.queues() {
            while let Some((_, block, memory)) = slots.complete(queue)? {
                let data = &memory[HEADER..HEADER + SIZE];
                if !blocks.fits(block, data) {
                    line!("block={block}");
                    return Err("data differs at the end");
                }
                let mut checksum = Checksum::default();
                checksum.update(data);
                sum = sum.wrapping_add(checksum.0);
                read += 1;
            }
        }
    }
    line!("read_back={read} cycles={}", cpu::time() - start);
    Ok(sum)
}

const _: () = assert!(SIZE as u64 <= STRIDE * SECTOR);
