//! The walls that an attack may meet, and sets of them.

use std::fmt;
use std::str::FromStr;

/// What stops an attack.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Wall {
    /// The role's system call filter.
    Seccomp,
    /// User, mount, pid, net, ipc, uts, cgroup and time namespaces, and the empty root.
    Namespace,
    /// Landlock: no path, no TCP port, no signal and no abstract socket beyond the process.
    Landlock,
    /// No capability in any set.
    Capability,
    /// The seals on guest memory and on the in-flight region.
    Seal,
    /// Resource limits.
    Limit,
    /// The cgroup with its limits, where the host keeps them.
    Cgroup,
}

impl Wall {
    /// Every wall.
    pub const ALL: [Self; 7] = [
        Self::Seccomp,
        Self::Namespace,
        Self::Landlock,
        Self::Capability,
        Self::Seal,
        Self::Limit,
        Self::Cgroup,
    ];

    /// Its name in reports and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Seccomp => "seccomp",
            Self::Namespace => "namespace",
            Self::Landlock => "landlock",
            Self::Capability => "capability",
            Self::Seal => "seal",
            Self::Limit => "limit",
            Self::Cgroup => "cgroup",
        }
    }
}

impl fmt::Display for Wall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A text that names no wall.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is none of seccomp, namespace, landlock, capability, seal, limit, cgroup")]
pub struct ParseWallError(String);

impl FromStr for Wall {
    type Err = ParseWallError;

    fn from_str(text: &str) -> Result<Self, ParseWallError> {
        let known = Self::ALL.into_iter().find(|wall| wall.name() == text);
        known.ok_or_else(|| ParseWallError(text.to_owned()))
    }
}

/// Walls that are taken away.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Removed(u8);

impl Removed {
    /// None: the jail as it is used.
    pub const NONE: Self = Self(0);
    /// All: what an attack can do on this host at all.
    pub const ALL: Self = Self((1 << Wall::ALL.len()) - 1);

    /// Exactly this one.
    pub const fn only(wall: Wall) -> Self {
        Self(1 << wall as u8)
    }

    /// Whether `wall` is taken away.
    pub const fn has(self, wall: Wall) -> bool {
        self.0 & 1 << wall as u8 != 0
    }

    pub(super) fn bits(self) -> u8 {
        self.0
    }

    pub(super) fn from_bits(bits: u8) -> Self {
        Self(bits & Self::ALL.0)
    }
}
