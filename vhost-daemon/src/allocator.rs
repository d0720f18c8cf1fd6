//! A device process's allocator: dlmalloc on pages of its own. The C library's would need brk, mprotect and
//! madvise, and dlmalloc's own pages mremap: calls that the policy would then allow to whoever takes the
//! process over.
#![expect(unsafe_code, reason = "an allocator: hands out raw memory")]

use dlmalloc::Dlmalloc;
use jailer::sandbox::OrEnd;
use std::alloc::{GlobalAlloc, Layout};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Pages by mmap and munmap alone.
struct Pages;

// SAFETY: what `alloc` gives is new memory of that size that nothing else uses; what is freed is
// unmapped, in whole pages, as dlmalloc promises to ask for.
unsafe impl dlmalloc::Allocator for Pages {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address that the kernel picks touches no other memory.
        let start = unsafe { libc::mmap(ptr::null_mut(), size, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            (ptr::null_mut(), 0, 0)
        } else {
            (start.cast(), size, 0)
        }
    }

    /// Never: dlmalloc then copies.
    fn remap(&self, _start: *mut u8, _old: usize, _new: usize, _can_move: bool) -> *mut u8 {
        ptr::null_mut()
    }

    fn free_part(&self, start: *mut u8, old: usize, new: usize) -> bool {
        // SAFETY: dlmalloc owns `old` bytes from `start` and has no more use for those from `new` on.
        unsafe { libc::munmap(start.wrapping_add(new).cast(), old - new) == 0 }
    }

    fn free(&self, start: *mut u8, size: usize) -> bool {
        // SAFETY: dlmalloc owns these bytes and has no more use for them.
        unsafe { libc::munmap(start.cast(), size) == 0 }
    }

    fn can_release_part(&self, _flags: u32) -> bool {
        true
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        4096
    }
}

/// A device process's whole heap.
pub type Heap = OrEnd<Shared>;

/// One heap for all threads. Nothing on the path of a request allocates, so one lock does.
pub struct Shared(Mutex<Dlmalloc<Pages>>);

/// An empty heap, for a program's `#[global_allocator]`.
#[must_use]
pub const fn heap() -> Heap {
    OrEnd::new(Shared(Mutex::new(Dlmalloc::new_with_allocator(Pages))))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Dlmalloc<Pages>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// SAFETY: dlmalloc's memory is aligned and as long as asked for, belongs to one caller until it is freed,
// and is looked after under one lock; none of its methods unwinds.
unsafe impl GlobalAlloc for Shared {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: any size and alignment of a layout will do.
        unsafe { self.lock().malloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller had it from here, with this layout.
        unsafe { self.lock().free(start, layout.size(), layout.align()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        unsafe { self.lock().calloc(layout.size(), layout.align()) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`.
        unsafe { self.lock().realloc(start, layout.size(), layout.align(), size) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Heap, heap};

    #[global_allocator]
    static ALLOCATOR: Heap = heap();

    /// This program's tests run on the heap above.
    #[test]
    fn blocks_grow_and_shrink_with_their_content() {
        let mut block = vec![7_u8; 100];
        for size in [100_000, 8 << 20, 16 << 20, 200] {
            block.resize(size, 1);
            block.shrink_to_fit();
            assert!(block[..100].iter().all(|byte| *byte == 7), "{size}");
            assert!(block[100..].iter().all(|byte| *byte == 1), "{size}");
        }
        assert_eq!(vec![0_u64; 1 << 20].iter().sum::<u64>(), 0);
    }
}
