//! Flags that describe a VM. Each key=value list becomes the same type that the TOML file
//! becomes, by the same deserialiser.

use super::{spec_file, values};
use crate::failure::Failure;
use clap::Args;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::PathBuf;
use vm_spec::disk::DiskSpec;
use vm_spec::net::NetSpec;
use vm_spec::size::ByteSize;
use vm_spec::spec::{OnDeviceDeath, OnReboot, VhostUserSpec, VmSpec};

/// Keys whose values are numbers or truth values; all others are text.
const NOT_TEXT: [&str; 16] = [
    "in-order",
    "read-only",
    "num-queues",
    "queue-size",
    "slot",
    "mtu",
    "tap-fd",
    "key-fd",
    "cpu-percent",
    "pids",
    "io-operations-per-second",
    "core-scheduling",
    "user",
    "guard",
    "queues",
    "poll-us",
];
/// Texts that may be empty.
const MAY_BE_EMPTY: [&str; 2] = ["serial", "config"];
const PATHS: &str = "write path=FILE, and a comma in a value twice";
/// Keys that may be given again, for a list.
const LISTS: [&str; 3] = ["tap-fd", "publish", "ip"];

/// The VM, in flags.
#[derive(Args, Debug, Default)]
pub(super) struct VmFlags {
    /// Kernel: an ELF with a PVH note, or a bzImage
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// vCPUs, 1 to 32 (default: 1)
    #[arg(long, value_name = "N", value_parser = values::cpus, allow_negative_numbers = true)]
    cpus: Option<u8>,
    /// Guest memory, such as 512M (default: 256M)
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    memory: Option<ByteSize>,
    /// Back memory with pages of this size: 2M or 1G
    #[arg(long, value_name = "SIZE")]
    huge_pages: Option<ByteSize>,
    /// path=FILE,format=raw|qcow2|vmdk|vdi|vhdx|vhd[,readonly][,cache=writeback|none][,l2-cache-size=SIZE][,serial=]
    /// [,poll-us=][,on-error=report|stop][,{ops,bytes}[-burst]=][,data-file=][,key-file=|,key-fd=]
    /// or vhost-user=SOCKET[,in-order=true]; [,id=][,slot=][,queues=]
    #[arg(long, value_name = "KEY=VALUE,...")]
    disk: Vec<String>,
    /// user[,publish=HOST:GUEST], tap=NAME, tap-fd=N, bridge=NAME, isolated=NAME,
    /// private=ADDRESS/PREFIX or vhost-user=SOCKET [,mac=][,ip=][,guard=on|off][,mtu=][,queues=]
    /// [,{receive,transmit}-{packets,bytes}[-burst]=][,pcap=FILE][,id=][,slot=]
    #[arg(long, value_name = "KEY=VALUE,...")]
    net: Vec<String>,
    /// type=NAME,socket=SOCKET [,num-queues=][,queue-size=][,in-order=true][,config=HEX][,id=][,slot=]
    #[arg(long, value_name = "KEY=VALUE,...")]
    vhost_user: Vec<String>,
    /// PCI slots, 0 to 8, kept for devices that are attached while the VM runs (default: 0)
    #[arg(long, value_name = "N", value_parser = values::hotplug, allow_negative_numbers = true)]
    hotplug: Option<u8>,
    /// The VM's name (default: vm-PID)
    #[arg(long)]
    name: Option<String>,
    /// What a guest's reboot does: restart (default) or exit
    #[arg(long, value_name = "WHAT", value_parser = values::on_reboot(), hide_possible_values = true)]
    on_reboot: Option<OnReboot>,
    /// What the end of a device's process does: restart (it, the default) or end (the VM; not with --hotplug, and
    /// no device of such a VM can be upgraded)
    #[arg(long, value_name = "WHAT", value_parser = values::on_device_death(), hide_possible_values = true)]
    on_device_death: Option<OnDeviceDeath>,
    /// Seconds a guest has to power off when asked, also by SIGTERM, SIGINT or SIGHUP (default: 10)
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    power_off_grace: Option<u32>,
    /// memory=SIZE,cpu-percent=N,pids=N,io-bytes-per-second=SIZE,io-operations-per-second=N,core-scheduling=true
    #[arg(long, value_name = "KEY=VALUE,...")]
    limits: Option<String>,
    /// A further folder that backing files may lie in
    #[arg(long = "image-folder", value_name = "FOLDER")]
    image_folders: Vec<PathBuf>,
    /// A command that the guest's /bin/sh runs in place of an init; its exit status becomes that of bulkhead run
    #[arg(last = true)]
    command: Vec<String>,
}

