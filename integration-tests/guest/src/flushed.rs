//! `flushed`: writes one block after another, flushes after every few, and says each time how many
//! blocks are safe; whatever then becomes of the VM, they must be found in the image. With `lost=1` a flush
//! fails in the end, and no later one may say that all is well.

use crate::{
    blk::{Disk, FLUSH, HEADER, SECTOR, WRITE_OUT},
    cpu,
    parameters::Parameters,
    scenario::Failure,
    serial::{self, line},
};
use guest_contract::fill;

/// Bytes of a block; it starts at a multiple of [`STRIDE`].
const SIZE: usize = 4096;
/// Sectors from block to block: a qcow2 cluster, so that each block needs one of its own.
const STRIDE: u64 = 128;
/// Blocks from flush to flush.
const BATCH: u64 = 8;

/// Says that a flush failed, and flushes again once a byte comes on the console.
fn flush_again(disk: &mut Disk) -> Result<(), Failure> {
    line!("lost=1");
    serial::wait_for_byte();
    match disk.one(FLUSH, 0, 0) {
        Ok(_) => Err("a flush succeeded after one that failed"),
        Err(_) => Ok(()),
    }
}

/// Runs it; the guest halts when all blocks are written.
pub(crate) fn scenario(parameters: Parameters<'_>) -> Result<(), Failure> {
    let blocks = parameters.number("blocks", 8192);
    let seed = parameters.number("seed", 1);
    let mut disk = Disk::new(parameters, BATCH, SIZE)?;
    if blocks * STRIDE > disk.capacity() || STRIDE * SECTOR < SIZE as u64 {
        return Err("the disk is too small");
    }
    line!("phase=work");
    let mut next = 0;
    while next < blocks {
        for (queue, slots) in disk.queues() {
            while next < blocks {
                let Some(slot) = slots.free() else { break };
                fill(&mut slots.slot(slot)[HEADER..HEADER + SIZE], seed, next);
                slots.submit(queue, slot, WRITE_OUT, next, next * STRIDE, SIZE as u32);
                next += 1;
            }
            queue.notify();
        }
        while disk.busy() {
            disk.wait_used();
            for (queue, slots) in disk.queues() {
                while slots.complete(queue)?.is_some() {}
            }
        }
        match disk.one(FLUSH, 0, 0) {
            Err(_) if parameters.number("lost", 0) == 1 => return flush_again(&mut disk),
            done => done?,
        };
        line!("flushed={next}");
    }
    cpu::halt()
}
