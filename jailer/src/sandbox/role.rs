//! Who a process or thread is, which decides what it may call.

use std::fmt;
use std::str::FromStr;

/// The part that a process or thread plays; each has a policy of its own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    /// vhost-user-blk.
    Disk,
    /// vhost-user-net.
    Net,
    /// The vmm's main thread and its device threads.
    Vmm,
    /// The vmm's vCPU threads.
    Vcpu,
    /// bulkhead-supervisor.
    Supervisor,
    /// bulkhead-image.
    Image,
    /// `bulkhead run` once everything is spawned.
    Spawner,
    /// The spawner's helper that makes successors.
    Forker,
    /// What carries frames between a `user` NIC's TAP and passt.
    Relay,
    /// Any jailed process from before its exec to its own lockdown.
    Startup,
    /// The same, of a disk process that makes a ring for what goes past the page cache.
    StartupRing,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 11] = [
        Self::Disk,
        Self::Net,
        Self::Vmm,
        Self::Vcpu,
        Self::Supervisor,
        Self::Image,
        Self::Spawner,
        Self::Forker,
        Self::Relay,
        Self::Startup,
        Self::StartupRing,
    ];

    /// The name in policies' file names and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Net => "net",
            Self::Vmm => "vmm",
            Self::Vcpu => "vcpu",
            Self::Supervisor => "supervisor",
            Self::Image => "image",
            Self::Spawner => "spawner",
            Self::Forker => "forker",
            Self::Relay => "relay",
            Self::Startup => "startup",
            Self::StartupRing => "startup-ring",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no role or no mode.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{given}' is none of {known}")]
pub struct ParseRoleError {
    given: String,
    known: &'static str,
}

impl FromStr for Role {
    type Err = ParseRoleError;

    fn from_str(text: &str) -> Result<Self, ParseRoleError> {
        Self::ALL
            .into_iter()
            .find(|role| role.name() == text)
            .ok_or_else(|| ParseRoleError {
                given: text.to_owned(),
                known: "disk, net, vmm, vcpu, supervisor, image, spawner, forker, relay, startup, startup-ring",
            })
    }
}

/// What becomes of a system call that the policy does not allow.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum SeccompMode {
    /// The process is killed.
    #[default]
    Enforce,
    /// It is not done; the process names it on standard error and ends with the same exit code.
    /// For finding out why a process was killed.
    Trap,
    /// It passes, and the kernel's log names it. For finding what a policy lacks.
    Log,
    /// No filter is installed. For debugging only: whoever chooses it is warned.
    Off,
}

impl SeccompMode {
    /// What to say to a person who gives up protection by it.
    pub fn warning(self) -> Option<&'static str> {
        match self {
            Self::Enforce | Self::Trap => None,
            Self::Log => Some("forbidden system calls are written to the kernel's log, and pass"),
            Self::Off => Some("no process has a system call filter"),
        }
    }
}

impl fmt::Display for SeccompMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enforce => "enforce",
            Self::Trap => "trap",
            Self::Log => "log",
            Self::Off => "off",
        })
    }
}

impl FromStr for SeccompMode {
    type Err = ParseRoleError;

    fn from_str(text: &str) -> Result<Self, ParseRoleError> {
        match text {
            "enforce" => Ok(Self::Enforce),
            "trap" => Ok(Self::Trap),
            "log" => Ok(Self::Log),
            "off" => Ok(Self::Off),
            _ => Err(ParseRoleError {
                given: text.to_owned(),
                known: "enforce, trap, log, off",
            }),
        }
    }
}