/// One device of a VM, in flags.
#[derive(Args, Debug, Default)]
#[group(required = true, multiple = false)]
pub(super) struct OneDevice {
    /// A disk: as --disk of bulkhead run
    #[arg(long, value_name = "KEY=VALUE,...")]
    disk: Option<String>,
    /// A NIC: tap=NAME, tap-fd=N, bridge=NAME or vhost-user=SOCKET, and what else --net of bulkhead run takes
    #[arg(long, value_name = "KEY=VALUE,...")]
    net: Option<String>,
    /// Someone else's back end: as --vhost-user of bulkhead run
    #[arg(long, value_name = "KEY=VALUE,...")]
    vhost_user: Option<String>,
}

/// A device to attach, in flags.
#[derive(Args, Debug, Default)]
pub(super) struct DeviceFlags {
    #[command(flatten)]
    device: OneDevice,
    /// A further folder that backing files may lie in
    #[arg(long = "image-folder", value_name = "FOLDER")]
    image_folders: Vec<PathBuf>,
}

impl DeviceFlags {
    /// A VM of `cpus` vCPUs that has this device only.
    pub(super) fn spec(&self, cpus: u8) -> Result<VmSpec, Failure> {
        let flags = VmFlags {
            cpus: Some(cpus),
            disk: self.device.disk.iter().cloned().collect(),
            net: self.device.net.iter().cloned().collect(),
            vhost_user: self.device.vhost_user.iter().cloned().collect(),
            image_folders: self.image_folders.clone(),
            ..VmFlags::default()
        };
        flags.alone()
    }
}

impl VmFlags {
    /// The VM that the flags alone describe.
    pub(super) fn alone(&self) -> Result<VmSpec, Failure> {
        // Every default is the deserialiser's.
        self.over(spec_file::parse("flags", "")?)
    }

    /// `spec` with what the flags say instead and besides.
    pub(super) fn over(&self, mut spec: VmSpec) -> Result<VmSpec, Failure> {
        set(&mut spec.boot.kernel, &self.kernel);
        set(&mut spec.boot.cmdline, &self.cmdline);
        set(&mut spec.cpus, &self.cpus);
        set(&mut spec.memory, &self.memory);
        set(&mut spec.hotplug, &self.hotplug);
        set(&mut spec.on_reboot, &self.on_reboot);
        set(&mut spec.on_device_death, &self.on_device_death);
        set(&mut spec.power_off_grace, &self.power_off_grace);
        if !self.command.is_empty() {
            spec.boot.command.clone_from(&self.command);
        }
        spec.boot.initrd = self.initrd.clone().or(spec.boot.initrd);
        spec.huge_pages = self.huge_pages.or(spec.huge_pages);
        spec.name = self.name.clone().or(spec.name);
        spec.image_folders.extend(self.image_folders.clone());
        if let Some(text) = &self.limits {
            spec.limits = list_over("--limits", text, &spec.limits)?;
        }
        for text in &self.disk {
            spec.disks.push(list::<DiskSpec>("--disk", text)?);
        }
        for text in &self.net {
            spec.nets.push(list::<NetSpec>("--net", text)?);
        }
        for text in &self.vhost_user {
            spec.vhost_user.push(list::<VhostUserSpec>("--vhost-user", text)?);
        }
        Ok(spec)
    }
}

fn set<T: Clone>(field: &mut T, flag: &Option<T>) {
    if let Some(value) = flag {
        *field = value.clone();
    }
}

/// Reads one `key=value,key=value` list. A comma in a value is written twice.
fn list<T: DeserializeOwned>(flag: &str, text: &str) -> Result<T, Failure> {
    read(flag, text, table(flag, text)?)
}

