//! `preadv` and `pwritev` on guest memory.
#![expect(
    unsafe_code,
    reason = "hands guest memory, which no reference may point to, to the kernel"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use vm_memory::VolatileSlice;

/// Most ranges in one call (IOV_MAX of Linux).
const MAX_VECTORS: usize = 1024;

/// Fills all `buffers` from `file`, starting at byte `offset`.
///
/// # Errors
/// Whatever `preadv(2)` returns; [`io::ErrorKind::UnexpectedEof`] where the file ends early.
pub fn read_exact_at(file: BorrowedFd<'_>, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    transfer(buffers, offset, io::ErrorKind::UnexpectedEof, |vectors, at| {
        let count = vectors.len() as libc::c_int;
        // SAFETY: each vector is memory that `buffers` borrows for the whole call, valid for
        // writes of its length; the kernel keeps none of them after it returns.
        unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), count, at) }
    })
}

/// Writes all `buffers` to `file`, starting at byte `offset`.
///
/// # Errors
/// Whatever `pwritev(2)` returns.
pub fn write_all_at(file: BorrowedFd<'_>, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
    transfer(buffers, offset, io::ErrorKind::WriteZero, |vectors, at| {
        let count = vectors.len() as libc::c_int;
        // SAFETY: each vector is memory that `buffers` borrows for the whole call, valid for
        // reads of its length; the kernel keeps none of them after it returns.
        unsafe { libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), count, at) }
    })
}

/// Repeats `call` until every byte has moved; a call that moves nothing is the error `stuck`.
fn transfer(
    buffers: &[VolatileSlice<'_>],
    offset: u64,
    stuck: io::ErrorKind,
    call: impl Fn(&[libc::iovec], libc::off_t) -> isize,
) -> io::Result<()> {
    let mut vectors: Vec<libc::iovec> = buffers
        .iter()
        .filter(|buffer| !buffer.is_empty())
        .map(vector)
        .collect();
    let mut pending = vectors.as_mut_slice();
    let mut at = offset;
    while !pending.is_empty() {
        let position = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        let moved = call(&pending[..pending.len().min(MAX_VECTORS)], position);
        let Ok(moved) = usize::try_from(moved) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        if moved == 0 {
            return Err(stuck.into());
        }
        at += moved as u64;
        pending = advance(pending, moved);
    }
    Ok(())
}

fn vector(buffer: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: buffer.ptr_guard_mut().as_ptr().cast(),
        iov_len: buffer.len(),
    }
}

/// Drops the first `count` bytes.
fn advance(mut vectors: &mut [libc::iovec], mut count: usize) -> &mut [libc::iovec] {
    while let Some(first) = vectors.first_mut() {
        if count < first.iov_len {
            first.iov_base = first.iov_base.wrapping_byte_add(count);
            first.iov_len -= count;
            break;
        }
        count -= first.iov_len;
        vectors = &mut vectors[1..];
    }
    vectors
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn moves_many_ranges_and_stops_at_the_end_of_the_file() {
        let file = tempfile::tempfile().unwrap();
        let mut source: Vec<u8> = (0..9000u32).map(|n| n as u8).collect();
        let whole = VolatileSlice::from(source.as_mut_slice());
        let parts: Vec<_> = (0..3000).map(|n| whole.subslice(n * 3, 3).unwrap()).collect();
        write_all_at(file.as_fd(), &parts, 512).unwrap();

        let mut target = vec![0; 9000];
        let back = VolatileSlice::from(target.as_mut_slice());
        let (first, rest) = back.split_at(17).unwrap();
        read_exact_at(file.as_fd(), &[first, rest], 512).unwrap();
        assert_eq!(source, target);

        let mut beyond = [0; 2];
        let error = read_exact_at(file.as_fd(), &[VolatileSlice::from(&mut beyond[..])], 9511).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn advances_inside_and_across_ranges() {
        let mut bytes = [0u8; 6];
        let whole = VolatileSlice::from(&mut bytes[..]);
        let mut vectors = [
            vector(&whole.subslice(0, 2).unwrap()),
            vector(&whole.subslice(2, 4).unwrap()),
        ];
        let rest = advance(&mut vectors, 3);
        assert_eq!(rest.len(), 1);
        assert_eq!(rest[0].iov_len, 3);
        assert!(advance(rest, 3).is_empty());
    }
}
