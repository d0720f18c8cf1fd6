//! The two calls that move data between host files and memory, the guest's memory included.
#![expect(unsafe_code, reason = "preadv2 and pwritev2 take guest memory by pointer")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;

use super::buffers::Buffers;

/// Pieces handed to the kernel in one call; longer lists take several.
const IOVECS_PER_CALL: usize = 64;
/// Pieces of a read that does not wait: of a request with as many segments as the device offers.
const IOVECS_AT_ONCE: usize = 128;

/// Whether the file system can say that a read would wait; those in memory cannot.
pub(crate) fn answers_at_once(file: BorrowedFd<'_>) -> bool {
    let found = read_vectors(file, &[room(&mut [0])], 0, libc::RWF_NOWAIT);
    matches!(found, Ok(_) | Err(Errno::EAGAIN))
}

/// Reads what is in the page cache from `offset` into guest memory without waiting for the disk; says how many
/// bytes. Where it is not all, the kernel has begun to read more.
///
/// # Errors
/// The kernel's; EAGAIN where it would wait for the first byte.
pub(crate) fn read_at_once(file: BorrowedFd<'_>, to: Buffers<'_>, offset: u64) -> Result<usize, Errno> {
    let mut list = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; IOVECS_AT_ONCE];
    let count = to.fill_iovecs(&mut list);
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EINVAL)?;
    read_vectors(file, &list[..count], offset, libc::RWF_NOWAIT)
}

/// `preadv2`, with and without flags: every read of the process is this one call. The C library's would be
/// another one where `flags` is 0. The pieces must be valid for writing: of a slice that nobody else uses, or of
/// guest memory that the caller holds.
pub(super) fn read_vectors(
    file: BorrowedFd<'_>,
    list: &[libc::iovec],
    offset: libc::off_t,
    flags: libc::c_int,
) -> Result<usize, Errno> {
    vectors(libc::SYS_preadv2, file, list, offset, flags)
}

/// `preadv2` or `pwritev2`, as `number` says.
fn vectors(
    number: libc::c_long,
    file: BorrowedFd<'_>,
    list: &[libc::iovec],
    offset: libc::off_t,
    flags: libc::c_int,
) -> Result<usize, Errno> {
    // SAFETY: `list` holds as many pieces as is said, which stay valid for the call, for what `number` does with
    // them; the offset's high half is shifted out by a 64-bit kernel.
    let done = unsafe {
        libc::syscall(
            number,
            file.as_raw_fd(),
            list.as_ptr(),
            list.len(),
            offset,
            0_i64,
            flags,
        )
    };
    usize::try_from(done).map_err(|_| Errno::last())
}

/// An offset as the kernel takes it.
pub(super) fn position(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

pub(super) fn piece(buf: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: buf.as_ptr().cast_mut().cast(),
        iov_len: buf.len(),
    }
}

pub(super) fn room(buf: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    }
}

/// `pwritev2`, with and without flags: every write of the process is this one call. The C library's
/// would be another one where `flags` is 0. The pieces must be valid for reading: of a slice, or of guest
/// memory that the caller holds.
pub(super) fn write_vectors(
    file: &File,
    list: &[libc::iovec],
    offset: libc::off_t,
    flags: libc::c_int,
) -> Result<usize, Errno> {
    vectors(libc::SYS_pwritev2, file.as_fd(), list, offset, flags)
}

/// Calls `call` until all of `buffers` is moved or it moves nothing more; says how many bytes it moved.
pub(super) fn transfer(
    buffers: Buffers<'_>,
    offset: u64,
    mut call: impl FnMut(&[libc::iovec], libc::off_t) -> Result<usize, Errno>,
) -> io::Result<usize> {
    let mut done = 0;
    let mut list = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; IOVECS_PER_CALL];
    while done < buffers.len() {
        let count = buffers.window(done, usize::MAX).fill_iovecs(&mut list);
        let position = position(offset.saturating_add(done as u64))?;
        match call(&list[..count], position) {
            Ok(0) => break,
            Ok(moved) => done += moved,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}
