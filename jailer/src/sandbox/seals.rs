//! The seals of memory that several processes have mapped: stop one from cutting it short under the others, which would
//! end by SIGBUS, and from sealing it against their writes.

use nix::fcntl::SealFlag;

/// Of guest memory, in-flight regions and what a NIC's successors share: size and seals stay as they are. The audit's
/// attacks on such memory meet these.
pub const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_SEAL);
