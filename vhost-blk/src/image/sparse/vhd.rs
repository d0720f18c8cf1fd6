//! Virtual PC disk images ("Virtual Hard Disk Image Format Specification" 1.0): fixed and dynamic.

use super::fields::{be16, be32, be64, check_table, entry, read};
use super::{Blocks, Piece};
use crate::image::{BlockFile, ImageError};

const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
/// Whose disks have the size of their geometry, which cannot say every one: Virtual PC and an old QEMU. All
/// others (Hyper-V, Azure, Xen, Disk2vhd) mean `current size`, as QEMU 10 has it.
const SIZE_BY_GEOMETRY: [&[u8; 4]; 2] = [b"vpc ", b"qemu"];
/// Sectors of the largest geometry: then too the field counts.
const LARGEST_GEOMETRY: u64 = 65535 * 16 * 255;
const NO_BLOCK: u32 = u32::MAX;

/// The table of a dynamic disk.
struct Table {
    offset: u64,
    /// Bytes of a block; a power of two.
    block: u64,
    /// Bytes before a block's data: which sectors were written.
    bitmap: u64,
}

pub(super) struct Vhd {
    capacity: u64,
    /// `None` for a fixed disk: the data is the file's start.
    table: Option<Table>,
}

impl Vhd {
    pub(super) fn open(file: &dyn BlockFile, file_size: u64) -> Result<Self, ImageError> {
        let footer = footer(file, file_size)?;
        let capacity = capacity(&footer);
        match be32(&footer, 60) {
            FIXED if capacity > file_size => Err(ImageError::refused(
                "current size",
                format!("{capacity} bytes are past the file's end at {file_size}"),
            )),
            FIXED => Ok(Self {
                capacity,
                table: None,
            }),
            DYNAMIC => Ok(Self {
                capacity,
                table: Some(table(file, be64(&footer, 16), capacity, file_size)?),
            }),
            kind => Err(ImageError::refused(
                "disk type",
                format!(
                    "{kind} is neither fixed nor dynamic; a differencing disk needs its parent: merge them"
                ),
            )),
        }
    }
}

/// The footer at the end, or its copy at the start.
fn footer(file: &dyn BlockFile, file_size: u64) -> Result<Vec<u8>, ImageError> {
    for offset in [file_size.saturating_sub(512), 0] {
        let footer = read(file, offset, 512)?;
        if footer.starts_with(b"conectix") && is_sound(&footer, 64) {
            return Ok(footer);
        }
    }
    Err(ImageError::refused(
        "footer",
        "no cookie with a right checksum: this is no vhd image, or it is cut off",
    ))
}

/// The checksum is the complement of the sum of all other bytes.
fn is_sound(bytes: &[u8], checksum_at: usize) -> bool {
    let sum = bytes
        .iter()
        .enumerate()
        .filter(|(at, _)| !(checksum_at..checksum_at + 4).contains(at))
        .fold(0_u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)));
    // A fuzzer does not guess checksums.
    cfg!(feature = "fuzzing") || !sum == be32(bytes, checksum_at)
}

fn capacity(footer: &[u8]) -> u64 {
    let sectors = u64::from(be16(footer, 56)) * u64::from(footer[58]) * u64::from(footer[59]);
    let by_geometry = SIZE_BY_GEOMETRY.iter().any(|name| footer[28..32] == name[..]);
    if by_geometry && sectors != LARGEST_GEOMETRY {
        sectors * 512
    } else {
        be64(footer, 48)
    }
}

fn table(file: &dyn BlockFile, at: u64, capacity: u64, file_size: u64) -> Result<Table, ImageError> {
    check_table("data offset", at, 1, 1024, file_size)?;
    let header = read(file, at, 1024)?;
    if !header.starts_with(b"cxsparse") || !is_sound(&header, 36) {
        return Err(ImageError::refused(
            "dynamic disk header",
            "its cookie or checksum is wrong",
        ));
    }
    let block = u64::from(be32(&header, 32));
    if !block.is_power_of_two() || !(512..=1 << 30).contains(&block) {
        return Err(ImageError::refused(
            "block size",
            format!("{block} is no power of two from 512 to 2^30"),
        ));
    }
    let entries = u64::from(be32(&header, 28));
    if capacity.div_ceil(block) > entries {
        return Err(ImageError::refused(
            "max table entries",
            format!("{entries} are too few for {capacity} bytes"),
        ));
    }
    let offset = be64(&header, 16);
    check_table("table offset", offset, entries, 4, file_size)?;
    Ok(Table {
        offset,
        block,
        bitmap: (block / 512).div_ceil(8).next_multiple_of(512),
    })
}

impl Blocks for Vhd {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn locate(&self, file: &dyn BlockFile, offset: u64, len: u64) -> Result<Piece, ImageError> {
        let Some(table) = &self.table else {
            return Ok(Piece::Host { offset, len });
        };
        let within = offset % table.block;
        let len = len.min(table.block - within);
        let sector = u32::from_be_bytes(entry(file, table.offset, offset / table.block)?);
        // Sectors of a block that were never written hold zeros: its bitmap adds nothing.
        Ok(match sector {
            NO_BLOCK => Piece::Zero { len },
            sector => Piece::Host {
                offset: u64::from(sector) * 512 + table.bitmap + within,
                len,
            },
        })
    }
}
