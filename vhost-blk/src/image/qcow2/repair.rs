//! Rebuilding the refcounts of an image with the dirty bit: count every reference, write a new refcount
//! structure behind the file's end, switch the header over, then clear the bit.
//!
//! The old structure is not touched, so that a crash at any point leaves a dirty image to start over with.

use std::collections::BTreeMap;
use std::ops::Range;

use super::entry::{COPIED, Cluster, Host, L1Entry};
use super::geometry::Geometry;
use super::header::{DIRTY, Header, INCOMPATIBLE_OFFSET, MAX_REFTABLE_BYTES, REFTABLE_OFFSET};
use super::refcount::{insert, words};
use super::tables::Table;
use crate::image::{BlockFile, ImageError};

/// Most host clusters whose references can be counted (128 MiB of counters).
const MOST_CLUSTERS: u64 = 64 << 20;

/// Most bytes of all bitmap tables that are read for it.
const MAX_BITMAP_TABLES: u64 = 256 << 20;

/// References found, by host cluster.
pub(super) struct Counts {
    pub(super) counts: Vec<u16>,
}

/// What becomes of a COPIED that says the wrong thing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrong {
    Mend,
    Count,
}

/// What a walk through the active tables found.
#[derive(Clone, Copy, Default)]
pub(super) struct Walked {
    /// Guest clusters with a host cluster.
    pub(super) allocated: u64,
    /// COPIED flags that say the wrong thing.
    pub(super) wrong: u64,
}

impl Counts {
    pub(super) fn add(&mut self, clusters: Range<u64>, times: u16) -> Result<(), ImageError> {
        for cluster in clusters {
            let slot = usize::try_from(cluster)
                .ok()
                .and_then(|index| self.counts.get_mut(index));
            // A compressed cluster may run past the end of the file; what is not there is not counted.
            if let Some(slot) = slot {
                *slot = slot.checked_add(times).ok_or_else(|| {
                    ImageError::refused(
                        "refcounts",
                        format!("cluster {cluster:#x} has over 65535 references"),
                    )
                })?;
            }
        }
        Ok(())
    }

    fn of(&self, offset: u64, geometry: &Geometry) -> u16 {
        let index = usize::try_from(geometry.cluster_of(offset)).unwrap_or(usize::MAX);
        self.counts.get(index).copied().unwrap_or(0)
    }
}

/// Rebuilds the refcounts and clears the dirty bit.
///
/// # Errors
/// `Corrupt` or `Refused` where the mapping itself is broken; the file is unchanged then.
pub(super) fn rebuild(
    file: &dyn BlockFile,
    header: &Header,
    tables: &[Table],
    size: u64,
) -> Result<(), ImageError> {
    let file_end = size.next_multiple_of(header.geometry.cluster_size());
    let counts = new_counts(file, header, tables, size)?;
    write_structure(file, &header.geometry, counts.counts.clone(), file_end)?;
    visit_copied(file, header, &counts, file_end, Wrong::Mend)?;
    let features = header.incompatible & !DIRTY;
    file.write_at(&features.to_be_bytes(), INCOMPATIBLE_OFFSET)
        .and_then(|()| file.sync())
        .map_err(ImageError::io("clear the dirty bit"))
}

/// What [`rebuild`] writes; reads only, and refuses all that it would refuse.
pub(super) fn new_counts(
    file: &dyn BlockFile,
    header: &Header,
    tables: &[Table],
    size: u64,
) -> Result<Counts, ImageError> {
    let geometry = &header.geometry;
    let counts = count(
        file,
        header,
        tables,
        size.next_multiple_of(geometry.cluster_size()),
    )?;
    let most = counts.counts.iter().copied().max().unwrap_or(0);
    if u64::from(most) > geometry.max_refcount() {
        return Err(ImageError::refused(
            "refcount_order",
            format!("too small for {most} references"),
        ));
    }
    structure_size(geometry, counts.counts.len() as u64)?;
    Ok(counts)
}

/// Counts the references to each cluster, but for those to the refcount structure itself.
pub(super) fn count(
    file: &dyn BlockFile,
    header: &Header,
    tables: &[Table],
    file_end: u64,
) -> Result<Counts, ImageError> {
    let geometry = &header.geometry;
    let clusters = geometry.cluster_of(file_end);
    if clusters > MOST_CLUSTERS {
        return Err(ImageError::refused(
            "refcounts",
            format!("{clusters} clusters are too many to count the references to here"),
        ));
    }
    let mut counts = Counts {
        counts: vec![0; clusters as usize],
    };
    counts.add(0..1, 1)?;
    let mut l2_tables = BTreeMap::new();
    for table in tables
        .iter()
        .filter(|table| table.name != "refcount_table_offset")
    {
        counts.add(table.clusters(geometry), 1)?;
        if table.name.ends_with("l1_table_offset") {
            count_l1(file, geometry, table, file_end, &mut l2_tables)?;
        }
    }
    for (table, times) in &l2_tables {
        count_l2(file, geometry, *table, *times, file_end, &mut counts)?;
    }
    count_bitmaps(file, header, &mut counts)?;
    Ok(counts)
}

