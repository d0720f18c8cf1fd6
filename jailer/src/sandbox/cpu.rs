//! What processes share below the system calls: pages that are merged because they are alike, and
//! the execution units of one core. Stops one guest from timing what another does with them.
#![expect(unsafe_code, reason = "prctl of these options has no safe form")]

/// Takes the process out of same-page merging (KSM), should whoever started it have put it in: that
/// a page is merged tells another process what is in it. A kernel without KSM merges nothing.
pub(super) fn keep_pages_apart() {
    const PR_SET_MEMORY_MERGE: libc::c_int = 67;
    // SAFETY: this option takes no pointer.
    unsafe { libc::prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0) };
}

/// Core scheduling: from now on no other process runs on a sibling of a core that this process, or
/// one that it makes, runs on.
///
/// # Errors
/// EINVAL or ENODEV: the kernel is built without it, or no core has siblings.
#[cfg(feature = "launcher")]
pub fn share_cores_within() -> std::io::Result<()> {
    const PR_SCHED_CORE: libc::c_int = 62;
    const PR_SCHED_CORE_CREATE: libc::c_ulong = 1;
    const PIDTYPE_TGID: libc::c_ulong = 1;
    // SAFETY: creating a cookie takes no pointer; process 0 is the caller.
    match unsafe { libc::prctl(PR_SCHED_CORE, PR_SCHED_CORE_CREATE, 0, PIDTYPE_TGID, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
