//! What must happen before the first write: bitmaps that no longer tell the truth are marked so, and
//! autoclear bits that are not understood are cleared.

use super::extensions::Bitmaps;
use super::header::{AUTOCLEAR_OFFSET, BITMAPS, Header, RAW_DATA};
use super::{Meta, Qcow2};
use crate::image::ImageError;

const DIRECTORY_FIXED: usize = 24;
const IN_USE: u32 = 1;
const AUTO: u32 = 2;

/// Header state to bring up to date before the first write.
#[derive(Clone, Copy, Debug)]
pub(super) struct Preparation {
    autoclear: u64,
    bitmaps: Option<Bitmaps>,
}

impl Preparation {
    /// `None` if nothing needs to be done.
    pub(super) fn of(header: &Header) -> Option<Self> {
        let bitmaps = header
            .extensions
            .bitmaps
            .filter(|_| header.autoclear & BITMAPS != 0);
        let unknown = header.autoclear & !(BITMAPS | RAW_DATA) != 0;
        (unknown || bitmaps.is_some()).then_some(Self {
            autoclear: header.autoclear,
            bitmaps,
        })
    }
}

impl Qcow2 {
    /// Does what stands before the first write, durably.
    pub(super) fn prepare(&self, meta: &mut Meta) -> Result<(), ImageError> {
        let Some(preparation) = meta.unprepared else {
            return Ok(());
        };
        let mut autoclear = preparation.autoclear & (BITMAPS | RAW_DATA);
        if let Some(bitmaps) = preparation.bitmaps
            && !self.mark_in_use(&bitmaps)?
        {
            autoclear &= !BITMAPS;
        }
        if autoclear != preparation.autoclear {
            self.file
                .write_at(&autoclear.to_be_bytes(), AUTOCLEAR_OFFSET)
                .map_err(ImageError::io("write the header"))?;
        }
        self.file.sync().map_err(ImageError::io("flush the header"))?;
        meta.unprepared = None;
        Ok(())
    }

    /// Sets `in_use` on each bitmap that should follow our writes; says whether the directory makes sense.
    fn mark_in_use(&self, bitmaps: &Bitmaps) -> Result<bool, ImageError> {
        let mut directory = vec![0; usize::try_from(bitmaps.directory_size).unwrap_or(0)];
        self.file
            .read_at(&mut directory, bitmaps.directory_offset)
            .map_err(ImageError::io("read the bitmap directory"))?;
        let Some(entries) = entries(&directory, bitmaps.count) else {
            return Ok(false);
        };
        for (at, flags) in entries {
            if flags & AUTO != 0 && flags & IN_USE == 0 {
                self.file
                    .write_at(
                        &(flags | IN_USE).to_be_bytes(),
                        bitmaps.directory_offset + at as u64 + 12,
                    )
                    .map_err(ImageError::io("write the bitmap directory"))?;
            }
        }
        Ok(true)
    }
}

/// Place and flags of each entry, if the directory is well-formed.
fn entries(directory: &[u8], count: u32) -> Option<Vec<(usize, u32)>> {
    let mut all = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let entry = directory.get(at..at + DIRECTORY_FIXED)?;
        let flags = u32::from_be_bytes([entry[12], entry[13], entry[14], entry[15]]);
        let name = usize::from(u16::from_be_bytes([entry[18], entry[19]]));
        let extra = u32::from_be_bytes([entry[20], entry[21], entry[22], entry[23]]) as usize;
        all.push((at, flags));
        at = (at + DIRECTORY_FIXED + name)
            .checked_add(extra)?
            .checked_next_multiple_of(8)?;
    }
    (at <= directory.len()).then_some(all)
}

/// Place of each bitmap's table, and its entries; for counting references.
pub(super) fn tables(directory: &[u8], count: u32) -> Option<Vec<(u64, u32)>> {
    let word = |at: usize| {
        directory
            .get(at..at + 8)
            .and_then(|b| b.try_into().ok())
            .map(u64::from_be_bytes)
    };
    entries(directory, count)?
        .into_iter()
        .map(|(at, _)| Some((word(at)?, (word(at + 8)? >> 32) as u32)))
        .collect()
}
