//! The user and mount namespace of a whole VM, made before anyone enters them: stop the spawner from being
//! anyone outside but the users of one range, and from seeing any file.
#![expect(unsafe_code, reason = "clone, whose child waits in our memory")]

use super::mounts;
use super::userns::become_id;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getpid, getppid, pause, pipe2};
use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

/// Bytes of the waiting process's stack.
const STACK: usize = 16 << 10;
/// The root is there within this time: it takes less than a millisecond.
const DEADLINE: Duration = Duration::from_secs(10);

/// A process that waits in new namespaces: a user namespace, which has no ids yet (whoever may writes its
/// maps), and a mount namespace with nothing but an empty read-only root, which it makes meanwhile.
pub struct Anchor {
    pid: Pid,
    /// What came of the root: an errno, or 0.
    root: OwnedFd,
    /// Where the process waits, in our memory: to copy that would take longer than all else.
    _stack: Box<[u128]>,
}

/// What of an anchor is entered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Root {
    /// The user namespace alone: paths stay.
    Kept,
    /// The empty root too. What a process makes from there on has one as well.
    Empty,
}

impl Anchor {
    /// Makes the namespaces and their process, which dies with its caller. The calling process must
    /// have one thread.
    ///
    /// # Errors
    /// When the kernel makes no such namespaces.
    pub fn start() -> io::Result<Self> {
        let mut stack = vec![0_u128; STACK / size_of::<u128>()].into_boxed_slice();
        // No signal tells of its end, which would wake a caller that waits for something else.
        let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_VM;
        let (root, report) = pipe2(OFlag::O_CLOEXEC)?;
        let argument = Argument {
            parent: getpid(),
            report: report.as_raw_fd(),
        };
        let top = stack.as_mut_ptr_range().end.cast();
        // SAFETY: the child has a stack of its own, aligned, which outlives it; it makes system calls
        // that change nothing in the memory that it shares (errno, where one of them fails).
        let pid = Errno::result(unsafe { libc::clone(wait_for_ever, top, flags, argument.pack()) })?;
        Ok(Self {
            pid: Pid::from_raw(pid),
            root,
            _stack: stack,
        })
    }

    /// Its process, below whose number in `/proc` the maps are.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Enters the user namespace with whatever ids it has by now, and what `root` says, and becomes its user
    /// and group 0, with no way back. The process is of no use from then on. The calling process must have
    /// one thread.
    ///
    /// # Errors
    /// When the kernel refuses, or id 0 is not mapped.
    pub fn enter(&self, root: Root) -> io::Result<()> {
        let open = |kind: &str| File::open(format!("/proc/{}/ns/{kind}", self.pid));
        let (users, mounts) = (open("user")?, open("mnt")?);
        if root == Root::Empty {
            self.wait_for_root()?;
        }
        setns(users, CloneFlags::CLONE_NEWUSER)?;
        if root == Root::Empty {
            setns(mounts, CloneFlags::CLONE_NEWNS)?;
        }
        Ok(become_id(0)?)
    }

    fn wait_for_root(&self) -> io::Result<()> {
        let mut ready = [PollFd::new(self.root.as_fd(), PollFlags::POLLIN)];
        if poll(
            &mut ready,
            PollTimeout::try_from(DEADLINE).unwrap_or(PollTimeout::MAX),
        )? == 0
        {
            return Err(Errno::ETIMEDOUT.into());
        }
        let mut errno = [0; 4];
        File::from(self.root.try_clone()?).read_exact(&mut errno)?;
        match i32::from_ne_bytes(errno) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        // Both fail only where it is gone already. It is waited for, since it is in our memory.
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, Some(WaitPidFlag::__WCLONE));
    }
}

/// What the child is told. By value: what we point to may be gone when it begins.
struct Argument {
    parent: Pid,
    report: c_int,
}

impl Argument {
    fn pack(&self) -> *mut c_void {
        let word = (self.report as u32 as u64) << 32 | u64::from(self.parent.as_raw() as u32);
        word as usize as *mut c_void
    }

    fn unpack(word: *mut c_void) -> Self {
        let word = word as usize as u64;
        Self {
            parent: Pid::from_raw(word as u32 as i32),
            report: (word >> 32) as u32 as c_int,
        }
    }
}

extern "C" fn wait_for_ever(argument: *mut c_void) -> c_int {
    let Argument { parent, report } = Argument::unpack(argument);
    let tied = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    if tied.is_err() || getppid() != parent {
        // SAFETY: ends the process without running what the parent registered.
        unsafe { libc::_exit(1) };
    }
    let errno = mounts::enter_empty_root().err().map_or(0, |errno| errno as i32);
    let errno = errno.to_ne_bytes();
    // SAFETY: `errno` lives and is as long as said; the descriptor is this process's own copy.
    unsafe { libc::write(report, errno.as_ptr().cast(), errno.len()) };
    loop {
        pause();
    }
}
