//! Rebuilding the refcounts of an image with the dirty bit: count every reference, write a new refcount
//! structure to clusters that nothing uses, switch the header over, then clear the bit. Where there are no such
//! clusters it takes the place of the old one.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::entry::{COPIED, Cluster, Host, L1Entry};
use super::geometry::Geometry;
use super::header::{DIRTY, Header, INCOMPATIBLE_OFFSET, MAX_REFTABLE_BYTES};
use super::progress::Progress;
use super::refcount::{Refcounts, words};
use super::structure::{Structure, free_run};
use super::tables::Table;
use crate::image::{BlockFile, ImageError, no_space};

/// Most host clusters whose references can be counted (128 MiB of counters).
const MOST_CLUSTERS: u64 = 64 << 20;

/// Most bytes of L2 tables that are read, walk by walk, to repair an image before it is served: twice those of an
/// image of [`MOST_CLUSTERS`] with extended L2 entries. Most may lie in holes of a file that is small.
pub(super) const MOST_L2_AT_OPEN: u64 = 4 << 30;

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

/// The references counted anew.
pub(super) struct Recount {
    header: Header,
    /// Of the file when it was counted, in bytes.
    size: u64,
    counts: Counts,
    /// Clusters of the structure that the header points to.
    old: BTreeSet<u64>,
    /// That structure counts no cluster from this one on.
    old_end: u64,
}

impl Recount {
    /// Counts; reads only. At most so many bytes of L2 tables are read by this and what follows.
    ///
    /// # Errors
    /// `Corrupt` or `Refused` where the mapping itself is broken, or the counts cannot be noted; `Refused` where
    /// more would be read.
    pub(super) fn of(
        file: &dyn BlockFile,
        header: Header,
        tables: &[Table],
        size: u64,
        most_l2: u64,
        progress: &Progress<'_>,
    ) -> Result<Self, ImageError> {
        let geometry = &header.geometry;
        let file_end = size.next_multiple_of(geometry.cluster_size());
        let counts = count(file, &header, tables, (file_end, most_l2), progress)?;
        let most = counts.counts.iter().copied().max().unwrap_or(0);
        if u64::from(most) > geometry.max_refcount() {
            return Err(ImageError::refused(
                "refcount_order",
                format!("too small for {most} references"),
            ));
        }
        let old = Refcounts::load_with(file, &header, file_end, &mut |_, _| Ok(()))?;
        let blocks = old.table.iter().rposition(|block| *block != 0);
        let old_end = blocks.map_or(0, |last| last as u64 + 1) * geometry.refblock_entries();
        let old = old.structure(geometry).collect();
        Ok(Self {
            header,
            size,
            counts,
            old,
            old_end,
        })
    }

    /// The first of so many clusters in a row that nothing uses, inside the counted file.
    ///
    /// # Errors
    /// `Io` where there are none.
    pub(super) fn free_run(&self, clusters: u64) -> Result<u64, ImageError> {
        let counts = &self.counts.counts;
        let is_free = |cluster: &u64| counts[*cluster as usize] == 0 && !self.old.contains(cluster);
        let end = self.header.geometry.cluster_of(self.size);
        free_run(clusters, is_free, end)
            .map(|run| run.start)
            .ok_or_else(|| no_space_for_tables(no_space()))
    }

    /// Makes sure that there is space for what is to be written: new tables up to the end that the counted file
    /// has, and the counts. What is in use stays as it is.
    ///
    /// The counts get the place of the old ones only where there is no other. A crash may leave either of them
    /// there, or neither: the dirty bit says that none is to be believed.
    ///
    /// # Errors
    /// `Io` where there is no space, and `Refused` where there are too many clusters; the file is as it was.
    pub(super) fn secure(self, file: &dyn BlockFile) -> Result<Secured, ImageError> {
        let structure = self.find_room(file)?;
        Ok(Secured {
            recount: self,
            structure,
        })
    }

