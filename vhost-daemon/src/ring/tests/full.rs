//! A driver that makes more available than the device holds at once.

use crate::memory::tests::{sealed, spec};
use crate::memory::{GuestAddress, GuestMemory, Sealing};
use crate::ring::split::MOST_HELD;
use crate::ring::{Ring, RingSetup};
use std::sync::Arc;

const SIZE: u16 = 2 * MOST_HELD;
const BASE: u64 = 0x10_0000;
const MEMORY: u64 = 0x2_0000;
const AVAILABLE: u64 = BASE + 0x8000;
const USED: u64 = BASE + 0xA000;
const BUFFER: u64 = BASE + 0x1_F000;

const SETUP: RingSetup = RingSetup {
    size: SIZE,
    descriptors: GuestAddress(BASE),
    available: GuestAddress(AVAILABLE),
    used: GuestAddress(USED),
    base: 0,
    event_idx: false,
    indirect: true,
};

fn memory() -> Arc<GuestMemory> {
    let region = spec(BASE, MEMORY, BASE, 0);
    let memory = GuestMemory::default().with_region(region, sealed(MEMORY), Sealing::Required);
    Arc::new(memory.unwrap())
}

fn write(memory: &GuestMemory, at: u64, bytes: &[u8]) {
    let segment = memory.segment(GuestAddress(at), bytes.len());
    memory.slice(&segment.unwrap()).unwrap().copy_from(bytes);
}

/// A writable descriptor of one byte, with `rest` in its flags and its next one.
fn describe(memory: &GuestMemory, index: u16, rest: u64) {
    let at = BASE + u64::from(index) * 16;
    write(memory, at, &BUFFER.to_le_bytes());
    write(memory, at + 8, &(1_u64 | 2 << 32 | rest).to_le_bytes());
}

#[test]
fn a_chain_has_no_more_descriptors_in_the_ring_than_in_an_indirect_table() {
    for (length, fits) in [(1024, true), (1025, false)] {
        let memory = memory();
        for index in 0..length - 1 {
            describe(&memory, index, 1 << 32 | u64::from(index + 1) << 48);
        }
        describe(&memory, length - 1, 0);
        write(&memory, AVAILABLE + 2, &1_u16.to_le_bytes());
        let mut ring = Ring::start(Arc::clone(&memory), &SETUP, None).unwrap();
        ring.begin_round().unwrap();
        assert_eq!(ring.pop().is_ok(), fits, "{length}");
    }
}

#[test]
fn chains_beyond_what_is_held_at_most_are_taken_once_one_is_completed() {
    let memory = memory();
    let offer = |count: u16| write(&memory, AVAILABLE + 2, &count.to_le_bytes());
    for head in 0..SIZE {
        describe(&memory, head, 0);
        write(&memory, AVAILABLE + 4 + u64::from(head) * 2, &head.to_le_bytes());
    }
    offer(MOST_HELD + 2);
    let mut ring = Ring::start(Arc::clone(&memory), &SETUP, None).unwrap();
    ring.begin_round().unwrap();
    let mut held = Vec::new();
    while let Some(chain) = ring.pop().unwrap() {
        held.push(chain);
    }
    assert_eq!(held.len(), usize::from(MOST_HELD));
    // What waits is no reason to look again at once; what comes on top of it is one to look.
    assert!(!ring.enable_kicks().unwrap());
    offer(MOST_HELD + 3);
    assert!(ring.has_available().unwrap());
    assert!(ring.pop().unwrap().is_none());
    assert!(!ring.has_available().unwrap());
    ring.complete(held.remove(0), 1);
    assert!(ring.has_available().unwrap());
    held.push(ring.pop().unwrap().unwrap());
    assert!(ring.pop().unwrap().is_none());
}
