//! Numbers in headers. A field past the end of the bytes reads as zeros: callers pass whole headers.

use crate::image::{BlockFile, ImageError};

fn bytes<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    let part = header.get(at..).and_then(|rest| rest.first_chunk());
    part.copied().unwrap_or([0; N])
}

pub(super) fn le16(header: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes(header, at))
}

pub(super) fn le32(header: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes(header, at))
}

pub(super) fn le64(header: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes(header, at))
}

pub(super) fn be16(header: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes(header, at))
}

pub(super) fn be32(header: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes(header, at))
}

pub(super) fn be64(header: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes(header, at))
}

/// Reads `len` bytes of metadata; what is past the file's end reads as zeros.
pub(super) fn read(file: &dyn BlockFile, offset: u64, len: usize) -> Result<Vec<u8>, ImageError> {
    let mut header = vec![0; len];
    file.read_at(&mut header, offset)
        .map_err(ImageError::io("read the image's metadata"))?;
    Ok(header)
}

/// One entry of a table of `N`-byte entries.
pub(super) fn entry<const N: usize>(
    file: &dyn BlockFile,
    table: u64,
    index: u64,
) -> Result<[u8; N], ImageError> {
    let mut entry = [0; N];
    file.read_at(&mut entry, table + index * N as u64)
        .map_err(ImageError::io("read a block table"))?;
    Ok(entry)
}

/// Fails unless a table of `entries` entries of `size` bytes lies inside the file.
pub(super) fn check_table(
    field: &'static str,
    offset: u64,
    entries: u64,
    size: u64,
    file_size: u64,
) -> Result<(), ImageError> {
    let end = entries.checked_mul(size).and_then(|len| len.checked_add(offset));
    match end {
        Some(end) if end <= file_size => Ok(()),
        _ => Err(ImageError::refused(
            field,
            format!("{entries} entries at {offset:#x} are past the file's end at {file_size:#x}"),
        )),
    }
}
