//! The header (first 72 or 104 and more bytes) and what may be refused by looking at it alone.

use super::extensions::{self, Extensions};
use super::geometry::Geometry;
use crate::image::{BlockFile, ImageError};

pub(super) const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
/// Largest active L1 table in bytes: bounds what opening costs.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes: bounds what opening costs.
pub(super) const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots: bounds what opening costs.
const MAX_SNAPSHOTS: u32 = 65_536;
/// Longest backing file name in bytes.
pub(super) const MAX_BACKING_NAME: u32 = 1023;

pub(super) const BACKING_OFFSET: u64 = 8;
pub(super) const SIZE_OFFSET: u64 = 24;
/// l1_size, then l1_table_offset.
pub(super) const L1_OFFSET: u64 = 36;
pub(super) const SNAPSHOTS_OFFSET: u64 = 60;
pub(super) const CRYPT_METHOD_OFFSET: u64 = 32;
pub(super) const INCOMPATIBLE_OFFSET: u64 = 72;
pub(super) const AUTOCLEAR_OFFSET: u64 = 88;
pub(super) const REFTABLE_OFFSET: u64 = 48;

pub(super) const DIRTY: u64 = 1;
pub(super) const CORRUPT: u64 = 2;
const EXTERNAL_DATA: u64 = 4;
const COMPRESSION_TYPE: u64 = 8;
const EXTENDED_L2: u64 = 16;
const KNOWN_INCOMPATIBLE: u64 = 31;

/// Autoclear bit 0: the bitmaps extension is consistent.
pub(super) const BITMAPS: u64 = 1;
/// Autoclear bit 1: the external data file is a consistent raw image.
pub(super) const RAW_DATA: u64 = 2;

/// How compressed clusters are compressed (header byte 104).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Deflate,
    Zstd,
}

/// A header that has been checked, with its extensions.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) geometry: Geometry,
    /// Disk size in bytes.
    pub(super) size: u64,
    pub(super) names_backing: bool,
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u32,
    pub(super) snapshots: u32,
    pub(super) snapshots_offset: u64,
    pub(super) incompatible: u64,
    pub(super) compatible: u64,
    pub(super) autoclear: u64,
    pub(super) compression: Compression,
    pub(super) extensions: Extensions,
}

/// Big-endian fields of the first bytes of the file.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        self.0
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_be_bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        self.0
            .get(at..at + 8)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_be_bytes)
    }
}

impl Header {
    /// Reads and checks the header; `file_size` is the file's length in bytes.
    pub(super) fn read(file: &dyn BlockFile, file_size: u64) -> Result<Self, ImageError> {
        let mut fixed = [0; 112];
        file.read_at(&mut fixed, 0)
            .map_err(ImageError::io("read the qcow2 header"))?;
        let fields = Fields(&fixed);
        if file_size < 72 || fields.u32(0) != MAGIC {
            return Err(ImageError::refused(
                "magic",
                "this is not a qcow2 image; check the format that was given",
            ));
        }
        let version = fields.u32(4);
        if !matches!(version, 2 | 3) {
            return Err(ImageError::refused(
                "version",
                format!("{version} is not supported; 2 and 3 are"),
            ));
        }
        let cluster_bits = fields.u32(20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(ImageError::refused(
                "cluster_bits",
                format!("{cluster_bits} is outside 9 to 21"),
            ));
        }
        let encrypted = is_encrypted(fields.u32(32))?;
        let header_length = header_length(&fields, version, cluster_bits)?;
        let mut first = vec![0; 1 << cluster_bits];
        file.read_at(&mut first, 0)
            .map_err(ImageError::io("read the first cluster"))?;
        let backing_offset = fields.u64(8);
        let extensions_end = if backing_offset == 0 {
            first.len() as u64
        } else {
            backing_offset
        };
        let incompatible = if version == 3 { fields.u64(72) } else { 0 };
        let mut extensions = extensions::parse(&first, header_length, extensions_end)
            .map_err(|error| unknown_features(incompatible, None).err().unwrap_or(error))?;
        unknown_features(incompatible, Some(&extensions))?;
        let autoclear = if version == 3 { fields.u64(88) } else { 0 };
        if autoclear & BITMAPS == 0 {
            // Who wrote without knowing them may have put anything in their place.
            extensions.bitmaps = None;
        }
        let header = Self {
            geometry: Geometry {
                encrypted,
                ..geometry(&fields, version, cluster_bits, incompatible)?
            },
            size: fields.u64(24),
            names_backing: backing_name(&fields, backing_offset, first.len() as u64, header_length)?,
            l1_offset: fields.u64(40),
            l1_size: fields.u32(36),
            reftable_offset: fields.u64(48),
            reftable_clusters: fields.u32(56),
            snapshots: fields.u32(60),
            snapshots_offset: fields.u64(64),
            incompatible,
            compatible: if version == 3 { fields.u64(80) } else { 0 },
            autoclear,
            compression: compression(&fields, incompatible, header_length)?,
            extensions,
        };
        header.check_limits()?;
        header.check_features()?;
        super::tables::check(&header, file_size)?;
        Ok(header)
    }

