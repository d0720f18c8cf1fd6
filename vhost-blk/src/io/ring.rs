//! An io_uring that can read and write files and nothing else.
//!
//! seccomp does not see what a ring is asked to do: OPENAT through a plain ring opens files under a
//! filter that forbids it. So the ring is made disabled, restricted to the policy's opcodes without flags, and
//! only then enabled, before the process is confined; it cannot be changed afterwards, and no other
//! can be made.
#![expect(unsafe_code, reason = "hands guest memory to the kernel by pointer")]

use crate::image::IoGuard;
use crate::request::Request;
use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use jailer::sandbox::{Role, opcodes};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};
use vhost_daemon::{Chain, faults};
use vm_memory::VolatileSlice;

/// Transfers under way on one queue.
const DEPTH: u16 = 128;
/// Until what the kernel could not take is handed to it again.
const BUSY: Duration = Duration::from_millis(10);
/// The kernel's IOV_MAX.
const MAX_IOVECS: usize = 1024;

/// Which way the data goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    /// From the file to guest memory.
    Read,
    /// From guest memory to the file.
    Write,
}

/// A request that moves data.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) chain: Chain,
    pub(crate) direction: Direction,
    /// Bytes of the request that were moved before, by a call.
    pub(crate) at_once: usize,
    /// The others, in bytes.
    pub(crate) length: usize,
    /// When the request was taken.
    pub(crate) taken: Instant,
}

impl Transfer {
    /// Replaces `iovecs` by the guest memory that it moves from or to.
    fn fill(&self, iovecs: &mut Vec<libc::iovec>) {
        iovecs.clear();
        let fill = |slices: &[VolatileSlice<'_>]| iovecs.extend(slices.iter().map(iovec));
        match self.direction {
            Direction::Read => self.chain.with_writable(self.at_once, self.length, fill),
            Direction::Write => {
                let skip = Request::HEADER_LENGTH + self.at_once;
                self.chain.with_readable(skip, self.length, fill);
            }
        }
    }
}

/// A transfer that the kernel works on: what must stay as it is until it has ended.
struct Pending {
    transfer: Transfer,
    /// Keeps the host clusters from being reused.
    _guard: IoGuard<'static>,
}

/// Room for one transfer.
#[derive(Default)]
struct Slot {
    pending: Option<Pending>,
    /// Read by the kernel at submission, which may be later than the push; kept for the next transfer.
    iovecs: Vec<libc::iovec>,
}

/// The ring of one queue.
pub(crate) struct RestrictedRing {
    ring: IoUring,
    slots: Vec<Slot>,
    free: Vec<u16>,
    writes: bool,
}

// SAFETY: the pointers in it point to guest memory, which each transfer's chain keeps mapped whichever
// thread it is on, and to vectors that go along.
unsafe impl Send for RestrictedRing {}

impl RestrictedRing {
    /// Makes the ring, for reads and, if it is for `writes` too, for these; before lockdown.
    ///
    /// # Errors
    /// Where the host has no io_uring, or forbids it.
    pub(crate) fn new(writes: bool) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(DEPTH.into())?;
        let allowed = opcodes(Role::Disk).iter();
        let allowed = allowed.filter(|opcode| writes || opcode.number != opcode::Writev::CODE);
        let mut allowed: Vec<_> = allowed.map(|opcode| Restriction::sqe_op(opcode.number)).collect();
        ring.submitter().register_restrictions(&mut allowed)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self {
            ring,
            slots: (0..DEPTH).map(|_| Slot::default()).collect(),
            free: (0..DEPTH).rev().collect(),
            writes,
        })
    }

    /// Whether it may write.
    pub(crate) fn writes(&self) -> bool {
        self.writes
    }

    /// Whether a transfer can be taken.
    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether transfers are under way.
    pub(crate) fn is_busy(&self) -> bool {
        self.free.len() < self.slots.len()
    }

    /// Queues `transfer` for the range at `at` of `file`; [`Self::submit`] begins it. Gives it back
    /// where it does not fit one entry.
    pub(crate) fn push(
        &mut self,
        transfer: Transfer,
        file: BorrowedFd<'_>,
        at: u64,
        guard: IoGuard<'static>,
    ) -> Result<(), Transfer> {
        let Some(number) = self.free.last().copied() else {
            return Err(transfer);
        };
        let slot = &mut self.slots[usize::from(number)];
        transfer.fill(&mut slot.iovecs);
        let iovecs = &slot.iovecs;
        if iovecs.len() > MAX_IOVECS {
            return Err(transfer);
        }
        let (fd, count) = (types::Fd(file.as_raw_fd()), iovecs.len() as u32);
        let entry = match transfer.direction {
            Direction::Read => opcode::Readv::new(fd, iovecs.as_ptr(), count).offset(at).build(),
            Direction::Write => opcode::Writev::new(fd, iovecs.as_ptr(), count).offset(at).build(),
        };
        let entry: squeue::Entry = entry.user_data(number.into());
        // SAFETY: the entry points to `iovecs` and those to memory of the chain; both are kept in the slot
        // until the kernel says that the transfer has ended, also by `drop`.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            return Err(transfer);
        }
        self.free.pop();
        slot.pending = Some(Pending {
            transfer,
            _guard: guard,
        });
        Ok(())
    }

    /// Hands to the kernel what was pushed. What it cannot take now stays queued: then says after which time to call
    /// again, since nothing else may.
    pub(crate) fn submit(&mut self) -> io::Result<Option<Duration>> {
        if self.ring.submission().is_empty() {
            return Ok(None);
        }
        accept_busy(faults::ring().and_then(|()| self.ring.submit()))?;
        Ok((!self.ring.submission().is_empty()).then_some(BUSY))
    }

    /// Waits until a transfer has ended, or some time where the kernel cannot take them all now; one must be under way.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        accept_busy(self.ring.submit_and_wait(1))?;
        if !self.ring.submission().is_empty() {
            let mut ended = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
            // A signal: the caller calls again.
            let _ = ppoll(&mut ended, Some(BUSY.into()), None);
        }
        Ok(())
    }

    /// Whether one has ended; asks the kernel nothing.
    pub(crate) fn has_ended(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// A transfer that has ended, and the bytes that it moved.
    pub(crate) fn ended(&mut self) -> Option<(Transfer, Result<usize, Errno>)> {
        let entry = self.ring.completion().next()?;
        let slot = u16::try_from(entry.user_data()).ok()?;
        let pending = self.slots.get_mut(usize::from(slot))?.pending.take()?;
        self.free.push(slot);
        let moved = usize::try_from(entry.result()).map_err(|_| Errno::from_raw(-entry.result()));
        Some((pending.transfer, moved))
    }
}

