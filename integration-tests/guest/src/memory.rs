//! Memory behind the program, handed out once and never taken back.
#![expect(unsafe_code, reason = "makes slices of memory that no Rust object covers")]

use crate::scenario::Failure;
use core::sync::atomic::{AtomicU64, Ordering};

/// All of it lies below this address: every machine has that much RAM.
const END: u64 = 30 << 20;

unsafe extern "C" {
    static heap_start: u8;
}

static TAKEN: AtomicU64 = AtomicU64::new(0);

/// `size` zeroed bytes at a multiple of 4096. Physical and virtual addresses are the same.
pub(crate) fn pages(size: usize) -> Result<&'static mut [u8], Failure> {
    let size = size.next_multiple_of(4096);
    let start = (&raw const heap_start as u64).next_multiple_of(4096)
        + TAKEN.fetch_add(size as u64, Ordering::Relaxed);
    if start + size as u64 > END {
        return Err("out of memory");
    }
    // SAFETY: within RAM, behind everything the linker placed, and handed out to nobody else.
    let pages = unsafe { core::slice::from_raw_parts_mut(start as *mut u8, size) };
    pages.fill(0);
    Ok(pages)
}
