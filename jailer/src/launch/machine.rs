//! From what a person wrote to what is meant: defaults filled in, alternatives told apart, every
//! field checked. Pure: nothing is opened here.

use super::disk::{self, Disk};
use super::net::{self, Nic, Passt, Publish};
use crate::failure::Failure;
use crate::tell::tell;
use std::path::{Path, PathBuf};
use vm_spec::control::{DeviceConfig, FdNumber};
use vm_spec::machine::{FIRST_SLOT, LAST_SLOT, MAX_CPUS, MAX_MEMORY, MAX_QUEUE_SIZE, MIN_MEMORY};
use vm_spec::size::ByteSize;
use vm_spec::spec::{BootSpec, MOST_HOTPLUG, OnDeviceDeath, VhostUserSpec, VmSpec};

/// Longest kernel command line in bytes (x86 COMMAND_LINE_SIZE less the end).
const LONGEST_CMDLINE: usize = 2047;
/// What the processes of a VM need beside the guest's RAM, in bytes.
const BESIDE_RAM: u64 = 64 << 20;

/// A device whose spec is sound.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Device {
    pub(crate) id: String,
    /// The field of the spec that it comes from, for messages.
    pub(crate) field: String,
    pub(crate) slot: u8,
    pub(crate) device_type: u16,
    pub(crate) num_queues: Option<u16>,
    /// See [`vm_spec::control::DeviceConfig::config`].
    pub(crate) config: Vec<u8>,
    pub(crate) config_features: u64,
    pub(crate) backend: Backend,
}

impl Device {
    /// What the vmm is told of it, with its socket and both ends of its request channel.
    pub(crate) fn config(&self, [socket, requests, requests_peer]: [FdNumber; 3]) -> DeviceConfig {
        DeviceConfig {
            id: self.id.clone(),
            slot: self.slot,
            device_type: self.device_type,
            socket,
            requests,
            requests_peer,
            num_queues: self.num_queues,
            queue_size: match &self.backend {
                Backend::External(remote) => remote.queue_size,
                _ => None,
            },
            config: self.config.clone(),
            config_features: self.config_features,
            ours: self.is_ours(),
            in_order: matches!(&self.backend, Backend::External(remote) if remote.in_order),
        }
    }

    /// A process of ours serves it.
    pub(crate) fn is_ours(&self) -> bool {
        matches!(self.backend, Backend::Disk(_) | Backend::Net(_))
    }
}

/// Who serves a device.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Backend {
    /// vhost-user-blk, which we start.
    Disk(Disk),
    /// vhost-user-net, which we start.
    Net(Nic),
    /// passt, which serves a NIC's queues itself.
    Passt {
        passt: Passt,
        publish: Vec<Publish>,
        mtu: Option<u16>,
    },
    /// Someone else.
    External(Remote),
}

/// Someone else's back end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Remote {
    pub(crate) socket: PathBuf,
    /// See [`VhostUserSpec::in_order`].
    pub(crate) in_order: bool,
    /// See [`VhostUserSpec::queue_size`].
    pub(crate) queue_size: Option<u16>,
}

impl Remote {
    pub(crate) fn at(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            in_order: false,
            queue_size: None,
        }
    }
}

/// The name and the devices of a sound spec.
pub(crate) fn check(spec: &VmSpec, default_name: &str) -> Result<(String, Vec<Device>), Failure> {
    let name = spec.name.clone().unwrap_or_else(|| default_name.to_owned());
    check_name("name", &name)?;
    check_machine(spec)?;
    let mut devices = Vec::new();
    for (n, disk) in spec.disks.iter().enumerate() {
        devices.push(disk::check(spec.cpus, n, disk)?);
    }
    for (n, nic) in spec.nets.iter().enumerate() {
        devices.push(net::check(&name, n, nic)?);
    }
    for (n, other) in spec.vhost_user.iter().enumerate() {
        devices.push(check_vhost_user(n, spec.cpus, other)?);
    }
    assign_slots(spec, &mut devices)?;
    if spares(spec, &devices).len() < spec.hotplug.into() {
        return Err(Failure::usage(format!(
            "hotplug: no PCI slots are left for {}, a VM has {LAST_SLOT}",
            spec.hotplug
        )));
    }
    for (n, device) in devices.iter().enumerate() {
        check_name(&format!("{}.id", device.field), &device.id)?;
        if devices[..n].iter().any(|other| other.id == device.id) {
            return Err(Failure::usage(format!(
                "{}.id: {}",
                device.field,
                id_is_taken(&device.id)
            )));
        }
    }
    Ok((name, devices))
}

