//! From a [`DiskSpec`] to what is meant: alternatives told apart, every key checked. Pure.

use super::machine::{Backend, Device, Remote, check_limit, check_queues};
use crate::failure::Failure;
use std::path::PathBuf;
use vm_spec::disk::{CacheMode, DiskSpec};
use vm_spec::spec::ImageFormat;

/// Bytes of what VIRTIO_BLK_T_GET_ID answers.
const SERIAL_LENGTH: usize = 20;

/// A disk that vhost-user-blk serves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) format: ImageFormat,
    pub(crate) read_only: bool,
    pub(crate) key: Option<Key>,
    pub(crate) data_file: Option<PathBuf>,
    /// Data goes past the page cache.
    pub(crate) past_cache: bool,
    /// Further flags of the device process: serial, cache, limits.
    pub(crate) flags: Vec<String>,
}

/// Where the passphrase of an encrypted image comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Key {
    File(PathBuf),
    Inherited(i32),
}

/// The device that `disk` describes; `cpus` are the VM's, and `n` is the disk's place.
pub(crate) fn check(cpus: u8, n: usize, disk: &DiskSpec) -> Result<Device, Failure> {
    let field = format!("disk[{n}]");
    let id = disk.id.clone().unwrap_or(format!("disk{n}"));
    check_queues(&format!("{field}.queues"), disk.queues)?;
    let backend = match (&disk.path, &disk.vhost_user) {
        (Some(_), None) if disk.in_order => {
            return Err(Failure::usage(format!(
                "{field}.in-order: goes with vhost-user, not with path"
            )));
        }
        (Some(path), None) => Backend::Disk(check_ours(&field, &id, disk, path.clone())?),
        (None, Some(socket)) => match asked_of_us(disk) {
            None => Backend::External(Remote {
                in_order: disk.in_order,
                ..Remote::at(socket)
            }),
            Some(key) => {
                return Err(
                    Failure::usage(format!("{field}.{key}: goes with path, not with vhost-user"))
                        .cause("another's process serves this disk"),
                );
            }
        },
        (None, None) => {
            return Err(Failure::usage(format!(
                "{field}: neither path nor vhost-user is given"
            )));
        }
        (Some(_), Some(_)) => {
            return Err(Failure::usage(format!("{field}.vhost-user: excludes path")));
        }
    };
    Ok(Device {
        id,
        field,
        slot: disk.slot.unwrap_or(0),
        device_type: 2,
        num_queues: disk.queues.or(Some(default_queues(cpus))),
        config: Vec::new(),
        config_features: 0,
        backend,
    })
}

/// More than there are vCPUs are of use to none, and some back ends serve none that the driver did not set up.
pub(super) fn default_queues(cpus: u8) -> u16 {
    u16::from(cpus).min(4)
}

fn check_ours(field: &str, id: &str, disk: &DiskSpec, path: PathBuf) -> Result<Disk, Failure> {
    let format = disk.format.ok_or_else(|| {
        Failure::usage(format!("{field}.format: is missing"))
            .cause("a format is never guessed: the guest writes what would be guessed from")
            .hint("add format=raw or format=qcow2; vmdk, vdi, vhdx and vhd can be read")
    })?;
    let written = [ImageFormat::Raw, ImageFormat::Qcow2];
    if !disk.read_only && !written.contains(&format) {
        let failure = Failure::usage(format!("{field}.read-only: is missing"));
        return Err(failure
            .cause(format!("{} images can only be read", format.name()))
            .hint("add read-only=true, or put a qcow2 overlay on it"));
    }
    let of_qcow2 = [
        ("data-file", disk.data_file.is_some(), "has none"),
        ("key-file", disk.key_file.is_some(), "is not encrypted"),
        ("key-fd", disk.key_fd.is_some(), "is not encrypted"),
    ];
    for (key, given, why) in of_qcow2 {
        if given && format != ImageFormat::Qcow2 {
            let failure = Failure::usage(format!("{field}.{key}: goes with format=qcow2"));
            return Err(failure.cause(format!("a {} image {why}", format.name())));
        }
    }
    if disk.l2_cache_size.is_some() && format == ImageFormat::Raw {
        let failure = Failure::usage(format!("{field}.l2-cache-size: does not go with format=raw"));
        return Err(failure.cause("a raw image has no mapping tables"));
    }
    let key = match (&disk.key_file, disk.key_fd) {
        (Some(_), Some(_)) => {
            return Err(Failure::usage(format!("{field}.key-fd: excludes key-file")));
        }
        (Some(file), None) => Some(Key::File(file.clone())),
        (None, number) => number.map(Key::Inherited),
    };
    Ok(Disk {
        path,
        format,
        read_only: disk.read_only,
        key,
        data_file: disk.data_file.clone(),
        past_cache: disk.cache == Some(CacheMode::None),
        flags: flags(field, id, disk)?,
    })
}

