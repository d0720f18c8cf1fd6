//! Taking ownership of file descriptors that come as numbers: at exec, or with a message.
#![expect(unsafe_code, reason = "turns numbers into owned file descriptors, each once")]

use nix::cmsg_space;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// Numbers that were given out: a second owner would close what the first one uses.
static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());
/// Most descriptors in one message that [`receive`] takes.
const MAX_RECEIVED: usize = 4;

/// Owns the descriptor `number` that this process was started with (`--fd=3`), and marks it
/// close-on-exec. Standard input, output and error cannot be had.
///
/// # Errors
/// When it is not open, was taken before, or is one of 0 to 2.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    let refused = |why: &str| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("file descriptor {number} {why}"),
        )
    };
    if number <= 2 {
        return Err(refused("is standard input, output or error, or no number at all"));
    }
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&number) {
        return Err(refused("is named twice"));
    }
    // SAFETY: F_GETFD only looks; the number is not used as a descriptor unless it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl(borrowed, FcntlArg::F_GETFD).map_err(|_| refused("is not open"))?;
    let flags = FdFlag::from_bits_truncate(flags) | FdFlag::FD_CLOEXEC;
    fcntl(borrowed, FcntlArg::F_SETFD(flags))?;
    taken.push(number);
    // SAFETY: it is open, came with the process, which promised it to us on the command line, and
    // was not given to another owner here.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Fills `buffer`, unless the stream ends before, and takes the descriptors that came with it.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut vectors = [IoSliceMut::new(buffer)];
    let mut control = cmsg_space!([RawFd; MAX_RECEIVED]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut vectors, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            for number in numbers {
                // SAFETY: the kernel made this descriptor for us with this message.
                fds.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
    }
    Ok((message.bytes, fds))
}