    fn check_limits(&self) -> Result<(), ImageError> {
        let geometry = &self.geometry;
        if i64::try_from(self.size).is_err() {
            return Err(ImageError::refused(
                "size",
                format!("{} is over 2^63-1", self.size),
            ));
        }
        if !self.size.is_multiple_of(512) {
            return Err(ImageError::refused(
                "size",
                format!("{} is no multiple of 512", self.size),
            ));
        }
        if u64::from(self.l1_size) * 8 > MAX_L1_BYTES {
            return Err(ImageError::refused(
                "l1_size",
                format!("{} entries are over 32 MiB", self.l1_size),
            ));
        }
        let needed = geometry.l1_entries(self.size);
        if needed > u64::from(self.l1_size) {
            return Err(ImageError::refused(
                "l1_size",
                format!(
                    "{} entries are too few for the disk's size; it needs {needed}",
                    self.l1_size
                ),
            ));
        }
        if u64::from(self.reftable_clusters) > MAX_REFTABLE_BYTES >> geometry.cluster_bits {
            return Err(ImageError::refused(
                "refcount_table_clusters",
                format!("{} clusters are over 8 MiB", self.reftable_clusters),
            ));
        }
        if self.reftable_clusters == 0 {
            return Err(ImageError::refused(
                "refcount_table_clusters",
                "there is no refcount table",
            ));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(ImageError::refused(
                "nb_snapshots",
                format!("{} is over 65536", self.snapshots),
            ));
        }
        Ok(())
    }

    fn check_features(&self) -> Result<(), ImageError> {
        if self.autoclear & BITMAPS != 0 && self.extensions.bitmaps.is_none() {
            return Err(ImageError::refused(
                "autoclear_features",
                "bitmaps bit without the bitmaps extension",
            ));
        }
        if self.autoclear & RAW_DATA != 0 {
            if !self.geometry.external_data {
                return Err(ImageError::refused(
                    "autoclear_features",
                    "raw data bit without an external data file",
                ));
            }
            if self.names_backing {
                return Err(ImageError::refused(
                    "autoclear_features",
                    "raw data bit with a backing file",
                ));
            }
        }
        match (self.geometry.encrypted, &self.extensions.encryption) {
            (true, None) => {
                return Err(ImageError::refused(
                    "header extension",
                    "encryption (LUKS) without an encryption header",
                ));
            }
            (false, Some(_)) => {
                return Err(ImageError::refused(
                    "header extension",
                    "an encryption header without encryption",
                ));
            }
            _ => {}
        }
        if self.geometry.encrypted && self.autoclear & RAW_DATA != 0 {
            return Err(ImageError::refused(
                "autoclear_features",
                "raw data bit with encryption",
            ));
        }
        if self.geometry.external_data && self.snapshots > 0 {
            return Err(ImageError::refused(
                "nb_snapshots",
                "snapshots with an external data file",
            ));
        }
        Ok(())
    }

    /// Refuses what a change of snapshots or size would have to bring up to date and does not.
    pub(super) fn check_modifiable(&self) -> Result<(), ImageError> {
        refuse(self.excludes_change())
    }

    /// Refuses a change of the disk's size, as [`Self::check_modifiable`] and for version 2.
    pub(super) fn check_resizable(&self) -> Result<(), ImageError> {
        refuse(self.excludes_resize())
    }

    /// The field that excludes another size, and why.
    pub(super) fn excludes_resize(&self) -> Option<(&'static str, &'static str)> {
        let snapshots = self.geometry.version < 3 && self.snapshots > 0;
        self.excludes_change().or(snapshots.then_some((
            "nb_snapshots",
            "snapshots of version 2 do not say their disk's size",
        )))
    }

    fn excludes_change(&self) -> Option<(&'static str, &'static str)> {
        if self.is_corrupt() {
            Some((
                "incompatible_features",
                "the corrupt bit is set: repair the image first, with bulkhead image check --repair",
            ))
        } else if self.is_dirty() {
            Some((
                "incompatible_features",
                "the dirty bit is set: repair the image first, with bulkhead image check --repair",
            ))
        } else if self.geometry.external_data {
            Some((
                "external data file",
                "its image can have no snapshots and no other size",
            ))
        } else if self.extensions.bitmaps.is_some() {
            Some((
                "bitmaps extension",
                "bitmaps would no longer tell the truth; remove them first",
            ))
        } else if self.autoclear != 0 {
            Some((
                "autoclear_features",
                "a feature that is not known here would no longer be true",
            ))
        } else {
            None
        }
    }

