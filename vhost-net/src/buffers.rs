//! Scatter lists for one system call: segments of guest memory, and private buffers around them.
//!
//! Guest memory changes under our hands, so nothing here makes a Rust reference to it: only the
//! kernel looks through the pointers, while the memory they point into stays borrowed.

#![expect(unsafe_code, reason = "empty lists of pointers may move to another thread")]

use std::marker::PhantomData;
use vm_memory::VolatileSlice;

/// Most segments in one list (IOV_MAX of Linux).
pub const MAX_SEGMENTS: usize = 1024;

/// An iovec list whose memory is borrowed for `'m`.
#[derive(Default)]
pub struct FrameBuffers<'m> {
    iovecs: Vec<libc::iovec>,
    length: usize,
    memory: PhantomData<&'m mut [u8]>,
}

impl<'m> FrameBuffers<'m> {
    /// An empty list that uses the allocation of an earlier one.
    #[must_use]
    pub fn from_storage(storage: Storage) -> Self {
        let Storage(mut iovecs) = storage;
        iovecs.clear();
        Self {
            iovecs,
            length: 0,
            memory: PhantomData,
        }
    }

    /// The allocation, for the next list.
    #[must_use]
    pub fn into_storage(mut self) -> Storage {
        self.iovecs.clear();
        Storage(self.iovecs)
    }

    /// Appends a piece of guest memory. False, and nothing appended, when `limit` segments are in
    /// the list.
    pub fn push_guest(&mut self, slice: &VolatileSlice<'m>, limit: usize) -> bool {
        let room = self.iovecs.len() < limit.min(MAX_SEGMENTS);
        if room {
            self.push(slice.ptr_guard_mut().as_ptr(), slice.len());
        }
        room
    }

    /// Appends a private buffer for the kernel to fill.
    pub fn push_private(&mut self, buffer: &'m mut [u8]) {
        self.push(buffer.as_mut_ptr(), buffer.len());
    }

    /// Appends a private buffer for the kernel to read.
    pub fn push_readable(&mut self, buffer: &'m [u8]) {
        self.push(buffer.as_ptr().cast_mut(), buffer.len());
    }

    /// Bytes in all segments.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    fn push(&mut self, start: *mut u8, length: usize) {
        self.iovecs.push(libc::iovec {
            iov_base: start.cast(),
            iov_len: length,
        });
        self.length += length;
    }

    pub(crate) fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }
}

/// The allocation of a [`FrameBuffers`] with nothing in it.
#[derive(Default, Debug)]
pub struct Storage(Vec<libc::iovec>);

// SAFETY: the vector is empty: there is no pointer in it.
unsafe impl Send for Storage {}

/// The allocation of a slice list with nothing in it.
#[derive(Default, Debug)]
pub struct SliceStorage(Vec<VolatileSlice<'static>>);

// SAFETY: the vector is empty: there is no slice in it.
unsafe impl Send for SliceStorage {}

impl SliceStorage {
    /// The allocation as an empty list for slices of any lifetime; leaves none behind.
    #[must_use]
    pub fn take<'m>(&mut self) -> Vec<VolatileSlice<'m>> {
        recycle(std::mem::take(&mut self.0))
    }

    /// Empties a list and keeps its allocation.
    pub fn keep(&mut self, mut slices: Vec<VolatileSlice<'_>>) {
        slices.clear();
        self.0 = recycle(slices);
    }
}

fn recycle<'b>(slices: Vec<VolatileSlice<'_>>) -> Vec<VolatileSlice<'b>> {
    // Collecting in place keeps the allocation; there is nothing in it to convert.
    slices.into_iter().map_while(|_| None).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_is_reused() {
        let mut memory = [0; 64];
        let mut storage = SliceStorage::default();
        let mut slices = storage.take();
        slices.push(VolatileSlice::from(&mut memory[..]));
        slices.reserve(100);
        let capacity = slices.capacity();
        storage.keep(slices);
        assert_eq!(storage.take().capacity(), capacity);
    }

    #[test]
    fn a_list_stops_at_its_limit() {
        let mut memory = [0; 8];
        let slice = VolatileSlice::from(&mut memory[..]);
        let mut buffers = FrameBuffers::from_storage(Storage::default());
        assert!(buffers.push_guest(&slice, 2) && buffers.push_guest(&slice, 2));
        assert!(!buffers.push_guest(&slice, 2));
        assert_eq!(buffers.length(), 16);
    }
}
