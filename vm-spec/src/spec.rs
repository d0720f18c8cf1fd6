//! What a person writes: `SPEC.toml`, flags and JSON are three spellings of [`VmSpec`].

use crate::disk::DiskSpec;
use crate::machine::MAX_CPUS;
use crate::net::NetSpec;
use crate::shape::{table, tables};
use crate::size::ByteSize;
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A virtual machine.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmSpec {
    /// The name that verbs use; also the guest's run-time folder. Default: `vm-PID`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What to boot.
    #[cfg_attr(test, schemars(with = "BootSpec"))]
    #[serde(default, deserialize_with = "table")]
    pub boot: BootSpec,
    /// vCPUs, 1 to 32.
    #[cfg_attr(test, schemars(range(min = 1, max = MAX_CPUS)))]
    #[serde(default = "one", deserialize_with = "cpus")]
    pub cpus: u8,
    /// Guest RAM; at least 32M.
    #[serde(default = "default_memory")]
    pub memory: ByteSize,
    /// Back RAM with huge pages of this size (`2M` or `1G`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<ByteSize>,
    /// Disks, in the order of their PCI slots unless `slot` says otherwise.
    #[cfg_attr(test, schemars(with = "Vec<DiskSpec>"))]
    #[serde(
        default,
        rename = "disk",
        deserialize_with = "tables",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub disks: Vec<DiskSpec>,
    /// Network interfaces.
    #[cfg_attr(test, schemars(with = "Vec<NetSpec>"))]
    #[serde(
        default,
        rename = "net",
        deserialize_with = "tables",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub nets: Vec<NetSpec>,
    /// Other vhost-user back ends, of any type.
    #[cfg_attr(test, schemars(with = "Vec<VhostUserSpec>"))]
    #[serde(
        default,
        rename = "vhost-user",
        deserialize_with = "tables",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub vhost_user: Vec<VhostUserSpec>,
    /// PCI slots, 0 to 8, kept for devices that are attached while the VM runs. With any, every device can be
    /// detached too.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub hotplug: u8,
    /// What a guest's reboot does.
    #[serde(default)]
    pub on_reboot: OnReboot,
    /// What the end of a device's process does.
    #[serde(default)]
    pub on_device_death: OnDeviceDeath,
    /// Seconds a guest has to power off after `bulkhead stop`, SIGTERM, SIGINT or SIGHUP before it is killed.
    #[serde(default = "default_grace")]
    pub power_off_grace: u32,
    /// What the VM may take of the host.
    #[cfg_attr(test, schemars(with = "LimitsSpec"))]
    #[serde(
        default,
        deserialize_with = "table",
        skip_serializing_if = "LimitsSpec::is_default"
    )]
    pub limits: LimitsSpec,
    /// Folders, besides an image's own, below which backing files may lie.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_folders: Vec<PathBuf>,
}

/// What to boot.
#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BootSpec {
    /// An uncompressed ELF with a PVH note, or a bzImage; the file's magic tells which. It may be left to
    /// `--kernel`.
    #[serde(default)]
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line, at most 2047 bytes.
    #[serde(default)]
    pub cmdline: String,
    /// A command and its arguments that the guest's `/bin/sh` runs in place of an init; its exit status becomes
    /// that of `bulkhead run`. It runs in the root that `cmdline` names, or else in the initial RAM disk. A
    /// reboot ends the VM.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
}

/// A disk image's format. It is always given, never guessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// The file is the disk.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// VMware's sparse or stream-optimised format. Read-only.
    Vmdk,
    /// VirtualBox's format. Read-only.
    Vdi,
    /// Hyper-V's format. Read-only.
    Vhdx,
    /// Virtual PC's format, which QEMU calls vpc. Read-only.
    #[serde(alias = "vpc")]
    Vhd,
}

impl ImageFormat {
    /// Every format.
    pub const ALL: [Self; 6] = [
        Self::Raw,
        Self::Qcow2,
        Self::Vmdk,
        Self::Vdi,
        Self::Vhdx,
        Self::Vhd,
    ];