/// The flags for what needs no descriptor.
fn flags(field: &str, id: &str, disk: &DiskSpec) -> Result<Vec<String>, Failure> {
    let mut flags = Vec::new();
    let serial = match &disk.serial {
        Some(serial) => serial.clone(),
        // An id has one byte a character.
        None => id.chars().take(SERIAL_LENGTH).collect(),
    };
    flags.push(format!("--serial={serial}"));
    flags.extend(
        disk.l2_cache_size
            .map(|size| format!("--l2-cache-size={}", size.0)),
    );
    flags.extend(disk.poll_us.map(|us| format!("--poll-us={us}")));
    flags.extend(disk.on_error.map(|what| format!("--on-error={}", what.name())));
    let mut limits = Vec::new();
    for (unit, rate, burst) in [
        ("ops", disk.ops, disk.ops_burst),
        ("bytes", disk.bytes, disk.bytes_burst),
    ] {
        check_limit(&format!("{field}.{unit}"), rate, burst)?;
        limits.extend(rate.map(|n| format!("{unit}={}", n.0)));
        limits.extend(burst.map(|n| format!("{unit}-burst={}", n.0)));
    }
    if !limits.is_empty() {
        flags.push(format!("--limit={}", limits.join(",")));
    }
    Ok(flags)
}

