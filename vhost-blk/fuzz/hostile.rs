//! Image files whose every byte is the fuzzer's. Opening ends with an image or a reason; whatever the
//! image then is asked, it answers or fails, and goes on.

use super::file::MemoryFile;
use crate::image::{BlockFile, Format, Image, OpenOptions, open_layers};
use arbitrary::Unstructured;
use std::sync::Arc;
use vm_memory::VolatileSlice;

/// Longest file: pieces lie below it.
const LONGEST: usize = 12 << 20;
const MOST_REQUESTS: usize = 16;
/// Longest request in bytes.
const MOST_BYTES: u64 = 128 << 10;

/// A qcow2 image, opened for writing or reading.
pub fn qcow2_hostile(input: &[u8]) {
    examine(Format::Qcow2, input);
}

/// A VMDK image.
pub fn vmdk(input: &[u8]) {
    examine(Format::Vmdk, input);
}

/// A VDI image.
pub fn vdi(input: &[u8]) {
    examine(Format::Vdi, input);
}

/// A VHDX image.
pub fn vhdx(input: &[u8]) {
    examine(Format::Vhdx, input);
}

/// A VHD image.
pub fn vhd(input: &[u8]) {
    examine(Format::Vhd, input);
}

fn examine(format: Format, input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok([mode, requests]) = input.arbitrary::<[u8; 2]>() else {
        return;
    };
    let mut wanted = Vec::new();
    for _ in 0..usize::from(requests) % MOST_REQUESTS {
        wanted.push(input.arbitrary::<[u8; 4]>().unwrap_or_default());
    }
    let file = Arc::new(MemoryFile::new(pieces(&mut input)));
    let options = OpenOptions {
        read_only: mode & 1 != 0 || format != Format::Qcow2,
        ..OpenOptions::default()
    };
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(format, file.clone())];
    let Ok(image) = open_layers(layers, None, &options) else {
        assert_eq!(file.changes(), 0, "a refused image was changed");
        return;
    };
    for request in wanted {
        ask(&*image, request);
    }
    let _ = image.close();
    if options.read_only {
        assert_eq!(file.changes(), 0, "a read-only image was changed");
    }
}

/// Sparse pieces of a file: where each starts in sectors, its length, its bytes.
fn pieces(input: &mut Unstructured<'_>) -> Vec<u8> {
    let mut pieces = Vec::new();
    let mut size = 0;
    while !input.is_empty() {
        let [low, high, length, more] = input.arbitrary::<[u8; 4]>().unwrap_or_default();
        let start = usize::from(u16::from_le_bytes([low, high])) * 512;
        let length = usize::from(u16::from_le_bytes([length, more])).min(input.len());
        let bytes = input.bytes(length).unwrap_or_default();
        if start + length <= LONGEST {
            size = size.max(start + length);
            pieces.push((start, bytes));
        }
    }
    // The pages between the pieces are never touched.
    let mut file = vec![0; size];
    for (start, bytes) in pieces {
        file[start..start + bytes.len()].copy_from_slice(bytes);
    }
    file
}

fn ask(image: &dyn Image, [kind, low, high, length]: [u8; 4]) {
    let capacity = image.capacity();
    // Some requests from the start, some up to the end.
    let place = u64::from(u16::from_le_bytes([low, high])) * 512;
    let offset = match kind & 0x80 {
        0 => place.min(capacity),
        _ => capacity.saturating_sub(place) / 512 * 512,
    };
    let length = (u64::from(length) + 1) * 512;
    let length = length.min(MOST_BYTES).min(capacity - offset) / 512 * 512;
    let mut bytes = vec![kind; length as usize];
    let slices = [VolatileSlice::from(&mut bytes[..])];
    let _ = match kind % 8 {
        0..4 => image.read(&slices, offset),
        4 => image.write(&slices, offset),
        5 => image.discard(offset, length),
        6 => image.write_zeroes(offset, length, kind & 0x40 != 0),
        _ => image.flush(),
    };
}
