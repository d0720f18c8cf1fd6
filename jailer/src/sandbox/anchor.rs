//! The user namespace of a whole VM, made before anyone enters it: stops the spawner from being anyone
//! outside but the users of one range.
#![expect(unsafe_code, reason = "clone, whose child waits in our memory")]

use super::userns::become_id;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getpid, getppid, pause};
use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io;

/// Bytes of the waiting process's stack.
const STACK: usize = 16 << 10;

/// A process that waits in a new user namespace, which has no ids yet: whoever may writes its maps.
pub struct Anchor {
    pid: Pid,
    /// Where the process waits, in our memory: to copy that would take longer than all else.
    _stack: Box<[u128]>,
}

impl Anchor {
    /// Makes the namespace and its process, which dies with its caller. The calling process must
    /// have one thread.
    ///
    /// # Errors
    /// When the kernel makes no such namespace.
    pub fn start() -> io::Result<Self> {
        let mut stack = vec![0_u128; STACK / size_of::<u128>()].into_boxed_slice();
        // No signal tells of its end, which would wake a caller that waits for something else.
        let flags = libc::CLONE_NEWUSER | libc::CLONE_VM;
        // By value: what we point to may be gone when the child begins.
        let parent = getpid().as_raw() as usize as *mut c_void;
        let top = stack.as_mut_ptr_range().end.cast();
        // SAFETY: the child has a stack of its own, aligned, which outlives it; it makes system calls
        // that change nothing in the memory that it shares.
        let pid = Errno::result(unsafe { libc::clone(wait_for_ever, top, flags, parent) })?;
        Ok(Self {
            pid: Pid::from_raw(pid),
            _stack: stack,
        })
    }

    /// Its process, below whose number in `/proc` the maps are.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Enters the namespace with whatever ids it has by now, and becomes its user and group 0, with no
    /// way back. The process is of no use from then on. The calling process must have one thread.
    ///
    /// # Errors
    /// When the kernel refuses, or id 0 is not mapped.
    pub fn enter(&self) -> io::Result<()> {
        let namespace = File::open(format!("/proc/{}/ns/user", self.pid))?;
        setns(namespace, CloneFlags::CLONE_NEWUSER)?;
        Ok(become_id(0)?)
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        // Both fail only where it is gone already. It is waited for, since it is in our memory.
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, Some(WaitPidFlag::__WCLONE));
    }
}

extern "C" fn wait_for_ever(parent: *mut c_void) -> c_int {
    let tied = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    if tied.is_err() || getppid().as_raw() as usize != parent as usize {
        // SAFETY: ends the process without running what the parent registered.
        unsafe { libc::_exit(1) };
    }
    loop {
        pause();
    }
}
