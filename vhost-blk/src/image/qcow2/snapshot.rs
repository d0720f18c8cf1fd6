//! Internal snapshots of an image that nobody uses: taking, applying, deleting.
//!
//! All three write new tables behind the file's end (on a device: where nothing is), switch the header over in
//! one sector, and count the references anew, under the dirty bit from first to last: a crash at any point leaves
//! an image that is repaired when it is next opened for writing.

use vm_spec::image::SnapshotInfo;

use super::check::{append, change, room};
use super::entry::COPIED;
use super::header::{Header, SNAPSHOTS_OFFSET};
use super::info;
use super::progress::Progress;
use super::refcount::words;
use super::tables::{self, SNAPSHOT_FIXED, SnapshotEntry};
use crate::image::{BlockFile, ImageError};

/// Longest name in bytes: what QEMU shows whole.
const MAX_NAME: usize = 255;
/// vm_state_size_large, disk_size, icount.
const EXTRA: u32 = 24;

/// Takes a snapshot called `name` of the disk as it is; `now` is since 1970.
///
/// # Errors
/// [`ImageError::Refused`] where the image's features or the name exclude it, or a snapshot has the last id.
pub fn take(
    file: &dyn BlockFile,
    name: &str,
    now: std::time::Duration,
    progress: &Progress<'_>,
) -> Result<(), ImageError> {
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(ImageError::refused(
            "snapshot name",
            format!("{} bytes are none or over {MAX_NAME}", name.len()),
        ));
    }
    let header = open(file)?;
    let (mut table, mut highest) = (Vec::new(), 0_u64);
    for entry in tables::snapshot_entries(&header, file) {
        let entry = entry?;
        let known = info::snapshot(file, &entry, header.size)?;
        if known.name == name || known.id == name {
            let reason = format!("{name:?} is taken, by {}", told(&known));
            return Err(ImageError::refused("snapshot name", reason));
        }
        highest = known.id.parse().unwrap_or(0).max(highest);
        table.extend(bytes_of(file, &entry)?);
    }
    let id = highest
        .checked_add(1)
        .ok_or_else(|| ImageError::refused("snapshot id", format!("there is none above {highest}")))?;
    let mut l1 = vec![0; header.l1_size as usize * 8];
    file.read_at(&mut l1, header.l1_offset)
        .map_err(ImageError::io("read the L1 table"))?;
    let l1: Vec<u8> = words(&l1)
        .flat_map(|entry| (entry & !COPIED).to_be_bytes())
        .collect();
    let entry = table.len();
    table.extend(new_entry(&header, &id.to_string(), name, now));
    let place = room(file, &header, &[&l1, &table], progress)?;
    table[entry..entry + 8].copy_from_slice(&place.to_be_bytes());
    change(file, &header, progress, &|file| {
        let next = append(file, &header.geometry, &l1, place)?;
        publish(file, &header, header.snapshots + 1, &table, next)
    })
}

/// Makes the disk what it was when the snapshot called, or with the id, `name` was taken.
///
/// # Errors
/// As [`take`], or where there is no such snapshot.
pub fn apply(file: &dyn BlockFile, name: &str, progress: &Progress<'_>) -> Result<(), ImageError> {
    let header = open(file)?;
    let entry = find(file, &header, name)?;
    let disk_size = info::snapshot(file, &entry, header.size)?.disk_size;
    let needed = header.geometry.l1_entries(disk_size).max(entry.l1_size.into());
    let mut l1 = vec![0; entry.l1_size as usize * 8];
    file.read_at(&mut l1, entry.l1_offset)
        .map_err(ImageError::io("read the snapshot's L1 table"))?;
    if needed * 8 > super::header::MAX_L1_BYTES || !disk_size.is_multiple_of(crate::image::SECTOR) {
        return Err(ImageError::refused(
            "snapshot disk_size",
            format!("{disk_size} is over what an L1 table of 32 MiB maps, or no multiple of 512"),
        ));
    }
    l1.resize(needed as usize * 8, 0);
    let place = room(file, &header, &[&l1], progress)?;
    change(file, &header, progress, &|file| {
        append(file, &header.geometry, &l1, place)?;
        header.publish_l1(file, disk_size, needed as u32, place)
    })
}

