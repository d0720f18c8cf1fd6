//! A disk, as a person writes it.

use crate::size::ByteSize;
use crate::spec::ImageFormat;
use serde::de::{Deserializer, Error};
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use std::path::PathBuf;

/// Bytes of a disk's serial number (virtio 1.3, 5.2.6: VIRTIO_BLK_T_GET_ID).
const SERIAL_LENGTH: usize = 20;
/// Longest busy wait in microseconds: more would keep a session's commands waiting.
const MOST_POLL_US: u32 = 10_000;
/// Bytes of memory for an image's mapping tables.
const L2_CACHE_SIZES: RangeInclusive<u64> = 64 << 10..=1 << 30;

/// A disk: an image that our own process serves, or a socket that anyone serves.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskSpec {
    /// Name in messages; default `disk0`, `disk1` and so on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The image. Excludes `vhost-user`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The image's format; required with `path`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<ImageFormat>,
    /// File with the passphrase of an encrypted image, taken whole: a newline at its end counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// The same, by inherited file descriptor; it may be a pipe. Excludes `key-file`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_fd: Option<i32>,
    /// The image's external data file; the name that the image has for it is never used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<PathBuf>,
    /// Socket of a vhost-user-blk back end. Excludes `path`, and what only our own process does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_user: Option<PathBuf>,
    /// With `vhost-user`: it completes requests in the order in which they were made available, so that
    /// one without an in-flight region can be succeeded after its death.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub in_order: bool,
    /// The guest cannot write. Goes with `path`.
    pub read_only: bool,
    /// What the host keeps of the image in memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheMode>,
    /// Memory for mapping tables, for each layer of the image, 64K to 1G; default 8M. Not of raw images.
    #[cfg_attr(test, schemars(with = "Option<ByteSize>"))]
    #[serde(deserialize_with = "l2_cache_size", skip_serializing_if = "Option::is_none")]
    pub l2_cache_size: Option<ByteSize>,
    /// What the guest reads as the disk's serial number, at most 20 bytes; default the id.
    #[cfg_attr(test, schemars(with = "Option<String>", length(max = SERIAL_LENGTH)))]
    #[serde(deserialize_with = "serial", skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Microseconds, at most 10000, in which each queue looks for its next request before it sleeps;
    /// default 0.
    #[cfg_attr(test, schemars(with = "Option<u32>", range(max = MOST_POLL_US)))]
    #[serde(deserialize_with = "poll_us", skip_serializing_if = "Option::is_none")]
    pub poll_us: Option<u32>,
    /// What becomes of a request that the host fails.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_error: Option<OnError>,
    /// Most requests a second, of all queues together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<ByteSize>,
    /// Requests that may come at once; default a tenth of a second's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops_burst: Option<ByteSize>,
    /// Most bytes a second, of all queues together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<ByteSize>,
    /// Bytes that may come at once; default a tenth of a second's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_burst: Option<ByteSize>,
    /// Request queues, 1 to 32; default one per vCPU, at most 4.
    #[serde(alias = "num-queues", skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// PCI device number, 1 to 31.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
}

/// What the host keeps of an image in memory; QEMU's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// The host's page cache.
    Writeback,
    /// Data goes past the page cache (O_DIRECT).
    None,
}

impl CacheMode {
    /// The name, as in a spec.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::None => "none",
        }
    }
}

/// What becomes of a request that the host fails: no space is left, or a disk is broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// The guest is told.
    Report,
    /// The queue stops, and tries again until it succeeds.
    Stop,
}

impl OnError {
    /// The name, as in a spec.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Stop => "stop",
        }
    }
}

fn l2_cache_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ByteSize>, D::Error> {
    match Option::<ByteSize>::deserialize(deserializer)? {
        Some(size) if !L2_CACHE_SIZES.contains(&size.0) => {
            Err(D::Error::custom(format!("{size} is not between 64K and 1G")))
        }
        size => Ok(size),
    }
}

fn serial<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let given = Option::<String>::deserialize(deserializer)?;
    let text = given.as_deref().unwrap_or_default();
    match text.len() {
        ..=SERIAL_LENGTH if !text.contains('\0') => Ok(given),
        ..=SERIAL_LENGTH => Err(D::Error::custom("a serial number cannot contain a zero byte")),
        length => Err(D::Error::custom(format!(
            "a serial number of {length} bytes, and a disk has {SERIAL_LENGTH}"
        ))),
    }
}

fn poll_us<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    match Option::<u32>::deserialize(deserializer)? {
        Some(us) if us > MOST_POLL_US => Err(D::Error::custom(format!(
            "{us} microseconds is longer than {MOST_POLL_US}"
        ))),
        us => Ok(us),
    }
}
