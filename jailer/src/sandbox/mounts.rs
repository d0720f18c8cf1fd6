//! The mount namespace: stops every path, for there is none: the root is an empty read-only
//! tmpfs with neither /proc nor /dev.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};
use std::ffi::CStr;

const NONE: Option<&CStr> = None;

/// Makes an empty read-only root the calling process's, and detaches every other mount of its
/// namespace. Async-signal-safe.
pub(super) fn enter_empty_root() -> nix::Result<()> {
    let bare = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(NONE, c"/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    // /proc is a directory that surely exists: id maps are written below it.
    mount(
        Some(c"none"),
        c"/proc",
        Some(c"tmpfs"),
        bare,
        Some(c"size=4k,nr_inodes=1,mode=0555"),
    )?;
    chdir(c"/proc")?;
    // With both arguments the same, the old root ends up on top of the new one and is detached
    // from there: no directory for it is needed (pivot_root(2), NOTES).
    pivot_root(c".", c".")?;
    umount2(c".", MntFlags::MNT_DETACH)?;
    chdir(c"/")?;
    mount(
        NONE,
        c"/",
        NONE,
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | bare,
        NONE,
    )
}