/// The first key that only our own process heeds.
fn asked_of_us(disk: &DiskSpec) -> Option<&'static str> {
    let limits = [disk.ops, disk.ops_burst, disk.bytes, disk.bytes_burst];
    let keys = [
        ("format", disk.format.is_some()),
        ("read-only", disk.read_only),
        ("key-file", disk.key_file.is_some()),
        ("key-fd", disk.key_fd.is_some()),
        ("data-file", disk.data_file.is_some()),
        ("cache", disk.cache.is_some()),
        ("l2-cache-size", disk.l2_cache_size.is_some()),
        ("serial", disk.serial.is_some()),
        ("poll-us", disk.poll_us.is_some()),
        ("on-error", disk.on_error.is_some()),
        ("ops, bytes", limits.iter().any(Option::is_some)),
    ];
    keys.into_iter().find_map(|(key, given)| given.then_some(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_spec::disk::OnError;
    use vm_spec::size::ByteSize;

    fn raw() -> DiskSpec {
        DiskSpec {
            path: Some("d".into()),
            format: Some(ImageFormat::Raw),
            ..DiskSpec::default()
        }
    }

    fn ours(spec: &DiskSpec) -> Disk {
        match check(1, 0, spec).unwrap().backend {
            Backend::Disk(disk) => disk,
            other => panic!("{other:?}"),
        }
    }

    fn refusal(spec: &DiskSpec) -> String {
        check(1, 0, spec).unwrap_err().to_string()
    }

    #[test]
    fn every_key_becomes_a_flag() {
        let spec = DiskSpec {
            cache: Some(CacheMode::None),
            l2_cache_size: Some(ByteSize(1 << 20)),
            serial: Some("my disk".into()),
            poll_us: Some(50),
            on_error: Some(OnError::Stop),
            ops: Some(ByteSize(1000)),
            bytes: Some(ByteSize(1 << 20)),
            bytes_burst: Some(ByteSize(4096)),
            format: Some(ImageFormat::Qcow2),
            ..raw()
        };
        let flags = [
            "--serial=my disk",
            "--l2-cache-size=1048576",
            "--poll-us=50",
            "--on-error=stop",
            "--limit=ops=1000,bytes=1048576,bytes-burst=4096",
        ];
        assert_eq!(ours(&spec).flags, flags);
        assert!(ours(&spec).past_cache);
        assert_eq!(ours(&raw()).flags, ["--serial=disk0"]);
        assert!(!ours(&raw()).past_cache);
    }

    #[test]
    fn a_disk_has_no_more_queues_than_there_are_vcpus_whoever_serves_it() {
        let others = DiskSpec {
            vhost_user: Some("/s".into()),
            ..DiskSpec::default()
        };
        let queues = |cpus, spec: &DiskSpec| check(cpus, 0, spec).unwrap().num_queues;
        for spec in [raw(), others] {
            assert_eq!([1, 2, 64].map(|cpus| queues(cpus, &spec)), [1, 2, 4].map(Some));
            let asked = DiskSpec {
                queues: Some(8),
                ..spec
            };
            assert_eq!(queues(2, &asked), Some(8));
        }
    }

    #[test]
    fn a_serial_number_is_as_long_as_an_id_may_be() {
        let id = "a-disk-with-a-name-of-30-bytes";
        let spec = DiskSpec {
            id: Some(id.into()),
            ..raw()
        };
        assert_eq!(ours(&spec).flags, [format!("--serial={}", &id[..20])]);
    }

    #[test]
    fn contradictions_name_their_key() {
        let burst = DiskSpec {
            ops_burst: Some(ByteSize(1)),
            ..raw()
        };
        assert!(refusal(&burst).contains("disk[0].ops-burst: needs disk[0].ops"));
        let none = DiskSpec {
            bytes: Some(ByteSize(0)),
            ..raw()
        };
        assert!(refusal(&none).contains("disk[0].bytes: must be at least 1"));
        let none = DiskSpec {
            bytes: Some(ByteSize(1)),
            bytes_burst: Some(ByteSize(0)),
            ..raw()
        };
        assert!(refusal(&none).contains("disk[0].bytes-burst: must be at least 1"));
        let writable = DiskSpec {
            format: Some(ImageFormat::Vmdk),
            ..raw()
        };
        assert!(refusal(&writable).contains("disk[0].read-only: is missing"));
        let data_file = DiskSpec {
            data_file: Some("f".into()),
            ..raw()
        };
        assert!(refusal(&data_file).contains("disk[0].data-file: goes with format=qcow2"));
        let key = DiskSpec {
            key_fd: Some(5),
            ..raw()
        };
        assert!(refusal(&key).contains("disk[0].key-fd: goes with format=qcow2"));
        let tables = DiskSpec {
            l2_cache_size: Some(ByteSize(1 << 20)),
            ..raw()
        };
        assert!(refusal(&tables).contains("disk[0].l2-cache-size: does not go with format=raw"));
        let queues = DiskSpec {
            queues: Some(33),
            ..raw()
        };
        assert!(refusal(&queues).contains("disk[0].queues: 33"));
        let someones = || DiskSpec {
            vhost_user: Some("/s".into()),
            ..DiskSpec::default()
        };
        let cache = DiskSpec {
            cache: Some(CacheMode::None),
            ..someones()
        };
        assert!(refusal(&cache).contains("disk[0].cache: goes with path"));
        let format = DiskSpec {
            format: Some(ImageFormat::Raw),
            ..someones()
        };
        assert!(refusal(&format).contains("disk[0].format: goes with path"));
        let read_only = DiskSpec {
            read_only: true,
            ..someones()
        };
        assert!(refusal(&read_only).contains("disk[0].read-only: goes with path"));
        let order = DiskSpec {
            in_order: true,
            ..raw()
        };
        assert!(refusal(&order).contains("disk[0].in-order: goes with vhost-user"));
        let both_keys = DiskSpec {
            key_file: Some("k".into()),
            key_fd: Some(5),
            format: Some(ImageFormat::Qcow2),
            ..raw()
        };
        assert!(refusal(&both_keys).contains("disk[0].key-fd: excludes key-file"));
    }
}