/// The kernel is out of something that ends of transfers give back, or a signal came: try again.
fn accept_busy(result: io::Result<usize>) -> io::Result<()> {
    match result.as_ref().map_err(io::Error::raw_os_error) {
        Err(Some(libc::EAGAIN | libc::EBUSY | libc::EINTR)) => Ok(()),
        _ => result.map(drop),
    }
}

fn iovec(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

impl AsFd for RestrictedRing {
    /// Readable when a transfer has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as `self` is.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for RestrictedRing {
    /// The kernel may still write to what is pending: it is never freed.
    fn drop(&mut self) {
        if self.is_busy() {
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

/// Whether the host has no io_uring for anybody.
#[cfg(test)]
pub(crate) fn is_refused() -> bool {
    let refused = |error: io::Error| matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS));
    IoUring::new(1).is_err_and(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result_of(ring: &mut RestrictedRing, entry: &squeue::Entry) -> i32 {
        // SAFETY: the entries of these tests point to static memory, or to none.
        unsafe { ring.ring.submission().push(entry) }.unwrap();
        ring.ring.submit_and_wait(1).unwrap();
        ring.ring.completion().next().unwrap().result()
    }

    #[test]
    fn the_policy_names_what_is_used_and_no_more() {
        let named: Vec<u8> = opcodes(Role::Disk).iter().map(|opcode| opcode.number).collect();
        assert_eq!(named, [opcode::Readv::CODE, opcode::Writev::CODE]);
    }

    #[test]
    fn a_restricted_ring_opens_nothing() {
        let mut ring = match RestrictedRing::new(true) {
            Err(error) if is_refused() => return eprintln!("no io_uring here: {error}"),
            ring => ring.unwrap(),
        };
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr()).build();
        assert_eq!(result_of(&mut ring, &open), -libc::EACCES);
        let linked = opcode::Readv::new(types::Fd(0), std::ptr::null(), 0).build();
        let linked = linked.flags(squeue::Flags::ASYNC);
        assert_eq!(result_of(&mut ring, &linked), -libc::EACCES);
        assert!(ring.ring.submitter().register_files(&[0]).is_err());
        // The same open through a ring without restrictions shows that they are what refuses it.
        let mut plain = IoUring::new(1).unwrap();
        // SAFETY: the path is static.
        unsafe { plain.submission().push(&open) }.unwrap();
        plain.submit_and_wait(1).unwrap();
        assert!(plain.completion().next().unwrap().result() >= 0);
    }
}
