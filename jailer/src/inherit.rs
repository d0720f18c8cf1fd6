//! Taking ownership of descriptors that exec left behind.
#![expect(unsafe_code, reason = "a number becomes an owned descriptor")]

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::signal::{SigHandler, Signal, signal};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Mutex;
use vm_spec::control::FdNumber;

/// Numbers already taken: each has one owner.
static TAKEN: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// Owns the inherited descriptor `number`, and makes it close at exec.
///
/// # Errors
/// When it is not open (EBADF), or was taken before (EBUSY); below 3.
pub fn take(number: FdNumber) -> io::Result<OwnedFd> {
    let mut taken = TAKEN.lock().unwrap_or_else(|e| e.into_inner());
    if number.0 < 3 {
        return Err(io::Error::other(
            "0 to 2 cannot be used: they are standard input, output and error",
        ));
    }
    if taken.contains(&number.0) {
        return Err(Errno::EBUSY.into());
    }
    // SAFETY: the number is borrowed only to ask whether it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number.0) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    taken.push(number.0);
    // SAFETY: it is open, came by exec (no Rust value made it), and `taken` keeps it single.
    Ok(unsafe { OwnedFd::from_raw_fd(number.0) })
}

/// Has reads and writes of what `fd` stands for return at once, for everyone who has it.
///
/// # Errors
/// The system's.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

/// Whether whoever started this process had `signal` ignored.
#[must_use]
pub fn is_ignored(signal: Signal) -> bool {
    let mut now = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: with no new action the call only writes the present one, for which there is room.
    let asked = unsafe { libc::sigaction(signal as i32, std::ptr::null(), now.as_mut_ptr()) };
    // SAFETY: all zeros, which it was made of, are a valid value, as is what the kernel has written.
    let now = unsafe { now.assume_init() };
    asked == 0 && now.sa_sigaction == libc::SIG_IGN
}

/// Has the ends of children told, also where whoever started this process had them ignored, which survives exec:
/// nobody could be waited for.
pub fn hear_of_children() {
    // SAFETY: the default action runs no code of ours. It cannot be refused.
    let _ = unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) };
}

/// Closes the descriptors `first` to `last` (both included), whichever are open.
///
/// # Safety
/// The process never again uses or drops a Rust value that owns one of them.
pub unsafe fn close_range(first: u32, last: u32) {
    // SAFETY: the caller answers for the owners; the call takes no pointer. It fails only on
    // kernels before 5.9, where the descriptors stay until exit.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// Owns what accept4 has just returned.
pub(crate) fn accepted(number: i32) -> OwnedFd {
    // SAFETY: the kernel made it a moment ago, for the caller, who names it once.
    unsafe { OwnedFd::from_raw_fd(number) }
}
