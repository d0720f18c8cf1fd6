//! Landlock with no rule at all: stops every path and every TCP port, should a filter let a call
//! that takes one pass.

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
