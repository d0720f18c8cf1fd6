//! Hyper-V disk images (MS-VHDX): headers, region table, metadata, block allocation table (BAT).

use super::fields::{check_table, entry, le16, le32, le64, read};
use super::{Blocks, Piece};
use crate::image::{BlockFile, ImageError};

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const REGION_TABLE_LEN: usize = 64 << 10;
const MOST_ENTRIES: u64 = 2047;
/// Most bytes of the metadata table and of its items' offsets: the region is at most this long.
const MOST_METADATA: u64 = 1 << 30;

/// A GUID as it lies in the file.
const fn guid(text: u128) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, tail @ ..] = text.to_be_bytes();
    let [i, j, k, l, m, n, o, p] = tail;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

const BAT: [u8; 16] = guid(0x2dc27766_f623_4200_9d64_115e9bfd4a08);
const METADATA: [u8; 16] = guid(0x8b7ca206_4790_4b9a_b8fe_575f050f886e);
const PARAMETERS: [u8; 16] = guid(0xcaa16737_fa36_4d43_b3b6_33f0aa44e76b);
const DISK_SIZE: [u8; 16] = guid(0x2fa54224_cd1b_4876_b211_5dbed83bf4b8);
const SECTOR_SIZE: [u8; 16] = guid(0x8141bf1d_a96f_4709_ba47_f233a8faab5f);
const PHYSICAL: [u8; 16] = guid(0xcda348c7_445d_4471_9cc9_e9885251c556);
const DISK_ID: [u8; 16] = guid(0xbeca12ab_b2e6_4523_93ef_c309e000c746);

/// A part of the file, inside its length: offset and length.
type Region = (u64, u64);

pub(super) struct Vhdx {
    capacity: u64,
    bat: u64,
    block: u64,
    /// Blocks of data between two entries for sector bitmaps.
    chunk: u64,
}

impl Vhdx {
    pub(super) fn open(file: &dyn BlockFile, file_size: u64) -> Result<Self, ImageError> {
        if !read(file, 0, 8)?.starts_with(b"vhdxfile") {
            return Err(ImageError::refused("signature", "this is no vhdx image"));
        }
        check_header(file)?;
        let (bat, metadata) = regions(file, file_size)?;
        let items = Items::read(file, metadata)?;
        let parameters = items.value(file, &PARAMETERS, "file parameters")?;
        let (block, flags) = (parameters & 0xffff_ffff, parameters >> 32);
        if flags & 2 != 0 {
            return Err(ImageError::refused(
                "file parameters",
                "a differencing image needs its parent: merge them first",
            ));
        }
        let sector = items.value(file, &SECTOR_SIZE, "logical sector size")? & 0xffff_ffff;
        if !block.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block) {
            return Err(ImageError::refused(
                "block size",
                format!("{block} is no power of two from 1 to 256 MiB"),
            ));
        }
        if ![512, 4096].contains(&sector) {
            return Err(ImageError::refused(
                "logical sector size",
                format!("{sector} is neither 512 nor 4096"),
            ));
        }
        let capacity = items.value(file, &DISK_SIZE, "virtual disk size")?;
        if capacity > 64 << 40 {
            return Err(ImageError::refused(
                "virtual disk size",
                format!("{capacity} bytes are over 64 TiB"),
            ));
        }
        let image = Self {
            capacity,
            bat: bat.0,
            block,
            chunk: (sector << 23) / block,
        };
        let needed = image.index(capacity.div_ceil(block).max(1) - 1) + 1;
        if needed * 8 > bat.1 {
            return Err(ImageError::refused(
                "BAT",
                format!("its {} bytes are too few for {capacity}", bat.1),
            ));
        }
        Ok(image)
    }

    /// Index into the BAT of a block of data.
    fn index(&self, block: u64) -> u64 {
        block + block / self.chunk
    }
}

/// The current header must say that the log is empty: else the metadata in the file is not what counts.
fn check_header(file: &dyn BlockFile) -> Result<(), ImageError> {
    let mut current: Option<Vec<u8>> = None;
    for offset in HEADERS {
        let header = read(file, offset, 4096)?;
        let sequence = |header: &Vec<u8>| le64(header, 8);
        if is_sound(&header, b"head")
            && current
                .as_ref()
                .is_none_or(|other| sequence(other) < sequence(&header))
        {
            current = Some(header);
        }
    }
    let header = current.ok_or_else(|| ImageError::refused("header", "both copies are damaged"))?;
    if le16(&header, 66) != 1 {
        return Err(ImageError::refused(
            "version",
            format!("{} is not 1", le16(&header, 66)),
        ));
    }
    if header[48..64].iter().any(|byte| *byte != 0) {
        return Err(ImageError::refused(
            "log",
            "it has entries to replay: let the program that wrote the image open and close it once",
        ));
    }
    Ok(())
}

