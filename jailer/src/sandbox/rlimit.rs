//! Resource limits: stop a core file that would hold guest memory, and endless descriptors.

use super::{LockdownError, Role};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Most open descriptors of any jailed process. A peer that sends more by SCM_RIGHTS has them discarded by the kernel.
pub(crate) const MAX_OPEN_FILES: u64 = 1023;
/// Of the vmm: 32 devices or queues with a kick, a call and an error eventfd each, and room to spare.
const MOST_OF_VMM: u64 = 704;
/// Of a device process: 32 queues with three eventfds and a ring of their own, and as many of the front end's; 32
/// regions in one message; an image's layers.
const MOST_OF_DEVICE: u64 = 384;

/// Most open descriptors of a process of `role`, also RLIMIT_NOFILE's bound of how many may be in flight when it sends
/// some: Linux counts those of all of a user's processes together, and one message brings up to 253. So a process that
/// sends what nobody takes must have so many fewer than those that would be refused because of it, and some more that
/// are on their way at the same time: the supervisor is not hindered by a vmm, nor either by a device process, unless
/// threads of one that was broken into send at the same moment, which Linux counts afterwards.
#[must_use]
pub const fn most_open_files(role: Role) -> u64 {
    match role {
        Role::Disk | Role::Net | Role::Image => MOST_OF_DEVICE,
        Role::Vmm | Role::Vcpu => MOST_OF_VMM,
        Role::Supervisor | Role::Spawner | Role::Forker | Role::Relay | Role::Startup | Role::StartupRing => {
            MAX_OPEN_FILES
        }
    }
}

pub(super) fn limit_self(role: Role) -> Result<(), LockdownError> {
    lower(Resource::RLIMIT_CORE, "RLIMIT_CORE", 0)?;
    lower(Resource::RLIMIT_NOFILE, "RLIMIT_NOFILE", most_open_files(role))
}

/// Lowers both limits to at most `most`; one that is lower already stays.
fn lower(resource: Resource, name: &'static str, most: u64) -> Result<(), LockdownError> {
    let failed = |e: nix::Error| LockdownError::Limit(name, e.into());
    let (soft, hard) = getrlimit(resource).map_err(failed)?;
    setrlimit(resource, soft.min(most), hard.min(most)).map_err(failed)
}
