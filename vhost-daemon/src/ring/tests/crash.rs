//! Dies at a chosen store to shared memory, as a process killed there would.

use crate::ring::RingFault;
use std::cell::Cell;

thread_local! {
    static STORES_LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// What the stores after death answer.
pub(super) const DEAD: RingFault = RingFault::Request("killed");

/// Called before each store to shared memory.
pub(in crate::ring) fn point() -> Result<(), RingFault> {
    match STORES_LEFT.get() {
        Some(0) => Err(DEAD),
        Some(left) => {
            STORES_LEFT.set(Some(left - 1));
            Ok(())
        }
        None => Ok(()),
    }
}

/// Runs `life`, which dies after `stores` stores; false if it did not get that far.
pub(super) fn after(stores: u32, life: impl FnOnce() -> Result<(), RingFault>) -> bool {
    STORES_LEFT.set(Some(stores));
    let outcome = life();
    STORES_LEFT.set(None);
    match outcome {
        Ok(()) => false,
        Err(fault) => {
            assert_eq!(fault, DEAD, "it should die of nothing else");
            true
        }
    }
}