    /// Writes size and place of the active L1 table, and the disk's size, in one piece.
    pub(super) fn publish_l1(
        &self,
        file: &dyn BlockFile,
        size: u64,
        l1_size: u32,
        l1_offset: u64,
    ) -> Result<(), ImageError> {
        let mut fields = [0; 24];
        file.read_at(&mut fields, SIZE_OFFSET)
            .map_err(ImageError::io("read the header"))?;
        fields[..8].copy_from_slice(&size.to_be_bytes());
        fields[12..16].copy_from_slice(&l1_size.to_be_bytes());
        fields[16..].copy_from_slice(&l1_offset.to_be_bytes());
        file.write_at(&fields, SIZE_OFFSET)
            .and_then(|()| file.sync())
            .map_err(ImageError::io("write the header"))
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    pub(super) fn is_corrupt(&self) -> bool {
        self.incompatible & CORRUPT != 0
    }
}

fn refuse(excluded: Option<(&'static str, &'static str)>) -> Result<(), ImageError> {
    match excluded {
        Some((field, reason)) => Err(ImageError::refused(field, reason)),
        None => Ok(()),
    }
}

fn is_encrypted(method: u32) -> Result<bool, ImageError> {
    let name = match method {
        0 => return Ok(false),
        1 => "AES".to_owned(),
        2 => return Ok(true),
        other => format!("method {other}"),
    };
    Err(ImageError::refused(
        "crypt_method",
        format!("encryption ({name}) is not supported"),
    ))
}

fn header_length(fields: &Fields<'_>, version: u32, cluster_bits: u32) -> Result<u64, ImageError> {
    if version == 2 {
        return Ok(72);
    }
    let length = fields.u32(100);
    if length < 104 || length > 1 << cluster_bits || !length.is_multiple_of(8) {
        return Err(ImageError::refused(
            "header_length",
            format!("{length} is under 104, over a cluster or no multiple of 8"),
        ));
    }
    Ok(u64::from(length))
}

fn unknown_features(incompatible: u64, extensions: Option<&Extensions>) -> Result<(), ImageError> {
    let unknown = incompatible & !KNOWN_INCOMPATIBLE;
    if unknown == 0 {
        return Ok(());
    }
    let names: Vec<String> = (0..64)
        .filter(|bit| unknown >> bit & 1 != 0)
        .map(|bit| match extensions.and_then(|all| all.feature_name(bit)) {
            Some(name) => format!("{name:?} (bit {bit})"),
            None => format!("bit {bit}"),
        })
        .collect();
    Err(ImageError::refused(
        "incompatible_features",
        format!("not supported: {}", names.join(", ")),
    ))
}

fn geometry(
    fields: &Fields<'_>,
    version: u32,
    cluster_bits: u32,
    features: u64,
) -> Result<Geometry, ImageError> {
    let refcount_order = if version == 3 { fields.u32(96) } else { 4 };
    if refcount_order > 6 {
        return Err(ImageError::refused(
            "refcount_order",
            format!("{refcount_order} is over 6"),
        ));
    }
    let extended_l2 = features & EXTENDED_L2 != 0;
    if extended_l2 && cluster_bits < 14 {
        return Err(ImageError::refused(
            "cluster_bits",
            format!("{cluster_bits} is under 14, which extended L2 entries need"),
        ));
    }
    let external_data = features & EXTERNAL_DATA != 0;
    Ok(Geometry {
        cluster_bits,
        extended_l2,
        external_data,
        encrypted: false,
        refcount_order,
        version,
    })
}

fn compression(fields: &Fields<'_>, features: u64, header_length: u64) -> Result<Compression, ImageError> {
    let kind = if header_length > 104 { fields.0[104] } else { 0 };
    match (kind, features & COMPRESSION_TYPE != 0) {
        (0, false) => Ok(Compression::Deflate),
        (1, true) => Ok(Compression::Zstd),
        (0, true) => Err(ImageError::refused(
            "compression_type",
            "the feature bit is set but the type is zlib",
        )),
        (_, false) => Err(ImageError::refused(
            "compression_type",
            "a type is set without its feature bit",
        )),
        (other, true) => Err(ImageError::refused(
            "compression_type",
            format!("{other} is not supported"),
        )),
    }
}

fn backing_name(
    fields: &Fields<'_>,
    offset: u64,
    cluster_size: u64,
    header_length: u64,
) -> Result<bool, ImageError> {
    let length = fields.u32(16);
    if offset == 0 || length == 0 {
        return Ok(false);
    }
    if length > MAX_BACKING_NAME {
        return Err(ImageError::refused(
            "backing_file_size",
            format!("{length} is over 1023"),
        ));
    }
    let inside = offset >= header_length
        && offset
            .checked_add(u64::from(length))
            .is_some_and(|end| end <= cluster_size);
    if !inside {
        return Err(ImageError::refused(
            "backing_file_offset",
            format!("the name at {offset:#x} lies outside the first cluster"),
        ));
    }
    Ok(true)
}