fn read_words(file: &dyn BlockFile, offset: u64, len: usize) -> Result<Vec<u64>, ImageError> {
    let mut bytes = vec![0; len];
    file.read_at(&mut bytes, offset)
        .map_err(ImageError::io("read a table"))?;
    Ok(words(&bytes).collect())
}

/// Counts how often each L2 table is used, so that each is read once only.
fn count_l1(
    file: &dyn BlockFile,
    geometry: &Geometry,
    table: &Table,
    file_end: u64,
    l2_tables: &mut BTreeMap<u64, u16>,
) -> Result<(), ImageError> {
    for raw in read_words(file, table.offset, table.len as usize)? {
        if let Some(L1Entry { table, .. }) = L1Entry::decode(raw, geometry, file_end)? {
            let times = l2_tables.entry(table).or_insert(0_u16);
            *times = times.checked_add(1).ok_or_else(|| {
                ImageError::refused(
                    "refcounts",
                    format!("the L2 table at {table:#x} has over 65535 references"),
                )
            })?;
        }
    }
    Ok(())
}

fn count_l2(
    file: &dyn BlockFile,
    geometry: &Geometry,
    table: u64,
    times: u16,
    file_end: u64,
    counts: &mut Counts,
) -> Result<(), ImageError> {
    let cluster = geometry.cluster_of(table);
    counts.add(cluster..cluster + 1, times)?;
    if geometry.external_data {
        return Ok(());
    }
    let entries = read_words(file, table, geometry.cluster_bytes())?;
    for entry in entries.chunks_exact(geometry.l2_entry_size() as usize / 8) {
        let decoded = Cluster::decode(
            entry[0],
            entry.get(1).copied().unwrap_or(0),
            0,
            geometry,
            file_end,
        )?;
        match decoded.host {
            Host::None => {}
            Host::Plain { offset, .. } => {
                let cluster = geometry.cluster_of(offset);
                counts.add(cluster..cluster + 1, times)?;
            }
            Host::Compressed(compressed) => counts.add(compressed.clusters(geometry), times)?,
        }
    }
    Ok(())
}

fn count_bitmaps(file: &dyn BlockFile, header: &Header, counts: &mut Counts) -> Result<(), ImageError> {
    let Some(bitmaps) = header.extensions.bitmaps else {
        return Ok(());
    };
    let geometry = &header.geometry;
    let refuse = |reason: &str| ImageError::refused("bitmap directory", reason.to_owned());
    let mut directory = vec![0; usize::try_from(bitmaps.directory_size).unwrap_or(0)];
    file.read_at(&mut directory, bitmaps.directory_offset)
        .map_err(ImageError::io("read the bitmap directory"))?;
    let tables = super::bitmaps::tables(&directory, bitmaps.count)
        .ok_or_else(|| refuse("it is malformed, and the dirty bit asks for a repair"))?;
    let bytes = tables.iter().map(|(_, entries)| u64::from(*entries) * 8);
    if bytes.sum::<u64>() > MAX_BITMAP_TABLES {
        return Err(refuse("the bitmap tables are over 256 MiB together"));
    }
    for (offset, entries) in tables {
        let table = Table {
            name: "bitmap table",
            offset,
            len: u64::from(entries) * 8,
        };
        if geometry.within(offset) != 0 || table.len > MAX_REFTABLE_BYTES {
            return Err(refuse("a bitmap table is not aligned or over 8 MiB"));
        }
        counts.add(table.clusters(geometry), 1)?;
        for entry in read_words(file, offset, table.len as usize)? {
            let cluster = geometry.cluster_of(entry & super::entry::OFFSET_MASK);
            if cluster != 0 {
                counts.add(cluster..cluster + 1, 1)?;
            }
        }
    }
    Ok(())
}

/// Blocks, and clusters of the table, that count `start` clusters and themselves.
fn structure_size(geometry: &Geometry, start: u64) -> Result<(u64, u64), ImageError> {
    let (mut blocks, mut clusters) = (0, 0);
    loop {
        let total = start + blocks + clusters;
        let next = (
            total.div_ceil(geometry.refblock_entries()),
            geometry.clusters_for(blocks * 8).max(1),
        );
        if next == (blocks, clusters) {
            break;
        }
        (blocks, clusters) = (next.0.max(blocks), next.1.max(clusters));
    }
    if geometry.offset_of(clusters) > MAX_REFTABLE_BYTES {
        return Err(ImageError::refused(
            "refcount_table_clusters",
            "the rebuilt table would be over 8 MiB",
        ));
    }
    Ok((blocks, clusters))
}