/// Why no device can have this id.
pub(super) fn id_is_taken(id: &str) -> String {
    format!("'{id}' is another device's id")
}

fn check_machine(spec: &VmSpec) -> Result<(), Failure> {
    if spec.boot.kernel.as_os_str().is_empty() {
        return Err(Failure::usage("boot.kernel: no kernel is given")
            .hint("name a spec file that has one, or give --kernel FILE"));
    }
    if spec.cpus == 0 || spec.cpus > MAX_CPUS {
        return Err(Failure::usage(format!(
            "cpus: {} is not between 1 and {MAX_CPUS}",
            spec.cpus
        )));
    }
    let ByteSize(memory) = spec.memory;
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&memory) {
        let failure = Failure::usage(format!(
            "memory: {} is not between {} and {}",
            spec.memory,
            ByteSize(MIN_MEMORY),
            ByteSize(MAX_MEMORY)
        ));
        // As other monitors count it.
        return Err(match memory.checked_mul(1 << 20) {
            Some(bytes) if (MIN_MEMORY..=MAX_MEMORY).contains(&bytes) => {
                failure.hint(format!("a number alone is bytes: write {memory}M"))
            }
            _ => failure,
        });
    }
    let unit = match spec.huge_pages {
        None => 4096,
        Some(ByteSize(size)) if size == 2 << 20 || size == 1 << 30 => size,
        Some(size) => {
            return Err(Failure::usage(format!("huge-pages: {size} is neither 2M nor 1G")));
        }
    };
    if !memory.is_multiple_of(unit) {
        return Err(Failure::usage(format!(
            "memory: {} is no multiple of {}",
            spec.memory,
            ByteSize(unit)
        )));
    }
    check_hotplug(spec)?;
    check_limits(spec)?;
    cmdline(&spec.boot).map(drop)
}

fn check_limits(spec: &VmSpec) -> Result<(), Failure> {
    let limits = &spec.limits;
    let none = [
        ("cpu-percent", limits.cpu_percent == Some(0)),
        ("pids", limits.pids == Some(0)),
        (
            "io-bytes-per-second",
            limits.io_bytes_per_second == Some(ByteSize(0)),
        ),
        (
            "io-operations-per-second",
            limits.io_operations_per_second == Some(0),
        ),
    ];
    if let Some((key, _)) = none.into_iter().find(|(_, none)| *none) {
        return Err(Failure::usage(format!("limits.{key}: must be at least 1")));
    }
    // Huge pages are not counted.
    let ram = spec.huge_pages.map_or(spec.memory.0, |_| 0);
    let beside = ByteSize(BESIDE_RAM);
    match limits.memory {
        Some(limit) if limit.0 < BESIDE_RAM => Err(Failure::usage(format!(
            "limits.memory: {limit} is less than the {beside} that the processes of a VM may take"
        ))),
        Some(limit) if limit.0 < ram + BESIDE_RAM => {
            // Some guest may never touch all of its RAM.
            tell(format_args!(
                "bulkhead: warning: limits.memory: {limit} is less than the guest's {} and {beside} beside them: \
                 the kernel may end the VM",
                ByteSize(ram)
            ));
            Ok(())
        }
        _ => Ok(()),
    }
}

fn check_hotplug(spec: &VmSpec) -> Result<(), Failure> {
    if spec.hotplug > MOST_HOTPLUG {
        return Err(Failure::usage(format!(
            "hotplug: {} is not between 0 and {MOST_HOTPLUG}",
            spec.hotplug
        )));
    }
    if spec.hotplug > 0 && spec.limits.controllers().contains(&"io") {
        return Err(Failure::usage(
            "hotplug: does not go with limits.io-bytes-per-second and io-operations-per-second",
        )
        .cause("they are a block device's, and nobody knows on which one a disk lies that is attached"));
    }
    if spec.hotplug > 0 && spec.on_device_death == OnDeviceDeath::End {
        return Err(
            Failure::usage("hotplug: does not go with on-device-death = \"end\"")
                .cause("in such a VM the end of a device's process is the VM's own"),
        );
    }
    Ok(())
}

