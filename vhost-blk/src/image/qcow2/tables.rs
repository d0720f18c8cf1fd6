//! Places of the tables that the header points to: aligned, inside the file, apart from each other.

use super::geometry::Geometry;
use super::header::{Header, MAX_L1_BYTES};
use crate::image::{BlockFile, ImageError};

/// Bytes of a snapshot table entry before its variable part.
pub(super) const SNAPSHOT_FIXED: usize = 40;
/// Most bytes of a snapshot table: bounds what opening costs.
const MAX_SNAPSHOT_TABLE: u64 = 64 << 20;
/// Most bytes of a snapshot's extra data.
const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// Most bytes of all snapshots' L1 tables: bounds what opening and counting cost.
const MAX_SNAPSHOT_L1_BYTES: u64 = 256 << 20;
/// Most bytes of a bitmap directory.
const MAX_BITMAP_DIRECTORY: u64 = 64 << 20;

/// A table of the image: what it is, where it starts, how many bytes it has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    pub(super) name: &'static str,
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Table {
    /// Its clusters.
    pub(super) fn clusters(&self, geometry: &Geometry) -> std::ops::Range<u64> {
        let first = geometry.cluster_of(self.offset);
        first..first + geometry.clusters_for(self.len)
    }

    fn check(&self, geometry: &Geometry, file_size: u64) -> Result<(), ImageError> {
        let Self { name, offset, len } = *self;
        let problem = if geometry.within(offset) != 0 {
            "is not aligned to a cluster"
        } else if offset >= 1 << 56 {
            "is past 2^56"
        } else if offset < geometry.cluster_size() {
            "lies in the header"
        } else if len > file_size || offset + len > file_size.next_multiple_of(geometry.cluster_size()) {
            "is past the end of the file"
        } else {
            return Ok(());
        };
        Err(ImageError::refused(name, format!("{offset:#x} {problem}")))
    }
}

/// The tables that the header places.
pub(super) fn of(header: &Header) -> Vec<Table> {
    let mut tables = vec![Table {
        name: "refcount_table_offset",
        offset: header.reftable_offset,
        len: header.geometry.offset_of(u64::from(header.reftable_clusters)),
    }];
    if header.l1_size > 0 {
        let len = u64::from(header.l1_size) * 8;
        tables.push(Table {
            name: "l1_table_offset",
            offset: header.l1_offset,
            len,
        });
    }
    if header.snapshots > 0 {
        let len = u64::from(header.snapshots) * SNAPSHOT_FIXED as u64;
        tables.push(Table {
            name: "snapshots_offset",
            offset: header.snapshots_offset,
            len,
        });
    }
    if let Some(bitmaps) = header.extensions.bitmaps {
        let (offset, len) = (bitmaps.directory_offset, bitmaps.directory_size);
        tables.push(Table {
            name: "bitmap_directory_offset",
            offset,
            len,
        });
    }
    if let Some(encryption) = header.extensions.encryption {
        let (offset, len) = (encryption.offset, encryption.length);
        tables.push(Table {
            name: "encryption header",
            offset,
            len,
        });
    }
    tables
}

/// Refuses tables that are not where tables can be.
pub(super) fn check(header: &Header, file_size: u64) -> Result<(), ImageError> {
    if let Some(bitmaps) = header.extensions.bitmaps
        && bitmaps.directory_size > MAX_BITMAP_DIRECTORY
    {
        return Err(ImageError::refused(
            "bitmap_directory_size",
            format!("{} is over 64 MiB", bitmaps.directory_size),
        ));
    }
    check_apart(&of(header), &header.geometry, file_size)
}

