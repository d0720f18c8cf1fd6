//! The user namespace: stops a jailed process from being anyone but one unprivileged user
//! outside, whatever it becomes inside.
//!
//! Inner id 0 is mapped, with no capabilities: the launcher, which is that outer user, may then
//! read `/proc/PID` of a child that made itself non-dumpable (ptrace rules ask for a mapped root).

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, write};
use std::ffi::CStr;
use std::os::fd::OwnedFd;

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

    /// Maps the calling process, which has just entered its namespace. Async-signal-safe.
    pub(super) fn write_own(&self) -> nix::Result<()> {
        // Without CAP_SETGID outside, gid_map asks for setgroups to be denied for good.
        put(c"/proc/self/setgroups", b"deny")?;
        put(c"/proc/self/uid_map", self.uid.as_bytes())?;
        put(c"/proc/self/gid_map", self.gid.as_bytes())
    }
}

fn put(path: &CStr, text: &[u8]) -> nix::Result<()> {
    let file: OwnedFd = open(path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    write(&file, text).map(drop)
}
