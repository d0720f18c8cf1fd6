//! User namespaces: stop a jailed process from being anyone but one unprivileged user outside,
//! whatever it becomes inside.
//!
//! ```text
//!   host                VM's namespace (where ids are to be had)   a process's own namespace
//!   range 64 ids  ----> 0 spawner, 1 vmm, 2 ... devices      ----> 0, and no other
//! ```
//!
//! Without a range there is no namespace in the middle, and each process's 0 is the launcher's user.
//! Inner id 0 is mapped, with no capabilities: the launcher may then read `/proc/PID` of a child that
//! made itself non-dumpable (ptrace rules ask for a mapped root).
#![expect(
    unsafe_code,
    reason = "credentials of the one thread that a child has before its exec"
)]

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, write};
use std::ffi::CStr;
use std::os::fd::BorrowedFd;

/// The texts of `uid_map` and `gid_map`, made before the clone: the child must not allocate.
pub(super) struct IdMaps {
    uid: String,
    gid: String,
}

impl IdMaps {
    /// Inner user 0 is outer `uid`, inner group 0 is outer `gid`, and there are no others.
    pub(super) fn new(uid: Uid, gid: Gid) -> Self {
        Self {
            uid: format!("0 {uid} 1"),
            gid: format!("0 {gid} 1"),
        }
    }

    /// Maps the calling process, which has just entered its namespace; `proc` is `/proc`. Async-signal-safe.
    pub(super) fn write_own(&self, proc: BorrowedFd<'_>) -> nix::Result<()> {
        let put = |path: &CStr, text: &[u8]| {
            let file = openat(proc, path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
            write(&file, text).map(drop)
        };
        // Without CAP_SETGID outside, gid_map asks for setgroups to be denied for good.
        put(c"self/setgroups", b"deny")?;
        put(c"self/uid_map", self.uid.as_bytes())?;
        put(c"self/gid_map", self.gid.as_bytes())
    }
}

/// Becomes user and group `id` of the caller's namespace, in no other group, with no way back.
/// Async-signal-safe. The calling process must have one thread.
///
/// # Errors
/// EPERM or EINVAL: the caller may not, or there is no such id.
pub(super) fn become_id(id: u32) -> nix::Result<()> {
    // SAFETY: an empty list is not read.
    Errno::result(unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()) })?;
    // SAFETY: numbers only; the C library's own form would wait for other threads, and there are none.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresgid, id, id, id) })?;
    // SAFETY: as above.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, id, id, id) })?;
    // The kernel made us non-dumpable, which would keep us from writing our or our children's maps.
    nix::sys::prctl::set_dumpable(true)
}