/// The slots that are kept for devices which are attached later: the lowest that no device has.
pub(crate) fn spares(spec: &VmSpec, devices: &[Device]) -> Vec<u8> {
    let taken = |slot: &u8| devices.iter().any(|device| device.slot == *slot);
    let free = (FIRST_SLOT..=LAST_SLOT).filter(|slot| !taken(slot));
    free.take(spec.hotplug.into()).collect()
}

/// The kernel command line, with the command.
pub(super) fn cmdline(boot: &BootSpec) -> Result<String, Failure> {
    let line = boot.command_line().map_err(|e| Failure::usage(e.to_string()))?;
    if line.len() > LONGEST_CMDLINE {
        let with = if boot.command.is_empty() {
            ""
        } else {
            " with boot.command, in which a blank takes four"
        };
        let length = line.len();
        let what = format!("boot.cmdline: {length} bytes{with}, and a kernel takes {LONGEST_CMDLINE}");
        return Err(Failure::usage(what));
    }
    if line.contains('\0') {
        return Err(Failure::usage("boot.cmdline: contains a zero byte"));
    }
    Ok(line.into_owned())
}

/// Names become file names and prefixes of log lines.
pub(super) fn check_name(field: &str, name: &str) -> Result<(), Failure> {
    let sound = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    // A verb would take a '-' in front for a flag's.
    let front = !name.starts_with(['.', '-']);
    if name.is_empty() || name.len() > 64 || !front || !name.chars().all(sound) {
        return Err(Failure::usage(format!("{field}: '{name}' is no name"))
            .hint("use up to 64 letters, digits, '-', '_' and '.', the first a letter, a digit or '_'"));
    }
    Ok(())
}

/// `field` is the key's name.
pub(super) fn check_queues(field: &str, queues: Option<u16>) -> Result<(), Failure> {
    match queues {
        Some(n) if !(1..=32).contains(&n) => {
            Err(Failure::usage(format!("{field}: {n} is not between 1 and 32")))
        }
        _ => Ok(()),
    }
}

/// A rate and its burst; `field` is the rate's key.
pub(super) fn check_limit(
    field: &str,
    rate: Option<ByteSize>,
    burst: Option<ByteSize>,
) -> Result<(), Failure> {
    match (rate, burst) {
        (None, Some(_)) => Err(Failure::usage(format!("{field}-burst: needs {field}"))),
        (Some(ByteSize(0)), _) => Err(Failure::usage(format!("{field}: must be at least 1"))),
        (_, Some(ByteSize(0))) => Err(Failure::usage(format!("{field}-burst: must be at least 1"))),
        _ => Ok(()),
    }
}

pub(super) fn check_vhost_user(n: usize, cpus: u8, other: &VhostUserSpec) -> Result<Device, Failure> {
    let field = format!("vhost-user[{n}]");
    check_queues(&format!("{field}.num-queues"), other.num_queues)?;
    if let Some(size) = other.queue_size
        && !(size.is_power_of_two() && (2..=MAX_QUEUE_SIZE).contains(&size))
    {
        return Err(Failure::usage(format!(
            "{field}.queue-size: {size} is no power of two from 2 to {MAX_QUEUE_SIZE}"
        )));
    }
    let device_type = device_type(&other.device_type).ok_or_else(|| {
        Failure::usage(format!(
            "{field}.type: '{}' is no virtio device type",
            other.device_type
        ))
        .hint("write a name such as fs, vsock, rng, sound, or the type's number (virtio 1.3, 5)")
    })?;
    if let Some(why) = unserved(device_type) {
        let what = format!("{field}.type: '{}' does not work", other.device_type);
        return Err(Failure::usage(what).cause(why));
    }
    if other.num_queues.is_some() && has_own_queues(device_type) {
        let kind = &other.device_type;
        return Err(Failure::usage(format!(
            "{field}.num-queues: a device of type '{kind}' has as many as its type, its features or its configuration say"
        )));
    }
    let config = match &other.config {
        None => Vec::new(),
        Some(hex) => parse_hex(hex).ok_or_else(|| {
            Failure::usage(format!("{field}.config: is no hexadecimal of at most 256 bytes"))
        })?,
    };
    Ok(Device {
        id: other.id.clone().unwrap_or(format!("{}{n}", other.device_type)),
        field,
        slot: other.slot.unwrap_or(0),
        device_type,
        num_queues: other
            .num_queues
            .or((device_type == 2).then(|| disk::default_queues(cpus))),
        config,
        config_features: 0,
        backend: Backend::External(Remote {
            in_order: other.in_order,
            queue_size: other.queue_size,
            ..Remote::at(&other.socket)
        }),
    })
}

