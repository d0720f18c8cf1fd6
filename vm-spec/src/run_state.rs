//! What is known of a running VM from outside: `state.json` in its run-time folder
//! (`$XDG_RUNTIME_DIR/bulkhead/NAME`, or `/tmp/bulkhead-UID/NAME`).
//!
//! The spawner writes it whole and renames it into place: once when every process runs, again when the guest runs,
//! when a process has a successor, when a device is attached or detached, and when the VM is over. Times are
//! CLOCK_MONOTONIC nanoseconds.

use serde::{Deserialize, Serialize};

/// Name of the file in the VM's run-time folder.
pub const FILE_NAME: &str = "state.json";
/// Version of this format.
pub const VERSION: u16 = 1;

/// A VM's processes and times.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RunState {
    /// [`VERSION`].
    pub version: u16,
    /// The VM's name.
    pub name: String,
    /// Whose ids its processes have outside.
    #[serde(default)]
    pub identity: Identity,
    /// Every process, the spawner first.
    pub processes: Vec<ProcessState>,
    /// When the launcher started.
    pub launched_ns: u64,
    /// The same by the clock on the wall, in seconds of the Unix epoch: CLOCK_MONOTONIC stands still while the host
    /// sleeps.
    #[serde(default)]
    pub launched_unix: u64,
    /// When the last process had been made.
    pub spawned_ns: u64,
    /// When the vmm started to build the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_started_ns: Option<u64>,
    /// Just before the guest's first instruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_instruction_ns: Option<u64>,
    /// When the VM was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ns: Option<u64>,
    /// The exit code that `bulkhead run` ends with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
}

/// Who a VM's processes are outside their user namespaces.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Identity {
    /// All the user who started the VM.
    #[default]
    Own,
    /// Each a user and group of its own, of the subordinate ids of the user who started the VM.
    Subordinate,
    /// Each a user and group of its own, of a range that root's VM has for itself.
    Range,
}

/// What a process does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProcessRole {
    /// Made every other process, reaps them and cleans up.
    Spawner,
    /// Cleans up should the spawner die.
    Reaper,
    /// Connects to someone else's back ends again.
    Connector,
    /// Console, logs, deadlines.
    Supervisor,
    /// KVM and the guest.
    Vmm,
    /// vhost-user-blk.
    Disk,
    /// vhost-user-net.
    Net,
    /// Holds the network namespace of a `private` NIC; enter it to reach the TAP's other side.
    NetNamespace,
    /// Makes successors of device processes, once the spawner is confined.
    Forker,
}

impl ProcessRole {
    /// Whether the process is a device's back end.
    pub fn is_device(self) -> bool {
        matches!(self, Self::Disk | Self::Net)
    }

    /// The role's policy in `jailer/policy`, where the process has one.
    pub fn policy(self) -> Option<&'static str> {
        match self {
            Self::Spawner => Some("spawner"),
            Self::Supervisor => Some("supervisor"),
            Self::Vmm => Some("vmm"),
            Self::Disk => Some("disk"),
            Self::Net => Some("net"),
            Self::Forker => Some("forker"),
            Self::Reaper | Self::Connector | Self::NetNamespace => None,
        }
    }
}

/// One process.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ProcessState {
    /// `spawner`, `reaper`, `supervisor`, `vmm`, or a device's id.
    pub name: String,
    /// What it does.
    pub role: ProcessRole,
    /// Its process id in the launcher's namespace.
    pub pid: i32,
    /// Its user and group id outside, if they are its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u32>,
    /// Whether it runs in a jail of its own namespaces.
    pub jailed: bool,
    /// The file descriptors it was executed with; empty where nothing was executed. Those of the vmm and the supervisor
    /// that belong to a device are closed once it was detached, and stand here still.
    pub fds: Vec<FdState>,
    /// Every other that it holds while the guest runs.
    #[serde(default)]
    pub made: Vec<MadeFds>,
}

/// One descriptor at exec.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FdState {
    /// Its number.
    pub number: i32,
    /// What it is, as `--dry-run` says it.
    pub what: String,
    /// How long the process keeps it. The number of one that was closed may be another's.
    #[serde(default)]
    pub kept: Kept,
}

/// How long a process keeps a descriptor that it was executed with.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kept {
    /// As long as it lives.
    #[default]
    Always,
    /// Until it has locked itself down.
    UntilLockdown,
    /// Until it reads the end of the file.
    UntilEndOfFile,
}

/// Descriptors of one kind that a process makes, or is sent, after exec.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MadeFds {
    /// How they are told.
    pub link: FdLink,
    /// What they are, as `--dry-run` says it.
    pub what: String,
    /// Fewest of them.
    pub least: u32,
    /// Most of them; null or absent: as many as there are queues to serve. (These are sent between processes, too,
    /// in an encoding in which nothing can be left out.)
    #[serde(default)]
    pub most: Option<u32>,
}

/// What `/proc/PID/fd/N` links to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FdLink {
    /// A text that starts so: `anon_inode:[eventfd]`, `/memfd:guest-ram`.
    Named(String),
    /// What a descriptor links to that a process of this VM was executed with.
    SameAs {
        /// The process's name.
        process: String,
        /// The descriptor's number.
        number: i32,
    },
}
