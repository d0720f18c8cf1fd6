//! The steps in which a jail is built, and why there is none.

use super::child::DEADLINE;
use std::io;

/// Where a child stopped before it executed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Step {
    /// Binding its life to the spawner's.
    DeathSignal = 1,
    /// Becoming a user of its own.
    Identity,
    /// Namespaces of its own.
    Namespaces,
    /// Writing its id maps.
    IdMaps,
    /// A network namespace of its own.
    Network,
    /// A session of its own.
    Session,
    /// A session keyring of its own.
    Keyring,
    /// Its own host name.
    HostName,
    /// The empty root.
    Root,
    /// Its descriptors.
    Descriptors,
    /// Its resource limits.
    Limits,
    /// Its capabilities.
    Capabilities,
    /// The filter of its start.
    Filter,
    /// Executing the binary.
    Execute,
}

impl Step {
    pub(super) const ALL: [Self; 14] = [
        Self::DeathSignal,
        Self::Identity,
        Self::Namespaces,
        Self::IdMaps,
        Self::Network,
        Self::Session,
        Self::Keyring,
        Self::HostName,
        Self::Root,
        Self::Descriptors,
        Self::Limits,
        Self::Capabilities,
        Self::Filter,
        Self::Execute,
    ];

    fn what(self) -> &'static str {
        match self {
            Self::DeathSignal => "tie itself to its parent",
            Self::Identity => "become a user of its own",
            Self::Namespaces => "enter namespaces of its own",
            Self::IdMaps => "map its user in a user namespace",
            Self::Network => "enter a network namespace of its own",
            Self::Session => "start a session",
            Self::Keyring => "start a session keyring",
            Self::HostName => "set its host name",
            Self::Root => "enter an empty root",
            Self::Descriptors => "arrange its file descriptors",
            Self::Limits => "set its resource limits",
            Self::Capabilities => "drop its capabilities",
            Self::Filter => "install the system call filter of its start",
            Self::Execute => "execute its binary",
        }
    }
}

/// Why a child could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The namespaces were refused.
    #[error("cannot make a process in namespaces of its own")]
    Clone(#[source] io::Error),
    /// The pipe for the child's report.
    #[error("cannot make a pipe")]
    Pipe(#[source] io::Error),
    /// The child failed in a step.
    #[error("the new process could not {}", .0.what())]
    Child(Step, #[source] io::Error),
    /// The child hangs.
    #[error("the new process has not built its jail after {DEADLINE:?}")]
    Late,
    /// The child died before it executed.
    #[error("the new process died while its jail was built")]
    Died,
}
