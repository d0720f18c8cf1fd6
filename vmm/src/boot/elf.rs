//! Uncompressed ELF kernels, entered by PVH (Xen `docs/misc/pvh.pandoc`).

use super::{BootError, Image};
use crate::kvm::{Entry, EntryMode};
use crate::memory::{GuestRam, layout};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// First bytes of every ELF file.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Most program headers that are looked at: a file can claim 65535 of them.
const MAX_SEGMENTS: u16 = 64;
/// Most bytes of one note segment that are looked at.
const MAX_NOTES: u64 = 64 << 10;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    ident: [u8; 16],
    kind: u16,
    machine: u16,
    version: u32,
    entry: u64,
    phoff: u64,
    shoff: u64,
    flags: u32,
    ehsize: u16,
    phentsize: u16,
    phnum: u16,
    shentsize: u16,
    shnum: u16,
    shstrndx: u16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Segment {
    kind: u32,
    flags: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
    align: u64,
}

/// A loaded kernel.
pub(super) struct Kernel {
    pub(super) entry: Entry,
    /// End (exclusive) of what it occupies.
    pub(super) end: u64,
}

/// Loads every PT_LOAD segment at its physical address and finds the PVH entry point.
pub(super) fn load(image: &Image, ram: &GuestRam) -> Result<Kernel, BootError> {
    let header = read::<Header>(image, 0)?;
    check(&header)?;
    let mut entry = None;
    let mut end = 0;
    let mut loaded = Vec::new();
    for index in 0..u64::from(header.phnum) {
        let offset = header
            .phoff
            .checked_add(index * size_of::<Segment>() as u64)
            .ok_or(BootError::Elf("program headers beyond the end of the file"))?;
        let segment = read::<Segment>(image, offset)?;
        match segment.kind {
            PT_LOAD if segment.memsz > 0 => {
                let segment_end = load_segment(image, ram, &segment)?;
                loaded.push(segment.paddr..segment_end);
                end = end.max(segment_end);
            }
            PT_NOTE if entry.is_none() => entry = find_entry(image, &segment)?,
            _ => {}
        }
    }
    let rip = u64::from(entry.ok_or(BootError::NoPvhNote)?);
    if !loaded.iter().any(|range| range.contains(&rip)) {
        return Err(BootError::EntryOutside(rip));
    }
    Ok(Kernel {
        entry: Entry {
            mode: EntryMode::Pvh,
            rip,
        },
        end,
    })
}

fn read<T: FromBytes + IntoBytes>(image: &Image, offset: u64) -> Result<T, BootError> {
    let mut value = T::new_zeroed();
    image.read_exact_at(value.as_mut_bytes(), offset)?;
    Ok(value)
}

fn check(header: &Header) -> Result<(), BootError> {
    if header.ident[4] != CLASS_64 || header.ident[5] != LITTLE_ENDIAN {
        return Err(BootError::Elf("not 64-bit little endian"));
    }
    if header.machine != MACHINE_X86_64 {
        return Err(BootError::Elf("another machine's code"));
    }
    if usize::from(header.phentsize) != size_of::<Segment>() {
        return Err(BootError::Elf("program headers of another size"));
    }
    if header.phnum == 0 || header.phnum > MAX_SEGMENTS {
        return Err(BootError::Elf("no program headers, or more than 64"));
    }
    Ok(())
}

fn load_segment(image: &Image, ram: &GuestRam, segment: &Segment) -> Result<u64, BootError> {
    if segment.filesz > segment.memsz {
        return Err(BootError::Elf("a segment larger in the file than in memory"));
    }
    if segment.paddr < layout::KERNEL_MIN {
        return Err(BootError::TooLow(segment.paddr));
    }
    let ram_end = layout::low_ram_end(ram.size());
    let end = segment.paddr.saturating_add(segment.memsz);
    if end > ram_end {
        return Err(BootError::MemoryTooSmall {
            need: end,
            end: ram_end,
        });
    }
    image.load(ram, segment.offset, segment.paddr, segment.filesz)?;
    zero(
        ram,
        segment.paddr + segment.filesz,
        segment.memsz - segment.filesz,
    )?;
    Ok(end)
}

/// Clears .bss. Fresh memory is zero already and is not touched, so that its pages stay
/// unallocated; after a reboot it is not.
fn zero(ram: &GuestRam, start: u64, size: u64) -> Result<(), BootError> {
    const CHUNK: usize = 64 << 10;
    static ZEROES: [u8; CHUNK] = [0; CHUNK];
    if !ram.is_used() {
        return Ok(());
    }
    let mut done = 0;
    while done < size {
        let count = (size - done).min(CHUNK as u64);
        ram.memory()
            .write_slice(&ZEROES[..count as usize], GuestAddress(start + done))?;
        done += count;
    }
    Ok(())
}

/// Walks a note segment for Xen's 32-bit physical entry point.
fn find_entry(image: &Image, segment: &Segment) -> Result<Option<u32>, BootError> {
    let mut notes = vec![0; segment.filesz.min(MAX_NOTES) as usize];
    image.read_exact_at(&mut notes, segment.offset)?;
    let align = if segment.align == 8 { 8 } else { 4 };
    let mut rest = &notes[..];
    while let Some((head, body)) = rest.split_at_checked(12) {
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (name_size, desc_size, kind) = (word(0) as usize, word(4) as usize, word(8));
        let Some((name, after_name)) = split_padded(body, name_size, align, 12) else {
            break;
        };
        let Some((desc, after_desc)) = split_padded(after_name, desc_size, align, 0) else {
            break;
        };
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            // Four or eight bytes; the address is a 32-bit one in both.
            return match desc {
                [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => Ok(Some(u32::from_le_bytes([*a, *b, *c, *d]))),
                _ => Err(BootError::Elf("a PVH entry point that is no 32-bit address")),
            };
        }
        rest = after_desc;
    }
    Ok(None)
}

/// Splits `size` bytes off, and the padding that makes `before + size` a multiple of `align`.
fn split_padded(bytes: &[u8], size: usize, align: usize, before: usize) -> Option<(&[u8], &[u8])> {
    let (field, rest) = bytes.split_at_checked(size)?;
    let padding = (before + size).next_multiple_of(align) - (before + size);
    Some((field, rest.get(padding..).unwrap_or_default()))
}