/// As [`list`]: what it says instead of what `known` has, and besides.
fn list_over<T: Serialize + DeserializeOwned>(flag: &str, text: &str, known: &T) -> Result<T, Failure> {
    let given = table(flag, text)?;
    let known = toml::Table::try_from(known);
    let mut all = known.map_err(|e| Failure::usage(format!("{flag} {text}")).because(&e))?;
    all.extend(given);
    read(flag, text, all)
}

fn read<T: DeserializeOwned>(flag: &str, text: &str, table: toml::Table) -> Result<T, Failure> {
    // A folder's separator is in no key, but in what stands where one is missing, or behind a single comma.
    let path = table.keys().any(|key| key.contains(['/', '.']));
    toml::Value::Table(table)
        .try_into()
        .map_err(|e: toml::de::Error| {
            // Where a value is wrong, the last line says whose: in `key`.
            let whole = e.to_string();
            let key = whole
                .lines()
                .find_map(|line| line.strip_prefix("in `")?.strip_suffix('`'));
            let place = key.map_or_else(
                || format!("{flag} {text}"),
                |key| format!("{flag} {text}: '{key}'"),
            );
            let failure = spec_file::explain(&place, e.message());
            match path {
                true => failure.hint(PATHS),
                false => failure,
            }
        })
}

fn table(flag: &str, text: &str) -> Result<toml::Table, Failure> {
    let mut table = toml::Table::new();
    for item in split(text) {
        if item.is_empty() {
            let failure = Failure::usage(format!("{flag} {text}: an item is empty"));
            return Err(failure.hint("write key=value,key=value, and a comma in a value twice"));
        }
        let (key, value) = match item.split_once('=') {
            Some((key, "")) if !MAY_BE_EMPTY.contains(&key) => {
                return Err(Failure::usage(format!("{flag} {text}: '{key}' has no value")));
            }
            Some((key, value)) => (key, value),
            // A bare key is a truth.
            None => (item.as_str(), "true"),
        };
        let key = if key == "readonly" { "read-only" } else { key };
        let value = match value.parse::<i64>() {
            _ if !NOT_TEXT.contains(&key) => toml::Value::String(value.to_owned()),
            Ok(number) => toml::Value::Integer(number),
            Err(_) => match value {
                "true" | "on" | "yes" => toml::Value::Boolean(true),
                "false" | "off" | "no" => toml::Value::Boolean(false),
                other => toml::Value::String(other.to_owned()),
            },
        };
        match table.get_mut(key) {
            None if LISTS.contains(&key) => {
                table.insert(key.to_owned(), toml::Value::Array(vec![value]));
            }
            None => {
                table.insert(key.to_owned(), value);
            }
            Some(toml::Value::Array(list)) => list.push(value),
            Some(_) => return Err(Failure::usage(format!("{flag} {text}: '{key}' is given twice"))),
        }
    }
    Ok(table)
}

fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        // The list is never empty: it starts with one item and only grows.
        match (c, items.last_mut()) {
            (',', Some(last)) if rest.peek() == Some(&',') => {
                rest.next();
                last.push(',');
            }
            (',', _) => items.push(String::new()),
            (c, Some(last)) => last.push(c),
            (_, None) => {}
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_spec::disk::CacheMode;
    use vm_spec::spec::ImageFormat;

    #[test]
    fn a_list_becomes_the_spec_type() {
        let disk: DiskSpec = list("--disk", "path=/a,,b.qcow2,format=qcow2,readonly,slot=3").unwrap();
        assert_eq!(disk.path, Some("/a,b.qcow2".into()));
        assert_eq!(disk.format, Some(ImageFormat::Qcow2));
        assert!(disk.read_only);
        assert_eq!(disk.slot, Some(3));
        let disk: DiskSpec = list("--disk", "path=a,format=qcow2,key-fd=7,data-file=b").unwrap();
        assert_eq!((disk.key_fd, disk.key_file), (Some(7), None));
        assert_eq!(disk.data_file, Some("b".into()));
        let text =
            "path=a,format=raw,cache=none,l2-cache-size=1M,poll-us=50,serial=7,ops=50K,bytes=1G,queues=2";
        let disk: DiskSpec = list("--disk", text).unwrap();
        assert_eq!((disk.cache, disk.poll_us), (Some(CacheMode::None), Some(50)));
        assert_eq!((disk.serial.as_deref(), disk.queues), (Some("7"), Some(2)));
        assert_eq!(
            (disk.ops, disk.l2_cache_size),
            (Some(ByteSize(50 << 10)), Some(ByteSize(1 << 20)))
        );
        let other: VhostUserSpec = list("--vhost-user", "type=can,socket=s,queue-size=32").unwrap();
        assert_eq!(other.queue_size, Some(32));
        let net: NetSpec = list("--net", "tap=0,mtu=1400").unwrap();
        assert_eq!((net.tap.as_deref(), net.mtu), (Some("0"), Some(1400)));
        let net: NetSpec = list("--net", "user,publish=8080:80,publish=53:53/udp,guard=off").unwrap();
        assert_eq!((net.user, net.guard), (true, Some(false)));
        assert_eq!(net.publish, ["8080:80", "53:53/udp"]);
        let net: NetSpec = list("--net", "tap-fd=5,tap-fd=6,queues=2,receive-bytes=1M").unwrap();
        assert_eq!(
            (net.tap_fd, net.receive_bytes),
            (vec![5, 6], Some(ByteSize(1 << 20)))
        );
    }

    #[test]
    fn mistakes_name_the_flag_and_the_key() {
        let wrong = |text| list::<DiskSpec>("--disk", text).unwrap_err().to_string();
        let unknown = wrong("paht=/a");
        assert!(unknown.contains("--disk paht=/a"), "{unknown}");
        assert!(unknown.contains("did you mean 'path'?"), "{unknown}");
        assert!(wrong("path=/a,path=/b").contains("'path' is given twice"));
        assert!(wrong("path=/a,format=dmg").contains("dmg"));
        assert!(wrong("path=/a,slot=x").contains("slot=x: 'slot': is not understood"));
        assert!(wrong("path=/a,read-only=maybe").contains("'read-only': is not understood"));
        assert!(wrong("path=/a,format=raw,").contains("an item is empty"));
        assert!(wrong("path=").contains("'path' has no value"));
        assert!(wrong("/a.raw,format=raw").contains("write path=FILE"));
        let serial: DiskSpec = list("--disk", "path=/a,serial=").unwrap();
        assert_eq!(serial.serial.as_deref(), Some(""));
        assert!(wrong("path=/a,cache=non").contains("did you mean 'none'?"));
        assert!(wrong("path=/a,poll-us=20000").contains("longer than 10000"));
    }

    #[test]
    fn limits_add_to_a_files() {
        let flags = VmFlags {
            kernel: Some("k".into()),
            limits: Some("pids=50,core-scheduling".into()),
            ..VmFlags::default()
        };
        let mut spec = flags.alone().unwrap();
        spec.limits.memory = Some(ByteSize(1000));
        spec.limits.pids = Some(9);
        let limits = flags.over(spec).unwrap().limits;
        assert_eq!((limits.memory, limits.pids), (Some(ByteSize(1000)), Some(50)));
        assert!(limits.core_scheduling && limits.cpu_percent.is_none());
    }

    #[test]
    fn a_kernel_may_come_from_the_spec_or_a_flag() {
        let spec = spec_file::parse("v", "cpus = 2\n").unwrap();
        let flags = VmFlags {
            kernel: Some("k".into()),
            ..VmFlags::default()
        };
        assert_eq!(flags.over(spec).unwrap().boot.kernel, PathBuf::from("k"));
    }

    #[test]
    fn flags_alone_have_the_files_defaults() {
        let flags = VmFlags {
            kernel: Some("k".into()),
            ..VmFlags::default()
        };
        let spec = flags.alone().unwrap();
        assert_eq!(spec.cpus, 1);
        assert_eq!(spec.memory, ByteSize(256 << 20));
        assert_eq!(spec.power_off_grace, 10);
    }
}