    /// The name, as in a spec.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
            Self::Vhd => "vhd",
        }
    }

    /// The format of this name, `vpc` among them.
    pub fn named(name: &str) -> Option<Self> {
        let name = if name == "vpc" { "vhd" } else { name };
        Self::ALL.into_iter().find(|format| format.name() == name)
    }
}

/// A vhost-user back end of any type.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VhostUserSpec {
    /// Name in messages; default the type's name and a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Virtio device type: a name such as `fs`, `vsock`, `rng`, or its number (virtio 1.3, 5); not `gpu` and
    /// `input`.
    #[serde(rename = "type")]
    pub device_type: String,
    /// Socket path.
    pub socket: PathBuf,
    /// Queues, 1 to 32. For `blk` as many as the back end has at most, default one for each vCPU and 4 at most; for
    /// others instead of what the back end says. Not for types that fix them, or whose features or configuration do:
    /// `net`, `console`, `rng`, `vsock`, `sound`, `fs`, `pmem`, `i2c`, `gpio`, `spi`; nor does it count for `scsi` and
    /// `crypto` with a configuration space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// Entries of a queue at most, a power of two from 2 to 1024, for back ends that take less or more than is
    /// usual: 64 for `sound` and `can`, 128 for `scsi` and `console`, 256 for others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 2, max = crate::machine::MAX_QUEUE_SIZE)))]
    pub queue_size: Option<u16>,
    /// The back end completes requests in the order in which they were made available, so that one
    /// without an in-flight region can be succeeded after its death; network back ends always do.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_order: bool,
    /// Device configuration space in hexadecimal, for back ends without VHOST_USER_PROTOCOL_F_CONFIG. Of a type that
    /// has no name here one with it is asked for as many bytes as this has, and for none without this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// PCI device number, 1 to 31.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
}

/// What a VM may take of the host. All but `core-scheduling` need cgroup v2.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct LimitsSpec {
    /// Memory of all its processes together: the guest's RAM, and 64M or more beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// CPU time of each process, in percent of one CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<u32>,
    /// Threads of each process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids: Option<u32>,
    /// Bytes that a disk's process may read, and write, of its image's block device in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_bytes_per_second: Option<ByteSize>,
    /// Reads, and writes, of the same in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_operations_per_second: Option<u32>,
    /// No other process of the host runs on a sibling of a core that this VM runs on.
    #[serde(default)]
    pub core_scheduling: bool,
}

impl LimitsSpec {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The cgroup controllers that the limits need; none where nothing is limited.
    pub fn controllers(&self) -> Vec<&'static str> {
        let io = self.io_bytes_per_second.is_some() || self.io_operations_per_second.is_some();
        let needed = [
            ("memory", self.memory.is_some()),
            ("cpu", self.cpu_percent.is_some()),
            ("pids", self.pids.is_some()),
            ("io", io),
        ];
        let needed = needed.into_iter().filter(|(_, needed)| *needed);
        needed.map(|(controller, _)| controller).collect()
    }
}

/// What a guest's reboot does.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum OnReboot {
    /// The machine starts again from its kernel.
    #[default]
    Restart,
    /// The VM ends, with an exit code of its own.
    Exit,
}

/// What the end of a device's process does, where nobody asked for it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum OnDeviceDeath {
    /// A new process takes over; the guest only waits.
    #[default]
    Restart,
    /// The VM ends, with an exit code of its own. `hotplug` must be 0, and no device can be upgraded.
    End,
}

/// Most of [`VmSpec::hotplug`].
pub const MOST_HOTPLUG: u8 = 8;

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u8) -> bool {
    *number == 0
}

fn cpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    let number = i64::deserialize(deserializer)?;
    let fits = u8::try_from(number).ok().filter(|n| (1..=MAX_CPUS).contains(n));
    fits.ok_or_else(|| D::Error::custom(format!("{number} is not between 1 and {MAX_CPUS}")))
}

fn one() -> u8 {
    1
}

fn default_memory() -> ByteSize {
    ByteSize(256 << 20)
}

fn default_grace() -> u32 {
    10
}