    fn find_room(&self, file: &dyn BlockFile) -> Result<Structure, ImageError> {
        let size = file.size().map_err(no_space_for_tables)?;
        let inside = self.header.geometry.cluster_of(self.size);
        let end = if file.has_fixed_size() { inside } else { u64::MAX };
        let mut failed = no_space_for_tables(no_space());
        for (taken, end) in [(&self.old, end), (&BTreeSet::new(), inside)] {
            let counts = &self.counts.counts;
            let Some(structure) = Structure::place(&self.header.geometry, counts, taken, end)? else {
                continue;
            };
            match self.secure_places(file, size, &structure) {
                Ok(()) => return Ok(structure),
                Err(error) => failed = error,
            }
            if let Err(error) = file.cut_to(size) {
                tracing::warn!(%error, "cannot cut the image's file back");
            }
        }
        Err(failed)
    }

    fn secure_places(
        &self,
        file: &dyn BlockFile,
        size: u64,
        structure: &Structure,
    ) -> Result<(), ImageError> {
        if file.has_fixed_size() {
            return Ok(());
        }
        let geometry = &self.header.geometry;
        let runs = structure.runs().into_iter();
        let runs = runs.map(|run| geometry.offset_of(run.start)..geometry.offset_of(run.end));
        let tables = size..self.size.max(size);
        std::iter::once(tables)
            .chain(runs)
            .try_for_each(|range| file.secure_range(range.start, range.end - range.start))
            .map_err(no_space_for_tables)
    }
}

fn no_space_for_tables(error: std::io::Error) -> ImageError {
    ImageError::io("find space for new tables")(error)
}

/// A recount with a place for it.
pub(super) struct Secured {
    recount: Recount,
    structure: Structure,
}

impl Secured {
    /// Writes the counts and clears the dirty bit; all that is durable when this returns. The mapping is the one
    /// that was counted.
    pub(super) fn carry_out(
        self,
        file: &dyn BlockFile,
        progress: &Progress<'_>,
    ) -> Result<Unused, ImageError> {
        let Recount {
            header,
            size,
            mut counts,
            old_end,
            ..
        } = self.recount;
        self.structure.write(file, &header.geometry, &mut counts.counts)?;
        let file_end = size.next_multiple_of(header.geometry.cluster_size());
        progress.step(refblocks(&header.geometry, file_end));
        visit_copied(file, &header, &counts, file_end, Wrong::Mend, progress)?;
        let features = header.incompatible & !DIRTY;
        file.write_at(&features.to_be_bytes(), INCOMPATIBLE_OFFSET)
            .and_then(|()| file.sync())
            .map_err(ImageError::io("clear the dirty bit"))?;
        counts
            .counts
            .truncate(usize::try_from(old_end).unwrap_or(usize::MAX));
        Ok(Unused {
            geometry: header.geometry,
            counts,
        })
    }
}

/// The clusters that count as 0 among those that the old structure counted.
pub(super) struct Unused {
    geometry: Geometry,
    counts: Counts,
}

impl Unused {
    /// Gives their space back to the host, where that can take it.
    pub(super) fn give_back(&self, file: &dyn BlockFile, progress: &Progress<'_>) {
        let runs = || {
            let counts = &self.counts.counts;
            counts.chunk_by(|one, next| (*one == 0) == (*next == 0))
        };
        progress.expect(runs().count() as u64);
        let mut start = 0;
        for run in runs() {
            progress.step(1);
            let (place, len) = (start, self.geometry.offset_of(run.len() as u64));
            start += len;
            if run[0] == 0
                && let Err(error) = file.discard_range(place, len)
            {
                tracing::warn!(%error, "cannot give freed space back to the host");
                return;
            }
        }
    }
}

/// Refcount blocks that count the clusters up to `file_end`.
fn refblocks(geometry: &Geometry, file_end: u64) -> u64 {
    geometry
        .cluster_of(file_end)
        .div_ceil(geometry.refblock_entries())
}

