//! Landlock with no rule at all: stops every path and every TCP port, should a filter let a call
//! that takes one pass.

#![expect(unsafe_code, reason = "asks the kernel for Landlock's version")]

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError, Scope,
};

/// Denies the calling thread, and threads it makes, every path that Landlock knows how to deny,
/// as far as the kernel does; a kernel without Landlock denies nothing.
pub(super) fn deny_paths() -> Result<(), RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V6))?
        .handle_access(AccessNet::from_all(ABI::V6))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .restrict_self()
        .map(drop)
}

/// The version of Landlock that this kernel offers, which says how much it can deny; `None`: it has
/// none, or it is turned off. 1 denies paths, 3 truncation, 4 TCP ports, 5 ioctls on devices, 6
/// signals and abstract sockets beyond the process.
pub fn landlock_level() -> Option<u32> {
    const LANDLOCK_CREATE_RULESET_VERSION: libc::c_uint = 1;
    // SAFETY: with this flag no attributes are read.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).ok().filter(|version| *version > 0)
}
