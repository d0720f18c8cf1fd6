//! The GDT of both entry protocols, and the identity map of the 64-bit one.

use super::BootError;
use crate::kvm::EntryMode;
use crate::memory::{GuestRam, layout};
use vm_memory::{Bytes, GuestAddress};

const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
const PAGE: u64 = 4096;
/// Page directories: 1 GiB each, so that the kernel, its data and the initrd are all mapped.
const DIRECTORIES: u64 = 4;

/// Writes the descriptors that the entry registers refer to.
pub(super) fn write_gdt(ram: &GuestRam, mode: EntryMode) -> Result<(), BootError> {
    let bytes: Vec<u8> = mode.gdt().iter().flat_map(|d| d.to_le_bytes()).collect();
    Ok(ram.memory().write_slice(&bytes, GuestAddress(layout::GDT))?)
}

/// Maps the first 4 GiB to themselves with 2 MiB pages.
pub(super) fn write_identity_map(ram: &GuestRam) -> Result<(), BootError> {
    let directory_pointers = layout::PAGE_TABLES + PAGE;
    let directories = directory_pointers + PAGE;
    let mut table = vec![0u8; ((2 + DIRECTORIES) * PAGE) as usize];
    let mut put = |address: u64, value: u64| {
        let at = (address - layout::PAGE_TABLES) as usize;
        table[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    put(layout::PAGE_TABLES, directory_pointers | PRESENT_WRITABLE);
    for directory in 0..DIRECTORIES {
        let page = directories + directory * PAGE;
        put(directory_pointers + directory * 8, page | PRESENT_WRITABLE);
        for entry in 0..ENTRIES {
            let address = (directory * ENTRIES + entry) << 21;
            put(page + entry * 8, address | LARGE_PAGE | PRESENT_WRITABLE);
        }
    }
    Ok(ram
        .memory()
        .write_slice(&table, GuestAddress(layout::PAGE_TABLES))?)
}