/// Writes blocks and table behind `file_end`, then points the header to them.
pub(super) fn write_structure(
    file: &dyn BlockFile,
    geometry: &Geometry,
    mut counts: Vec<u16>,
    file_end: u64,
) -> Result<(), ImageError> {
    let start = counts.len() as u64;
    let (blocks, clusters) = structure_size(geometry, start)?;
    counts.resize((start + blocks + clusters) as usize, 1);
    let per_block = geometry.refblock_entries() as usize;
    for (index, part) in counts.chunks(per_block).enumerate() {
        let place = file_end + geometry.offset_of(index as u64);
        file.write_at(&block(geometry, part.iter().copied()), place)
            .map_err(ImageError::io("write a refcount block"))?;
    }
    let mut table = vec![0; clusters as usize * geometry.cluster_bytes()];
    for (index, entry) in table.chunks_exact_mut(8).take(blocks as usize).enumerate() {
        entry.copy_from_slice(&(file_end + geometry.offset_of(index as u64)).to_be_bytes());
    }
    let place = file_end + geometry.offset_of(blocks);
    let mut field = [0; 12];
    field[..8].copy_from_slice(&place.to_be_bytes());
    field[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
    file.write_at(&table, place)
        .and_then(|()| file.sync())
        .and_then(|()| file.write_at(&field, REFTABLE_OFFSET))
        .and_then(|()| file.sync())
        .map_err(ImageError::io("write the refcount table"))
}

/// A refcount block with these counts.
fn block(geometry: &Geometry, counts: impl Iterator<Item = u16>) -> Vec<u8> {
    let order = geometry.refcount_order;
    let mut bytes = vec![0; geometry.cluster_bytes()];
    for (index, count) in counts.enumerate() {
        let bit = index << order;
        insert(&mut bytes[bit / 8..], bit as u64 % 8, order, u64::from(count));
    }
    bytes
}

/// A refcount block whose first `counted` clusters are used once.
pub(super) fn block_of_ones(geometry: &Geometry, counted: u64) -> Vec<u8> {
    block(geometry, (0..counted).map(|_| 1))
}

/// Looks at COPIED in the active tables: does it say whether the refcount is one?
pub(super) fn visit_copied(
    file: &dyn BlockFile,
    header: &Header,
    counts: &Counts,
    file_end: u64,
    wrong: Wrong,
) -> Result<Walked, ImageError> {
    let geometry = &header.geometry;
    let mut walked = Walked::default();
    let l1 = read_words(file, header.l1_offset, header.l1_size as usize * 8)?;
    for (index, raw) in l1.into_iter().enumerate() {
        let Some(entry) = L1Entry::decode(raw, geometry, file_end)? else {
            continue;
        };
        let copied = counts.of(entry.table, geometry) == 1;
        if copied != entry.copied {
            walked.wrong += 1;
            if wrong == Wrong::Mend {
                let raw = L1Entry { copied, ..entry }.encode();
                file.write_at(&raw.to_be_bytes(), header.l1_offset + index as u64 * 8)
                    .map_err(ImageError::io("write the L1 table"))?;
            }
        }
        if !geometry.external_data {
            visit_copied_in(
                file,
                geometry,
                entry.table,
                counts,
                file_end,
                (wrong, &mut walked),
            )?;
        }
    }
    if wrong == Wrong::Mend {
        file.sync().map_err(ImageError::io("flush the mapping"))?;
    }
    Ok(walked)
}

fn visit_copied_in(
    file: &dyn BlockFile,
    geometry: &Geometry,
    table: u64,
    counts: &Counts,
    file_end: u64,
    (wrong, walked): (Wrong, &mut Walked),
) -> Result<(), ImageError> {
    let mut bytes = vec![0; geometry.cluster_bytes()];
    file.read_at(&mut bytes, table)
        .map_err(ImageError::io("read an L2 table"))?;
    let before = walked.wrong;
    for entry in bytes.chunks_exact_mut(geometry.l2_entry_size() as usize) {
        let mut parts = words(entry);
        let (raw, bitmap) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        drop(parts);
        let host = Cluster::decode(raw, bitmap, 0, geometry, file_end)?.host;
        walked.allocated += u64::from(host != Host::None);
        if let Host::Plain { offset, copied } = host
            && copied != (counts.of(offset, geometry) == 1)
        {
            entry[..8].copy_from_slice(&(raw ^ COPIED).to_be_bytes());
            walked.wrong += 1;
        }
    }
    if walked.wrong != before && wrong == Wrong::Mend {
        file.write_at(&bytes, table)
            .map_err(ImageError::io("write an L2 table"))?;
    }
    Ok(())
}