fn check_apart(tables: &[Table], geometry: &Geometry, file_size: u64) -> Result<(), ImageError> {
    let mut sorted = Vec::new();
    for table in tables {
        table.check(geometry, file_size)?;
        sorted.push((table.clusters(geometry), table.name));
    }
    sorted.sort_by_key(|(clusters, _)| clusters.start);
    for pair in sorted.windows(2) {
        if pair[1].0.start < pair[0].0.end {
            return Err(ImageError::refused(
                pair[1].1,
                format!("overlaps the table at {}", pair[0].1),
            ));
        }
    }
    Ok(())
}

/// Reads the snapshot table's places; returns it and each snapshot's L1 table.
pub(super) fn snapshots(header: &Header, file: &dyn BlockFile, size: u64) -> Result<Vec<Table>, ImageError> {
    let mut tables = of(header);
    if header.snapshots == 0 {
        return Ok(tables);
    }
    tables.retain(|table| table.name != "snapshots_offset");
    let (mut end, mut l1_bytes) = (header.snapshots_offset, 0);
    for entry in snapshot_entries(header, file) {
        let entry = entry?;
        end = entry.end;
        let len = u64::from(entry.l1_size) * 8;
        l1_bytes += len;
        if l1_bytes > MAX_SNAPSHOT_L1_BYTES {
            return Err(ImageError::refused(
                "snapshot l1_size",
                "the L1 tables of all snapshots are over 256 MiB",
            ));
        }
        if len > 0 {
            tables.push(Table {
                name: "snapshot l1_table_offset",
                offset: entry.l1_offset,
                len,
            });
        }
    }
    tables.push(Table {
        name: "snapshots_offset",
        offset: header.snapshots_offset,
        len: end - header.snapshots_offset,
    });
    check_apart(&tables, &header.geometry, size)?;
    Ok(tables)
}

/// An entry of the snapshot table, its sizes checked.
pub(super) struct SnapshotEntry {
    /// The fixed part as it is in the file.
    pub(super) fixed: [u8; SNAPSHOT_FIXED],
    pub(super) start: u64,
    /// Where the next entry starts.
    pub(super) end: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    pub(super) extra_len: u32,
    pub(super) id_len: u16,
    pub(super) name_len: u16,
}

/// The entries of the snapshot table, up to the first that is refused.
pub(super) fn snapshot_entries<'a>(
    header: &'a Header,
    file: &'a dyn BlockFile,
) -> impl Iterator<Item = Result<SnapshotEntry, ImageError>> + use<'a> {
    let mut position = header.snapshots_offset;
    (0..header.snapshots).map(move |_| {
        let entry = snapshot_entry(file, position)?;
        position = entry.end;
        if position - header.snapshots_offset > MAX_SNAPSHOT_TABLE {
            return Err(ImageError::refused("snapshot table", "it is over 64 MiB"));
        }
        Ok(entry)
    })
}

fn snapshot_entry(file: &dyn BlockFile, start: u64) -> Result<SnapshotEntry, ImageError> {
    let mut fixed = [0; SNAPSHOT_FIXED];
    file.read_at(&mut fixed, start)
        .map_err(ImageError::io("read the snapshot table"))?;
    let word = |at: usize| u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
    let (l1_size, names, extra_len) = (word(8), word(12), word(36));
    if extra_len > MAX_SNAPSHOT_EXTRA {
        return Err(ImageError::refused(
            "snapshot table",
            format!("extra data of {extra_len} bytes is over 1024"),
        ));
    }
    if u64::from(l1_size) * 8 > MAX_L1_BYTES {
        return Err(ImageError::refused(
            "snapshot l1_size",
            format!("{l1_size} entries are over 32 MiB"),
        ));
    }
    let (id_len, name_len) = ((names >> 16) as u16, names as u16);
    let variable = u64::from(extra_len) + u64::from(id_len) + u64::from(name_len);
    Ok(SnapshotEntry {
        fixed,
        start,
        end: start + (SNAPSHOT_FIXED as u64 + variable).next_multiple_of(8),
        l1_offset: u64::from(word(0)) << 32 | u64::from(word(4)),
        l1_size,
        extra_len,
        id_len,
        name_len,
    })
}
