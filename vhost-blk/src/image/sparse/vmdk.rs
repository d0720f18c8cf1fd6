//! VMware disk images in one file ("Virtual Disk Format 5.0"): monolithicSparse and streamOptimized.

use super::fields::{check_table, entry, le16, le32, le64, read};
use super::{Blocks, Piece};
use crate::image::{BlockFile, ImageError};

/// Flags of the header.
const ZERO_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
/// `gdOffset` when the directory's place is in the footer, at the end of the file.
const AT_END: u64 = u64::MAX;
const MOST_DESCRIPTOR: u64 = 1 << 20;
/// Sectors of the largest grain: bounds what inflating takes.
const MOST_GRAIN: u64 = 2048;
const MOST_GRAIN_TABLE: u32 = 512;
/// Bytes before the data of a compressed grain: sector number and length.
const MARKER: u64 = 12;

pub(super) struct Vmdk {
    capacity: u64,
    /// Offset of the grain directory.
    directory: u64,
    /// Bytes of a grain; a power of two.
    grain: u64,
    per_table: u64,
    flags: u32,
    file_size: u64,
}

impl Vmdk {
    pub(super) fn open(file: &dyn BlockFile, file_size: u64) -> Result<Self, ImageError> {
        let mut header = read(file, 0, 512)?;
        if !header.starts_with(b"KDMV") {
            return Err(not_sparse(&header));
        }
        check_descriptor(file, &header)?;
        if le64(&header, 56) == AT_END {
            header = read(file, file_size.saturating_sub(1024), 512)?;
            if !header.starts_with(b"KDMV") {
                return Err(ImageError::refused(
                    "footer",
                    "there is none: the image is cut off",
                ));
            }
        }
        if !(1..=3).contains(&le32(&header, 4)) {
            return Err(ImageError::refused(
                "version",
                format!("{} is not known", le32(&header, 4)),
            ));
        }
        let flags = le32(&header, 8);
        if flags & COMPRESSED != 0 && le16(&header, 77) != 1 {
            return Err(ImageError::refused("compressAlgorithm", "only deflate is known"));
        }
        let (sectors, grain, per_table) = (le64(&header, 12), le64(&header, 20), le32(&header, 44));
        if !grain.is_power_of_two() || grain > MOST_GRAIN {
            return Err(ImageError::refused(
                "grainSize",
                format!("{grain} is no power of two up to {MOST_GRAIN}"),
            ));
        }
        if !(1..=MOST_GRAIN_TABLE).contains(&per_table) {
            return Err(ImageError::refused(
                "numGTEsPerGT",
                format!("{per_table} is not 1 to {MOST_GRAIN_TABLE}"),
            ));
        }
        let (capacity, directory) = (sectors.checked_mul(512), le64(&header, 56).checked_mul(512));
        let (Some(capacity), Some(directory)) = (capacity, directory) else {
            return Err(ImageError::refused("capacity", "it overflows"));
        };
        let tables = sectors.div_ceil(grain * u64::from(per_table));
        check_table("gdOffset", directory, tables, 4, file_size)?;
        Ok(Self {
            capacity,
            directory,
            grain: grain * 512,
            per_table: u64::from(per_table),
            flags,
            file_size,
        })
    }
}

fn not_sparse(header: &[u8]) -> ImageError {
    if header.starts_with(b"# Disk Descriptor") {
        return ImageError::refused(
            "descriptor",
            "its extents are named files, which are never opened: convert it to monolithicSparse",
        );
    }
    ImageError::refused(
        "magic",
        "this is no vmdk image of the kind monolithicSparse or streamOptimized",
    )
}

/// The descriptor inside the file: one extent, which is this file, and no parent.
fn check_descriptor(file: &dyn BlockFile, header: &[u8]) -> Result<(), ImageError> {
    let (offset, sectors) = (le64(header, 28), le64(header, 36));
    let len = sectors.saturating_mul(512);
    if offset == 0 || len == 0 || len > MOST_DESCRIPTOR {
        return Err(ImageError::refused(
            "descriptorSize",
            format!("{len} bytes is not 1 to {MOST_DESCRIPTOR}"),
        ));
    }
    let text = read(file, offset.saturating_mul(512), len as usize)?;
    let text = String::from_utf8_lossy(&text);
    let text = text.trim_end_matches('\0');
    let value = |key: &str| {
        text.lines()
            .filter_map(|line| line.split_once('='))
            .find(|(name, _)| name.trim() == key)
            .map(|(_, value)| value.trim().trim_matches('"'))
    };
    let kind = value("createType").unwrap_or_default();
    if !["monolithicSparse", "streamOptimized"].contains(&kind) {
        return Err(ImageError::refused(
            "createType",
            "only monolithicSparse and streamOptimized keep all in one file",
        ));
    }
    if value("parentCID").is_some_and(|parent| !parent.eq_ignore_ascii_case("ffffffff")) {
        return Err(ImageError::refused(
            "parentCID",
            "a differencing image needs its parent: merge them first",
        ));
    }
    let access = ["RW ", "RDONLY ", "NOACCESS "];
    let mut extents = text
        .lines()
        .filter(|line| access.iter().any(|word| line.starts_with(word)));
    match (extents.next(), extents.next()) {
        (Some(line), None) if line.split(' ').nth(2) == Some("SPARSE") => Ok(()),
        _ => Err(ImageError::refused(
            "extents",
            "there must be one, of the kind SPARSE: others are named files",
        )),
    }
}

impl Blocks for Vmdk {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn locate(&self, file: &dyn BlockFile, offset: u64, len: u64) -> Result<Piece, ImageError> {
        let (grain, within) = (offset / self.grain, offset % self.grain);
        let len = len.min(self.grain - within);
        let table = u32::from_le_bytes(entry(file, self.directory, grain / self.per_table)?);
        if table == 0 {
            return Ok(Piece::Zero { len });
        }
        let table = u64::from(table) * 512;
        if table + self.per_table * 4 > self.file_size {
            return Err(ImageError::corrupt(
                "grain directory",
                format!("a table at {table:#x} is past the file's end"),
            ));
        }
        let sector = u32::from_le_bytes(entry(file, table, grain % self.per_table)?);
        let start = u64::from(sector) * 512;
        Ok(match sector {
            0 => Piece::Zero { len },
            1 if self.flags & ZERO_GRAINS != 0 => Piece::Zero { len },
            _ if self.flags & COMPRESSED != 0 => Piece::Packed {
                offset: start,
                within,
                len,
            },
            _ => Piece::Host {
                offset: start + within,
                len,
            },
        })
    }

    fn inflate(&self, file: &dyn BlockFile, offset: u64) -> Result<Vec<u8>, ImageError> {
        let marker = read(file, offset, MARKER as usize)?;
        let len = u64::from(le32(&marker, 8));
        if len > 2 * self.grain || offset + MARKER + len > self.file_size {
            return Err(ImageError::corrupt(
                "grain marker",
                format!("{len} bytes at {offset:#x} are over two grains or past the file's end"),
            ));
        }
        let packed = read(file, offset + MARKER, len as usize)?;
        let mut plain = vec![0; self.grain as usize];
        let mut state = flate2::Decompress::new(true);
        state
            .decompress(&packed, &mut plain, flate2::FlushDecompress::Finish)
            .map_err(|error| ImageError::corrupt("grain", format!("it cannot be inflated: {error}")))?;
        plain.truncate(usize::try_from(state.total_out()).unwrap_or(0));
        Ok(plain)
    }
}