/// Deletes the snapshot called, or with the id, `name`.
///
/// # Errors
/// As [`apply`].
pub fn delete(file: &dyn BlockFile, name: &str, progress: &Progress<'_>) -> Result<(), ImageError> {
    let header = open(file)?;
    let gone = find(file, &header, name)?.start;
    let mut table = Vec::new();
    for entry in tables::snapshot_entries(&header, file) {
        let entry = entry?;
        if entry.start != gone {
            table.extend(bytes_of(file, &entry)?);
        }
    }
    let place = room(file, &header, &[&table], progress)?;
    change(file, &header, progress, &|file| {
        publish(file, &header, header.snapshots - 1, &table, place)
    })
}

fn open(file: &dyn BlockFile) -> Result<Header, ImageError> {
    let (header, size) = super::open::read_header(file)?;
    header.check_modifiable()?;
    tables::snapshots(&header, file, size)?;
    Ok(header)
}

/// The snapshot of this id or name. Where it is one's id and another's name nobody knows which is meant: qemu-img
/// applies the one and deletes the other.
fn find(file: &dyn BlockFile, header: &Header, name: &str) -> Result<SnapshotEntry, ImageError> {
    let mut found: Option<(SnapshotEntry, SnapshotInfo)> = None;
    for entry in tables::snapshot_entries(header, file) {
        let entry = entry?;
        let known = info::snapshot(file, &entry, header.size)?;
        if known.id != name && known.name != name {
            continue;
        }
        if let Some((_, first)) = &found {
            let reason = format!(
                "{name:?} is {} or {}: say what only one has",
                told(first),
                told(&known)
            );
            return Err(ImageError::refused("snapshot name", reason));
        }
        found = Some((entry, known));
    }
    found
        .map(|(entry, _)| entry)
        .ok_or_else(|| ImageError::refused("snapshot name", format!("there is no {name:?}")))
}

fn told(snapshot: &SnapshotInfo) -> String {
    format!("the one named {:?} with the id {:?}", snapshot.name, snapshot.id)
}

fn bytes_of(file: &dyn BlockFile, entry: &SnapshotEntry) -> Result<Vec<u8>, ImageError> {
    let mut bytes = vec![0; (entry.end - entry.start) as usize];
    file.read_at(&mut bytes, entry.start)
        .map_err(ImageError::io("read the snapshot table"))?;
    Ok(bytes)
}

/// An entry whose first eight bytes, the place of its L1 table, are to be filled in.
fn new_entry(header: &Header, id: &str, name: &str, now: std::time::Duration) -> Vec<u8> {
    let mut entry = Vec::with_capacity(SNAPSHOT_FIXED + EXTRA as usize);
    entry.extend([0; 8]);
    entry.extend(header.l1_size.to_be_bytes());
    entry.extend((id.len() as u16).to_be_bytes());
    entry.extend((name.len() as u16).to_be_bytes());
    entry.extend(u32::try_from(now.as_secs()).unwrap_or(u32::MAX).to_be_bytes());
    entry.extend(now.subsec_nanos().to_be_bytes());
    entry.extend([0; 8 + 4]);
    entry.extend(EXTRA.to_be_bytes());
    entry.extend(0_u64.to_be_bytes());
    entry.extend(header.size.to_be_bytes());
    // No instruction count was recorded.
    entry.extend(u64::MAX.to_be_bytes());
    entry.extend(id.as_bytes());
    entry.extend(name.as_bytes());
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry
}

/// Writes the snapshot table at `place` and points the header to it.
fn publish(
    file: &dyn BlockFile,
    header: &Header,
    count: u32,
    table: &[u8],
    place: u64,
) -> Result<(), ImageError> {
    let place = if count == 0 {
        0
    } else {
        append(file, &header.geometry, table, place)?;
        place
    };
    let mut field = [0; 12];
    field[..4].copy_from_slice(&count.to_be_bytes());
    field[4..].copy_from_slice(&place.to_be_bytes());
    file.write_at(&field, SNAPSHOTS_OFFSET)
        .and_then(|()| file.sync())
        .map_err(ImageError::io("write the header"))
}