/// Gives every device without a slot the lowest that no other has.
fn assign_slots(spec: &VmSpec, devices: &mut [Device]) -> Result<(), Failure> {
    let given = spec
        .disks
        .iter()
        .map(|d| d.slot)
        .chain(spec.nets.iter().map(|n| n.slot))
        .chain(spec.vhost_user.iter().map(|v| v.slot));
    let mut taken: Vec<(u8, String)> = Vec::new();
    for (slot, device) in given.clone().zip(devices.iter()) {
        let Some(slot) = slot else { continue };
        if !(FIRST_SLOT..=LAST_SLOT).contains(&slot) {
            return Err(Failure::usage(format!(
                "{}.slot: {slot} is not between {FIRST_SLOT} and {LAST_SLOT}",
                device.field
            )));
        }
        if let Some((_, other)) = taken.iter().find(|(s, _)| *s == slot) {
            return Err(Failure::usage(format!(
                "{}.slot: {slot} is already {other}'s",
                device.field
            )));
        }
        taken.push((slot, device.field.clone()));
    }
    let mut free = (FIRST_SLOT..=LAST_SLOT).filter(|s| !taken.iter().any(|(t, _)| t == s));
    for (slot, device) in given.zip(devices.iter_mut()) {
        if slot.is_none() {
            device.slot = free.next().ok_or_else(|| {
                Failure::usage(format!(
                    "{}: no PCI slot is left, a VM has {LAST_SLOT}",
                    device.field
                ))
            })?;
        }
    }
    Ok(())
}

/// Device types by name (virtio 1.3, 5), or by number.
fn device_type(text: &str) -> Option<u16> {
    let by_name = match text {
        "net" => 1,
        "blk" | "block" => 2,
        "console" => 3,
        "rng" => 4,
        "balloon" => 5,
        "scsi" => 8,
        "9p" => 9,
        "gpu" => 16,
        "input" => 18,
        "vsock" => 19,
        "crypto" => 20,
        "iommu" => 23,
        "mem" => 24,
        "sound" | "snd" => 25,
        "fs" => 26,
        "pmem" => 27,
        "i2c" => 34,
        "can" => 36,
        "scmi" => 32,
        "gpio" => 41,
        "spi" => 45,
        number => number.parse().ok().filter(|n| (1..=63).contains(n))?,
    };
    Some(by_name)
}

/// Whether how many queues a device has is never the spec's to say: net, console, rng, vsock, sound, fs, pmem, i2c, gpio,
/// spi.
fn has_own_queues(device_type: u16) -> bool {
    matches!(device_type, 1 | 3 | 4 | 19 | 25 | 26 | 27 | 34 | 41 | 45)
}

/// Why no back end can serve devices of a type.
fn unserved(device_type: u16) -> Option<&'static str> {
    match device_type {
        16 => Some("a GPU's back end is given a display (VHOST_USER_GPU_SET_SOCKET), and there is none"),
        18 => Some(
            "an input device's driver reads its configuration at once after it has selected a part, and the \
             guest never waits for a back end",
        ),
        _ => None,
    }
}

fn parse_hex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) || text.len() > 512 {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok())
        .collect()
}

#[cfg(test)]
mod tests;