/// Offset and length of the BAT, and of the metadata.
fn regions(file: &dyn BlockFile, file_size: u64) -> Result<(Region, Region), ImageError> {
    let mut found = None;
    for offset in REGION_TABLES {
        let table = read(file, offset, REGION_TABLE_LEN)?;
        if is_sound(&table, b"regi") {
            found = Some(table);
            break;
        }
    }
    let table = found.ok_or_else(|| ImageError::refused("region table", "both copies are damaged"))?;
    let count = u64::from(le32(&table, 8)).min(MOST_ENTRIES) as usize;
    let (mut bat, mut metadata) = (None, None);
    for entry in table[16..].chunks_exact(32).take(count) {
        let place = (le64(entry, 16), u64::from(le32(entry, 24)));
        check_table("region table", place.0, place.1, 1, file_size)?;
        match &entry[..16] {
            name if name == BAT => bat = Some(place),
            name if name == METADATA => metadata = Some(place),
            _ if le32(entry, 28) & 1 != 0 => {
                return Err(ImageError::refused(
                    "region table",
                    "an unknown region is required",
                ));
            }
            _ => {}
        }
    }
    bat.zip(metadata)
        .ok_or_else(|| ImageError::refused("region table", "it lacks the BAT or the metadata"))
}

/// The metadata table.
struct Items {
    region: Region,
    table: Vec<u8>,
}

impl Items {
    fn read(file: &dyn BlockFile, region: Region) -> Result<Self, ImageError> {
        let table = read(file, region.0, REGION_TABLE_LEN)?;
        if !table.starts_with(b"metadata") || region.1 > MOST_METADATA {
            return Err(ImageError::refused(
                "metadata table",
                "its signature or length is wrong",
            ));
        }
        let items = Self { region, table };
        let known = [PARAMETERS, DISK_SIZE, SECTOR_SIZE, PHYSICAL, DISK_ID];
        for item in items.entries() {
            // A required item that is not known may change what all others mean.
            if le32(item, 24) & 4 != 0 && !known.iter().any(|name| item[..16] == name[..]) {
                return Err(ImageError::refused(
                    "metadata table",
                    "an unknown item is required: perhaps of a differencing image",
                ));
            }
        }
        Ok(items)
    }

    fn entries(&self) -> impl Iterator<Item = &[u8]> {
        let count = u64::from(le16(&self.table, 10)).min(MOST_ENTRIES) as usize;
        self.table[32..].chunks_exact(32).take(count)
    }

    /// The first 8 bytes of an item.
    fn value(&self, file: &dyn BlockFile, name: &[u8; 16], field: &'static str) -> Result<u64, ImageError> {
        let item = self.entries().find(|item| item[..16] == name[..]);
        let at = item.map(|item| u64::from(le32(item, 16)));
        match at {
            Some(at) if at >= REGION_TABLE_LEN as u64 && at + 8 <= self.region.1 => {
                Ok(le64(&read(file, self.region.0 + at, 8)?, 0))
            }
            _ => Err(ImageError::refused(
                field,
                "it is missing or outside the metadata",
            )),
        }
    }
}

/// Signature and checksum (CRC-32C with its own field as zeros).
fn is_sound(bytes: &[u8], signature: &[u8; 4]) -> bool {
    // A fuzzer does not guess checksums.
    let unchecked = cfg!(feature = "fuzzing");
    bytes.starts_with(signature) && (unchecked || crc32c(&bytes[..4], &[0; 4], &bytes[8..]) == le32(bytes, 4))
}

fn crc32c(first: &[u8], second: &[u8], third: &[u8]) -> u32 {
    let bytes = first.iter().chain(second).chain(third);
    !bytes.fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 }
        })
    })
}

impl Blocks for Vhdx {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn locate(&self, file: &dyn BlockFile, offset: u64, len: u64) -> Result<Piece, ImageError> {
        let within = offset % self.block;
        let len = len.min(self.block - within);
        let raw = u64::from_le_bytes(entry(file, self.bat, self.index(offset / self.block))?);
        match raw & 7 {
            // Not present, undefined, zero, unmapped, and unmapped as drafts of the format had it.
            0..=3 | 5 => Ok(Piece::Zero { len }),
            6 => Ok(Piece::Host {
                // Any 1 MiB boundary, not a multiple of the block size.
                offset: (raw >> 20 << 20).saturating_add(within),
                len,
            }),
            state => Err(ImageError::corrupt(
                "BAT",
                format!("state {state} of a block is not one of an image without a parent"),
            )),
        }
    }
}
