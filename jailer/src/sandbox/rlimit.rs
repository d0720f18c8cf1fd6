//! Resource limits: stop a core file that would hold guest memory, and endless descriptors.

use super::LockdownError;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Most open descriptors of a jailed process: 32 devices or queues with a kick, a call and an error eventfd each, and
/// room to spare. A peer that sends more by SCM_RIGHTS has them discarded by the kernel.
pub const MAX_OPEN_FILES: u64 = 1023;

pub(super) fn limit_self() -> Result<(), LockdownError> {
    lower(Resource::RLIMIT_CORE, "RLIMIT_CORE", 0)?;
    lower(Resource::RLIMIT_NOFILE, "RLIMIT_NOFILE", MAX_OPEN_FILES)
}

/// Lowers both limits to at most `most`; one that is lower already stays.
fn lower(resource: Resource, name: &'static str, most: u64) -> Result<(), LockdownError> {
    let failed = |e: nix::Error| LockdownError::Limit(name, e.into());
    let (soft, hard) = getrlimit(resource).map_err(failed)?;
    setrlimit(resource, soft.min(most), hard.min(most)).map_err(failed)
}
