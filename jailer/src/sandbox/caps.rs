//! Capabilities: none, now and after any exec. Stops what user id 0 in a namespace would get.
#![expect(
    unsafe_code,
    reason = "capset and prctl have no safe form that makes no allocation"
)]

use std::io;

/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION_3: u32 = 0x2008_0522;
/// NOROOT, NO_SETUID_FIXUP, KEEP_CAPS off and NO_CAP_AMBIENT_RAISE, each locked
/// (`linux/securebits.h`): exec as uid 0 gives nothing back.
const SECUREBITS: libc::c_ulong = 0b1110_1111;

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`; two of them hold 64 capabilities.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Empties every capability set of the calling thread; with CAP_SETPCAP also the bounding set,
/// and locks the securebits so that an exec as uid 0 gains none. Async-signal-safe.
///
/// # Errors
/// When the kernel refuses to empty the effective, permitted and inheritable sets.
pub fn drop_all() -> io::Result<()> {
    if effective()? != 0 {
        // Both need CAP_SETPCAP. Without it the sets are emptied below all the same, and
        // no_new_privs, which every caller sets next, keeps an exec from filling them.
        set_securebits();
        drop_bounding();
    }
    // SAFETY: PR_CAP_AMBIENT_CLEAR_ALL takes no pointer. Its failure (a kernel without ambient
    // capabilities) leaves nothing to clear.
    unsafe {
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    }
    keep_only(0)
}

/// Gives up every capability of the calling thread but those in `kept`, a bit each; nothing is
/// inherited. Async-signal-safe.
///
/// # Errors
/// When the kernel refuses: some of `kept` are not there.
pub fn keep_only(kept: u64) -> io::Result<()> {
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let half = |bits: u64| Data {
        effective: bits as u32,
        permitted: bits as u32,
        inheritable: 0,
    };
    let data = [half(kept), half(kept >> 32)];
    // SAFETY: both pointers are to live values of the layouts that version 3 prescribes.
    let rc = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The effective set of the calling thread. Async-signal-safe.
///
/// # Errors
/// When the kernel refuses capget.
pub fn effective() -> io::Result<u64> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: both pointers are to live values of the layouts that version 3 prescribes.
    let rc = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    if rc == 0 {
        Ok(u64::from(data[0].effective) | u64::from(data[1].effective) << 32)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn set_securebits() {
    // SAFETY: PR_SET_SECUREBITS takes no pointer.
    unsafe {
        libc::prctl(libc::PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0);
    }
}

fn drop_bounding() {
    for capability in 0..64 as libc::c_ulong {
        // SAFETY: PR_CAPBSET_DROP takes no pointer; EINVAL past the last one ends the loop.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            break;
        }
    }
}
