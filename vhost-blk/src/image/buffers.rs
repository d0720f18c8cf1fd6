//! Guest memory as a scatter list: the data path's only view of a request's payload.
//!
//! A [`Buffers`] is a window of a request's [`VolatileSlice`]s. Cutting it allocates nothing, and its
//! pieces go to `preadv2` and `pwritev2` as they are.
#![expect(
    unsafe_code,
    reason = "guest memory has no Rust reference: it is filled by pointer"
)]

use vm_memory::VolatileSlice;

/// A window of a request's slices: where a read lands, or where a write comes from.
#[derive(Clone, Copy)]
pub struct Buffers<'a> {
    slices: &'a [VolatileSlice<'a>],
    /// Bytes of the first slice that lie before the window; less than that slice's length.
    skip: usize,
    len: usize,
}

impl<'a> Buffers<'a> {
    /// All of `slices`.
    #[must_use]
    pub fn new(slices: &'a [VolatileSlice<'a>]) -> Self {
        let len = slices
            .iter()
            .fold(0_usize, |sum, slice| sum.saturating_add(slice.len()));
        Self { slices, skip: 0, len }
    }

    /// Length of the window in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part that starts `from` bytes in and has at most `len` bytes, cut to the window.
    #[must_use]
    pub fn window(&self, from: usize, len: usize) -> Self {
        let from = from.min(self.len);
        let len = len.min(self.len - from);
        let mut skip = self.skip + from;
        let mut slices = self.slices;
        while let Some((first, rest)) = slices.split_first() {
            if skip < first.len() {
                break;
            }
            skip -= first.len();
            slices = rest;
        }
        Self { slices, skip, len }
    }

    /// The pieces of the window in order: address and length, valid for reading and writing for `'a`.
    fn pieces(&self) -> impl Iterator<Item = (*mut u8, usize)> + use<'a> {
        let mut skip = self.skip;
        let mut left = self.len;
        self.slices.iter().map_while(move |slice| {
            if left == 0 {
                return None;
            }
            let len = (slice.len() - skip).min(left);
            let start = slice.ptr_guard_mut().as_ptr().wrapping_add(skip);
            skip = 0;
            left -= len;
            Some((start, len))
        })
    }

    /// Fills `list` with the window's first pieces and says how many there are.
    pub fn fill_iovecs(&self, list: &mut [libc::iovec]) -> usize {
        let mut count = 0;
        for (slot, (start, len)) in list.iter_mut().zip(self.pieces()) {
            *slot = libc::iovec {
                iov_base: start.cast(),
                iov_len: len,
            };
            count += 1;
        }
        count
    }

    /// Calls `use_slices` with the window as a list of slices; the request's own if it is all of them.
    pub fn with_slices<T>(&self, use_slices: impl FnOnce(&[VolatileSlice<'a>]) -> T) -> T {
        let whole = self
            .slices
            .iter()
            .fold(0_usize, |sum, slice| sum.saturating_add(slice.len()));
        if self.skip == 0 && whole == self.len {
            return use_slices(self.slices);
        }
        let (mut skip, mut left) = (self.skip, self.len);
        let mut list = Vec::new();
        for slice in self.slices {
            let len = (slice.len() - skip).min(left);
            if let Ok(part) = slice.subslice(skip, len) {
                list.push(part);
            }
            skip = 0;
            left -= len;
            if left == 0 {
                break;
            }
        }
        use_slices(&list)
    }

    /// Copies `source` into the window; the shorter of both decides.
    pub fn copy_from(&self, mut source: &[u8]) {
        for (start, len) in self.pieces() {
            let len = len.min(source.len());
            // SAFETY: the piece is valid for writes of `len` bytes for 'a, `source` holds as many, and
            // guest memory never overlaps a buffer of this process's own.
            unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), start, len) };
            source = &source[len..];
        }
    }

    /// Copies the window into `target`; the shorter of both decides.
    pub fn copy_to(&self, target: &mut [u8]) {
        let mut done = 0;
        for (start, len) in self.pieces() {
            let part = &mut target[done..];
            let len = len.min(part.len());
            // SAFETY: as in `copy_from`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(start.cast_const(), part.as_mut_ptr(), len) };
            done += len;
        }
    }

    /// Fills the window with zeros.
    pub fn fill_zero(&self) {
        for (start, len) in self.pieces() {
            // SAFETY: the piece is valid for writes of its length for 'a.
            unsafe { std::ptr::write_bytes(start, 0, len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cut_across_slices() {
        let (mut a, mut b, mut c) = ([1_u8; 3], [2_u8; 5], [3_u8; 4]);
        let slices = [
            VolatileSlice::from(&mut a[..]),
            VolatileSlice::from(&mut b[..]),
            VolatileSlice::from(&mut c[..]),
        ];
        let all = Buffers::new(&slices);
        assert_eq!(all.len(), 12);
        let window = all.window(2, 7).window(1, 100);
        assert_eq!(window.len(), 6);
        let mut copy = [0; 6];
        window.copy_to(&mut copy);
        assert_eq!(copy, [2, 2, 2, 2, 2, 3]);
        window.window(4, 2).copy_from(&[8, 9]);
        all.window(0, 3).fill_zero();
        assert!(all.window(12, 1).is_empty());
        assert_eq!((a, b, c), ([0; 3], [2, 2, 2, 2, 8], [9, 3, 3, 3]));
    }
}
