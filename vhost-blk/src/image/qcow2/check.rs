//! Comparing the refcounts with the references, as `qemu-img check` does.

use vm_spec::image::CheckResult;

use super::draft::Draft;
use super::geometry::Geometry;
use super::header::{CORRUPT, DIRTY, Header, INCOMPATIBLE_OFFSET};
use super::progress::Progress;
use super::refcount::Refcounts;
use super::repair::{self, Recount, Wrong};
use super::tables;
use crate::image::{BlockFile, ImageError};

/// What to do about what is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Repair {
    /// Nothing.
    No,
    /// Count anew.
    Refcounts,
}

/// Checks the image in `file`, which nobody uses meanwhile.
///
/// # Errors
/// When the header is refused or the host fails; what contradicts itself behind the header is part of the
/// result.
pub fn check(
    file: &dyn BlockFile,
    repair: Repair,
    progress: &Progress<'_>,
) -> Result<CheckResult, ImageError> {
    let (header, size) = super::open::read_header(file)?;
    let mut result = match compare(file, &header, size, progress) {
        Err(error @ ImageError::Corrupt { .. }) => {
            return Ok(CheckResult {
                corruptions: 1,
                broken: Some(error.to_string()),
                total_clusters: header.geometry.clusters_for(header.size),
                ..CheckResult::default()
            });
        }
        other => other?,
    };
    if repair == Repair::No {
        return Ok(result);
    }
    if result.leaks + result.corruptions > 0 || header.is_dirty() {
        check_has_dirty_bit(&header)?;
        // To count anew, and to compare once more.
        progress.expect(2 * progress.done());
        let recount = count_anew(file, progress)?;
        let recount = recount.secure(file)?;
        mark_dirty(file, &header)?;
        recount.carry_out(file, progress)?.give_back(file, progress);
        let (header, size) = super::open::read_header(file)?;
        let after = compare(file, &header, size, progress)?;
        result = CheckResult {
            leaks_fixed: result.leaks.saturating_sub(after.leaks),
            corruptions_fixed: result.corruptions.saturating_sub(after.corruptions),
            ..after
        };
    }
    if header.is_corrupt() && result.leaks + result.corruptions == 0 {
        clear_corrupt(file)?;
    }
    Ok(result)
}

/// Clears the corrupt bit of an image that has been found sound: it can be written to again.
fn clear_corrupt(file: &dyn BlockFile) -> Result<(), ImageError> {
    let (header, _) = super::open::read_header(file)?;
    let features = header.incompatible & !CORRUPT;
    file.write_at(&features.to_be_bytes(), INCOMPATIBLE_OFFSET)
        .and_then(|()| file.sync())
        .map_err(ImageError::io("clear the corrupt bit"))
}

/// Does what `plan` does, which writes new tables where there is [`room`] and points the header to them, and
/// counts anew, under the dirty bit from first to last. What is used no more goes back to the host.
///
/// # Errors
/// Where the references could not be counted after it, or there is no space for any of it: both are found out
/// before anything is written.
pub(super) fn change(
    file: &dyn BlockFile,
    header: &Header,
    progress: &Progress<'_>,
    plan: &dyn Fn(&dyn BlockFile) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    check_has_dirty_bit(header)?;
    let draft = Draft::over(file)?;
    plan(&draft)?;
    let recount = count_anew(&draft, progress)?;
    let recount = recount.secure(file)?;
    mark_dirty(file, header)?;
    plan(file)?;
    recount.carry_out(file, progress)?.give_back(file, progress);
    Ok(())
}

fn check_has_dirty_bit(header: &Header) -> Result<(), ImageError> {
    if header.geometry.version < 3 {
        return Err(ImageError::refused(
            "version",
            "2 has no dirty bit, without which this cannot be done safely; convert the image first",
        ));
    }
    Ok(())
}

/// Sets the dirty bit, durably: from here on the refcounts may lie, and whoever opens the image for writing
/// counts anew.
fn mark_dirty(file: &dyn BlockFile, header: &Header) -> Result<(), ImageError> {
    file.write_at(&(header.incompatible | DIRTY).to_be_bytes(), INCOMPATIBLE_OFFSET)
        .and_then(|()| file.sync())
        .map_err(ImageError::io("set the dirty bit"))
}

/// Where new tables have room, one behind the other: behind the file's end, or, where that does not move, in
/// clusters that nothing uses.
///
/// # Errors
/// `Io` where there is none; whatever keeps the references from being counted.
pub(super) fn room(
    file: &dyn BlockFile,
    header: &Header,
    tables: &[&[u8]],
    progress: &Progress<'_>,
) -> Result<u64, ImageError> {
    let geometry = &header.geometry;
    if !file.has_fixed_size() {
        let size = file
            .size()
            .map_err(ImageError::io("find the size of the image's file"))?;
        return Ok(size.next_multiple_of(geometry.cluster_size()));
    }
    let clusters = tables
        .iter()
        .map(|table| geometry.clusters_for(table.len() as u64));
    let place = count_anew(file, progress)?.free_run(clusters.sum())?;
    Ok(geometry.offset_of(place))
}

/// Writes a table at `place`, where there is [`room`], and waits until it is durable; the end behind it.
pub(super) fn append(
    file: &dyn BlockFile,
    geometry: &Geometry,
    table: &[u8],
    place: u64,
) -> Result<u64, ImageError> {
    let end = place + geometry.offset_of(geometry.clusters_for(table.len() as u64));
    file.grow_to(end)
        .and_then(|()| file.write_at(table, place))
        .and_then(|()| file.sync())
        .map_err(ImageError::io("write a table"))?;
    Ok(end)
}

fn count_anew(file: &dyn BlockFile, progress: &Progress<'_>) -> Result<Recount, ImageError> {
    let (header, size) = super::open::read_header(file)?;
    let tables = tables::snapshots(&header, file, size)?;
    Recount::of(file, header, &tables, size, u64::MAX, progress)
}

fn compare(
    file: &dyn BlockFile,
    header: &Header,
    size: u64,
    progress: &Progress<'_>,
) -> Result<CheckResult, ImageError> {
    let geometry = &header.geometry;
    let file_end = size.next_multiple_of(geometry.cluster_size());
    let tables = tables::snapshots(header, file, size)?;
    let mut misplaced = 0;
    let mut refcounts = Refcounts::load_with(file, header, file_end, &mut |_, _| {
        misplaced += 1;
        Ok(())
    })?;
    let mut counts = repair::count(file, header, &tables, (file_end, u64::MAX), progress)?;
    for cluster in refcounts.structure(geometry) {
        counts.add(cluster..cluster + 1, 1)?;
    }
    let walked = repair::visit_copied(file, header, &counts, file_end, Wrong::Count, progress)?;
    let mut result = CheckResult {
        corruptions: misplaced + walked.wrong,
        total_clusters: geometry.clusters_for(header.size),
        allocated_clusters: walked.allocated,
        ..CheckResult::default()
    };
    for (cluster, expected) in (0..).zip(&counts.counts) {
        let found = refcounts.get(file, geometry, cluster)?;
        if found > 0 {
            result.image_end_offset = geometry.offset_of(cluster + 1);
        }
        match found.cmp(&u64::from(*expected)) {
            std::cmp::Ordering::Less => result.corruptions += 1,
            std::cmp::Ordering::Greater => result.leaks += 1,
            std::cmp::Ordering::Equal => {}
        }
        if cluster.is_multiple_of(geometry.refblock_entries()) {
            progress.step(1);
        }
    }
    Ok(result)
}