/// Counts the references to each cluster, but for those to the refcount structure itself.
///
/// It is expected that [`visit_copied`] follows, and that the refcount blocks are walked through once.
pub(super) fn count(
    file: &dyn BlockFile,
    header: &Header,
    tables: &[Table],
    (file_end, most_l2): (u64, u64),
    progress: &Progress<'_>,
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
    let (mut l2_tables, mut active) = (BTreeMap::new(), 0);
    for table in tables
        .iter()
        .filter(|table| table.name != "refcount_table_offset")
    {
        counts.add(table.clusters(geometry), 1)?;
        if table.name.ends_with("l1_table_offset") {
            let found = count_l1(file, geometry, table, file_end, &mut l2_tables)?;
            if table.name == "l1_table_offset" {
                active = found;
            }
        }
    }
    let walks = l2_tables.len() as u64 + active;
    if walks.saturating_mul(geometry.cluster_size()) > most_l2 {
        return Err(ImageError::refused(
            "L1 tables",
            format!(
                "a repair reads over {most_l2} bytes of L2 tables; have it repaired first: bulkhead image check --repair"
            ),
        ));
    }
    progress.expect(walks + refblocks(geometry, file_end));
    for (table, times) in &l2_tables {
        count_l2(file, geometry, *table, *times, file_end, &mut counts)?;
        progress.step(1);
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

/// Counts how often each L2 table is used, so that each is read once only; how many entries name one.
fn count_l1(
    file: &dyn BlockFile,
    geometry: &Geometry,
    table: &Table,
    file_end: u64,
    l2_tables: &mut BTreeMap<u64, u16>,
) -> Result<u64, ImageError> {
    let mut used = 0;
    for raw in read_words(file, table.offset, table.len as usize)? {
        if let Some(L1Entry { table, .. }) = L1Entry::decode(raw, geometry, file_end)? {
            used += 1;
            let times = l2_tables.entry(table).or_insert(0_u16);
            *times = times.checked_add(1).ok_or_else(|| {
                ImageError::refused(
                    "refcounts",
                    format!("the L2 table at {table:#x} has over 65535 references"),
                )
            })?;
        }
    }
    Ok(used)
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

/// Looks at COPIED in the active tables: does it say whether the refcount is one?
pub(super) fn visit_copied(
    file: &dyn BlockFile,
    header: &Header,
    counts: &Counts,
    file_end: u64,
    wrong: Wrong,
    progress: &Progress<'_>,
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
        // Clusters of an external data file are not counted: there is nothing to mend.
        if !geometry.external_data || wrong == Wrong::Count {
            visit_copied_in(
                file,
                geometry,
                (entry.table, (index as u64) << geometry.l2_bits()),
                counts,
                file_end,
                (wrong, &mut walked),
            )?;
        }
        progress.step(1);
    }
    if wrong == Wrong::Mend {
        file.sync().map_err(ImageError::io("flush the mapping"))?;
    }
    Ok(walked)
}

/// In an L2 table; its first entry is guest cluster `first`'s.
fn visit_copied_in(
    file: &dyn BlockFile,
    geometry: &Geometry,
    (table, first): (u64, u64),
    counts: &Counts,
    file_end: u64,
    (wrong, walked): (Wrong, &mut Walked),
) -> Result<(), ImageError> {
    let mut bytes = vec![0; geometry.cluster_bytes()];
    file.read_at(&mut bytes, table)
        .map_err(ImageError::io("read an L2 table"))?;
    let before = walked.wrong;
    let entries = bytes.chunks_exact_mut(geometry.l2_entry_size() as usize);
    for (guest, entry) in (first..).zip(entries) {
        let mut parts = words(entry);
        let (raw, bitmap) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        drop(parts);
        let host = Cluster::decode(raw, bitmap, guest, geometry, file_end)?.host;
        walked.allocated += u64::from(host != Host::None);
        if let Host::Plain { offset, copied } = host
            && !geometry.external_data
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
