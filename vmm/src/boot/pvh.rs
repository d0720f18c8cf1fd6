//! `hvm_start_info`, its module list and memory map (Xen `public/arch-x86/hvm/start_info.h`).

use super::{BootError, Placed};
use crate::memory::{GuestRam, layout};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{Immutable, IntoBytes};

const MAGIC: u32 = 0x336E_C578;
const VERSION: u32 = 1;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    paddr: u64,
    size: u64,
    cmdline_paddr: u64,
    reserved: u64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// Writes start info at [`layout::START_INFO`], the module list and the memory map behind it.
pub(super) fn write_start_info(ram: &GuestRam, initrd: Option<Placed>, rsdp: u64) -> Result<(), BootError> {
    let modules = layout::START_INFO + size_of::<StartInfo>() as u64;
    let memmap = modules + size_of::<Module>() as u64;
    let map = layout::memory_map(ram.size());
    let info = StartInfo {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { modules } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: memmap,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    let mut bytes = info.as_bytes().to_vec();
    let module = Module {
        paddr: initrd.map_or(0, |i| i.start),
        size: initrd.map_or(0, |i| i.size),
        cmdline_paddr: 0,
        reserved: 0,
    };
    bytes.extend_from_slice(module.as_bytes());
    for region in map {
        let entry = MemoryMapEntry {
            address: region.start,
            size: region.size,
            kind: region.kind as u32,
            reserved: 0,
        };
        bytes.extend_from_slice(entry.as_bytes());
    }
    Ok(ram
        .memory()
        .write_slice(&bytes, GuestAddress(layout::START_INFO))?)
}
