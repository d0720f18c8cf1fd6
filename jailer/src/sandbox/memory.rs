//! The end of a process that gets no memory. Rust's own is `abort`, whose calls no policy has: it would look as if
//! a filter had stopped one that was broken into.
#![expect(unsafe_code, reason = "an allocator: passes raw memory on")]

use super::end;
use super::line::Line;
use std::alloc::{GlobalAlloc, Layout};
use std::fmt::Write as _;

/// What a confined process exits with that got no memory.
pub const EXIT_NO_MEMORY: u8 = 76;

/// An allocator, `A`, without which the process ends.
#[derive(Debug)]
pub struct OrEnd<A> {
    heap: A,
    code: u8,
}

impl<A> OrEnd<A> {
    /// Of a confined process: it ends with [`EXIT_NO_MEMORY`].
    pub const fn new(heap: A) -> Self {
        Self::with_code(heap, EXIT_NO_MEMORY)
    }

    /// As [`OrEnd::new`], with another exit code.
    pub const fn with_code(heap: A, code: u8) -> Self {
        Self { heap, code }
    }

    fn got(&self, start: *mut u8, size: usize) -> *mut u8 {
        if start.is_null() {
            let mut line = Line::default();
            // It fits.
            let _ = writeln!(line, "out of memory: there are no {size} bytes");
            line.tell();
            end(self.code);
        }
        start
    }
}

// SAFETY: all that is handed out and taken back is `A`'s, with the layouts that callers give.
unsafe impl<A: GlobalAlloc> GlobalAlloc for OrEnd<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller answers for the layout.
        self.got(unsafe { self.heap.alloc(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller had it from `heap`, with this layout.
        unsafe { self.heap.dealloc(start, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        self.got(unsafe { self.heap.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`.
        self.got(unsafe { self.heap.realloc(start, layout, size) }, size)
    }
}
