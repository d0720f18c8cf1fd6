//! What a header and a snapshot table say, for people; needs neither layers nor passphrase.

use vm_spec::image::{ImageInfo, MAX_TEXT, Qcow2Info, SnapshotInfo};

use super::header::{Compression, Header, MAX_BACKING_NAME, RAW_DATA};
use super::tables::{self, SnapshotEntry};
use crate::image::{BlockFile, ImageError};

/// Compatible bit 0.
const LAZY_REFCOUNTS: u64 = 1;

/// Reads what the image in `file` is.
///
/// # Errors
/// As opening it read-only.
pub fn info(file: &dyn BlockFile) -> Result<(ImageInfo, Vec<SnapshotInfo>), ImageError> {
    let (header, file_size) = super::open::read_header(file)?;
    tables::snapshots(&header, file, file_size)?;
    let geometry = &header.geometry;
    let qcow2 = Qcow2Info {
        version: geometry.version,
        cluster_size: geometry.cluster_size(),
        refcount_bits: 1 << geometry.refcount_order,
        compression: match header.compression {
            Compression::Deflate => "zlib",
            Compression::Zstd => "zstd",
        }
        .to_owned(),
        lazy_refcounts: header.compatible & LAZY_REFCOUNTS != 0,
        dirty: header.is_dirty(),
        corrupt: header.is_corrupt(),
        extended_l2: geometry.extended_l2,
        encrypted: geometry.encrypted,
        backing_file: backing_name(file, &header)?,
        backing_format: header.extensions.backing_format.as_deref().map(cut),
        data_file: header.extensions.data_file.as_deref().map(cut),
        data_file_raw: geometry.external_data.then_some(header.autoclear & RAW_DATA != 0),
    };
    let snapshots = tables::snapshot_entries(&header, file)
        .map(|entry| snapshot(file, &entry?, header.size))
        .collect::<Result<_, _>>()?;
    let info = ImageInfo {
        virtual_size: header.size,
        file_size,
        qcow2: Some(qcow2),
    };
    Ok((info, snapshots))
}

/// Not cut: it is opened by this name.
fn backing_name(file: &dyn BlockFile, header: &Header) -> Result<Option<Vec<u8>>, ImageError> {
    if !header.names_backing {
        return Ok(None);
    }
    let mut place = [0; 12];
    file.read_at(&mut place, super::header::BACKING_OFFSET)
        .map_err(ImageError::io("read the qcow2 header"))?;
    let [offset @ .., a, b, c, d] = place;
    let len = u32::from_be_bytes([a, b, c, d]).min(MAX_BACKING_NAME);
    bytes(file, u64::from_be_bytes(offset), len as usize).map(Some)
}

/// A snapshot's entry; `disk_size` is its disk's where the entry does not say.
pub(super) fn snapshot(
    file: &dyn BlockFile,
    entry: &SnapshotEntry,
    disk_size: u64,
) -> Result<SnapshotInfo, ImageError> {
    let fixed = &entry.fixed;
    let u32_at = |at: usize| u32::from_be_bytes(std::array::from_fn(|i| fixed[at + i]));
    let extra_start = entry.start + fixed.len() as u64;
    let mut extra = [0; 16];
    let known = (entry.extra_len as usize).min(extra.len());
    file.read_at(&mut extra[..known], extra_start)
        .map_err(ImageError::io("read the snapshot table"))?;
    let u64_at = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| extra[at + i]));
    let names = extra_start + u64::from(entry.extra_len);
    Ok(SnapshotInfo {
        id: text(file, names, entry.id_len.into())?,
        name: text(file, names + u64::from(entry.id_len), entry.name_len.into())?,
        date_sec: u32_at(16),
        date_nsec: u32_at(20),
        vm_clock_nsec: u64::from(u32_at(24)) << 32 | u64::from(u32_at(28)),
        vm_state_size: if known >= 8 { u64_at(0) } else { u32_at(32).into() },
        disk_size: if known >= 16 { u64_at(8) } else { disk_size },
    })
}

fn text(file: &dyn BlockFile, offset: u64, len: usize) -> Result<String, ImageError> {
    Ok(cut(&String::from_utf8_lossy(&bytes(
        file,
        offset,
        len.min(MAX_TEXT),
    )?)))
}

fn bytes(file: &dyn BlockFile, offset: u64, len: usize) -> Result<Vec<u8>, ImageError> {
    let mut bytes = vec![0; len];
    file.read_at(&mut bytes, offset)
        .map_err(ImageError::io("read a name"))?;
    Ok(bytes)
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT)].to_owned()
}
