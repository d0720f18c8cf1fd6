//! Image locking as QEMU does it (`docs/system/qemu-block-drivers`, "Disk image file locking").
//!
//! What a user of a file does, and what it forbids others to do, is said by shared locks on single bytes:
//! byte 100 + N for doing N, byte 200 + N for forbidding N. Whoever comes takes its locks first, then
//! looks whether somebody else's contradict them. So two writers exclude each other, and a writer and
//! whoever relies on the content, be it QEMU, qemu-img or this process.
//!
//! They are locks of the open file description: they last until the last descriptor of it is closed,
//! and a launcher that keeps one holds them while device processes come and go.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::ppoll;
use nix::sys::time::TimeSpec;

use super::ImageError;

/// First byte that says what is done.
const DOES: i64 = 100;
/// First byte that says what is forbidden to others.
const FORBIDS: i64 = 200;

/// QEMU's permissions that matter here, as offsets from [`DOES`] and [`FORBIDS`].
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What an image's user does.
const READER: &[i64] = &[CONSISTENT_READ];
const WRITER: &[i64] = &[CONSISTENT_READ, WRITE, RESIZE];
/// What any user of an image forbids to others: its metadata must hold together.
const FORBIDDEN: &[i64] = &[WRITE, RESIZE];

/// Locks an image's file for reading, or for reading and writing; kept until the last descriptor of its
/// open file description is closed. A host that cannot lock is logged and gone along with.
///
/// # Errors
/// [`ImageError::Locked`] when another open file description contradicts; nothing stays locked then.
/// `Io` when the host fails otherwise.
pub fn lock(file: BorrowedFd<'_>, read_only: bool) -> Result<(), ImageError> {
    let does = if read_only { READER } else { WRITER };
    let bytes = does
        .iter()
        .map(|bit| DOES + bit)
        .chain(FORBIDDEN.iter().map(|bit| FORBIDS + bit));
    for byte in bytes.clone() {
        match set(file, byte, libc::F_RDLCK) {
            Ok(()) => {}
            Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EINVAL) => {
                tracing::warn!("the host cannot lock the image's file: other writers are not kept out");
                return Ok(());
            }
            Err(Errno::EAGAIN | Errno::EACCES) => {
                release(file, bytes);
                return Err(ImageError::Locked {
                    user: "another process",
                });
            }
            Err(error) => return Err(failed(error)),
        }
    }
    let contradiction = contradiction(file, does);
    if !matches!(contradiction, Ok(None)) {
        release(file, bytes);
    }
    match contradiction {
        Ok(None) => Ok(()),
        Ok(Some(user)) => Err(ImageError::Locked { user }),
        Err(error) => Err(failed(error)),
    }
}

/// Between two looks at locks that are about to go.
const LOOK: Duration = Duration::from_millis(5);

/// As [`lock`], where whoever holds the file may be gone already: the kernel takes an io_uring down, and
/// with it the locks of the files that it used, some time after its process has ended. Waits for that up to
/// `patience`.
///
/// # Errors
/// As [`lock`].
pub fn lock_within(file: BorrowedFd<'_>, read_only: bool, patience: Duration) -> Result<(), ImageError> {
    let end = Instant::now() + patience;
    loop {
        match lock(file, read_only) {
            Err(ImageError::Locked { .. }) if Instant::now() < end => {
                // Nothing becomes ready; a signal makes it a shorter pause.
                let _ = ppoll(&mut [], Some(TimeSpec::from_duration(LOOK)), None);
            }
            done => return done,
        }
    }
}

/// Who else's locks contradict ours.
fn contradiction(file: BorrowedFd<'_>, does: &[i64]) -> Result<Option<&'static str>, Errno> {
    for bit in FORBIDDEN {
        if is_held(file, DOES + bit)? {
            return Ok(Some("another process that writes to it"));
        }
    }
    for bit in does {
        if is_held(file, FORBIDS + bit)? {
            return Ok(Some("another process that relies on its content"));
        }
    }
    Ok(None)
}

fn failed(error: Errno) -> ImageError {
    ImageError::io("lock the image's file")(io::Error::from(error))
}

fn flock(byte: i64, kind: i32) -> libc::flock {
    // Small constants, all of them.
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn set(file: BorrowedFd<'_>, byte: i64, kind: i32) -> Result<(), Errno> {
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&flock(byte, kind))).map(|_| ())
}

/// Whether another open file description holds a lock on this byte.
fn is_held(file: BorrowedFd<'_>, byte: i64) -> Result<bool, Errno> {
    let mut found = flock(byte, libc::F_WRLCK);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut found))?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

fn release(file: BorrowedFd<'_>, bytes: impl Iterator<Item = i64>) {
    for byte in bytes {
        if let Err(error) = set(file, byte, libc::F_UNLCK) {
            tracing::debug!(%error, "cannot give a lock back");
        }
    }
}
