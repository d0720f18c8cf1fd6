//! What kind of kernel a file holds, and whether it is whole. The kernel is the person's own
//! file; this finds mistakes early and says them well. The vmm, which maps it, checks again.

/// As much of a file's front as is looked at.
pub(crate) const FRONT: usize = 64 << 10;
/// What compressed files start with.
const COMPRESSED: [(&[u8], &str); 3] = [
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
];
/// `e_machine` (x86-64 psABI).
const EM_X86_64: u16 = 62;
const ELF_HEADER: usize = 64;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// A kernel file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kernel {
    /// A Linux kernel, as bzImage or as ELF.
    Linux,
    /// Another ELF image.
    Other,
}

/// Why a file is no kernel.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KernelError {
    #[error("it is neither a 64-bit ELF image nor a bzImage")]
    Unknown,
    #[error("it is compressed with {0}")]
    Compressed(&'static str),
    #[error("it is for another processor than x86-64")]
    Processor,
    #[error("it is too short for an ELF header")]
    Short,
    #[error("it is truncated: it has {has} bytes, and its header speaks of {needs}")]
    Truncated { has: u64, needs: u64 },
}

fn field<const N: usize>(front: &[u8], at: usize) -> Option<[u8; N]> {
    front.get(at..)?.first_chunk().copied()
}

/// Judges a kernel by its front, its length, and its ELF notes, which `read_at` reads.
pub(crate) fn identify(
    front: &[u8],
    length: u64,
    read_at: &dyn Fn(u64, usize) -> Vec<u8>,
) -> Result<Kernel, KernelError> {
    if front.starts_with(b"\x7fELF\x02\x01") {
        return identify_elf(front, length, read_at);
    }
    // Linux boot protocol, "The Real-mode Kernel Header": the magic at 0x202.
    if field(front, 0x202) == Some(*b"HdrS") {
        let sectors = match front[0x1F1] {
            0 => 4,
            n => u64::from(n),
        };
        let paragraphs = field(front, 0x1F4).map_or(0, u32::from_le_bytes);
        let needs = (sectors + 1) * 512 + u64::from(paragraphs) * 16;
        // The last paragraph may be there in part: the header counts whole ones.
        return if length.next_multiple_of(16) < needs {
            Err(KernelError::Truncated { has: length, needs })
        } else {
            Ok(Kernel::Linux)
        };
    }
    // Linux `Documentation/arch/arm64/booting.rst`: the magic of an arm64 image.
    if front.starts_with(b"\x7fELF") || field(front, 56) == Some(*b"ARM\x64") {
        return Err(KernelError::Processor);
    }
    let compressed = COMPRESSED.iter().find(|(magic, _)| front.starts_with(magic));
    Err(compressed.map_or(KernelError::Unknown, |(_, name)| KernelError::Compressed(name)))
}

fn identify_elf(
    front: &[u8],
    length: u64,
    read_at: &dyn Fn(u64, usize) -> Vec<u8>,
) -> Result<Kernel, KernelError> {
    let truncated = |needs| KernelError::Truncated { has: length, needs };
    if front.len() < ELF_HEADER {
        return Err(KernelError::Short);
    }
    if field(front, 18).map(u16::from_le_bytes) != Some(EM_X86_64) {
        return Err(KernelError::Processor);
    }
    let table = field(front, 32).map_or(u64::MAX, u64::from_le_bytes);
    let count = field(front, 56).map_or(0, u16::from_le_bytes);
    let table_end = table.saturating_add(u64::from(count) * 56);
    if table_end > length || table_end > front.len() as u64 {
        return Err(truncated(table_end));
    }
    let mut kind = Kernel::Other;
    for n in 0..usize::from(count) {
        // In bounds: the table's end was compared with the front's length.
        let header = &front[table as usize + n * 56..][..56];
        let offset = field(header, 8).map_or(0, u64::from_le_bytes);
        let size = field(header, 32).map_or(0, u64::from_le_bytes);
        let end = offset.saturating_add(size);
        let segment = field(header, 0).map_or(0, u32::from_le_bytes);
        if matches!(segment, PT_LOAD | PT_NOTE) && end > length {
            return Err(truncated(end));
        }
        if segment == PT_NOTE && has_linux_note(&read_at(offset, size.min(FRONT as u64) as usize)) {
            kind = Kernel::Linux;
        }
    }
    Ok(kind)
}

/// Linux kernels carry notes of the owner `Linux` (`include/linux/build-salt.h`).
fn has_linux_note(mut notes: &[u8]) -> bool {
    while let Some([name_length, data_length]) = field::<8>(notes, 0).map(|b| {
        let [a, b, c, d, e, f, g, h] = b;
        [
            u32::from_le_bytes([a, b, c, d]) as usize,
            u32::from_le_bytes([e, f, g, h]) as usize,
        ]
    }) {
        if name_length == 6 && notes.get(12..18) == Some(b"Linux\0".as_slice()) {
            return true;
        }
        let next = 12 + name_length.next_multiple_of(4) + data_length.next_multiple_of(4);
        notes = notes.get(next..).unwrap_or(&[]);
    }
    false
}
