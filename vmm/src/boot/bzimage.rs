//! bzImage kernels, entered by the 64-bit boot protocol (Linux `Documentation/arch/x86/boot.rst`).

use super::{BootError, Image, Placed};
use crate::kvm::{Entry, EntryMode};
use crate::memory::{GuestRam, layout};
use vm_memory::{Bytes, GuestAddress};

const PAGE: usize = 4096;
/// Offset of the setup header in the file and in the zero page.
const HEADER: usize = 0x1F1;
const SECTOR: u64 = 512;
/// 64-bit entry point, relative to the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;
const MIN_VERSION: u16 = 0x20C;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
const LOADER_UNDEFINED: u8 = 0xFF;

/// Fields of the zero page and of the setup header, by offset (`struct boot_params`).
mod field {
    pub(super) const ACPI_RSDP: usize = 0x070;
    pub(super) const E820_ENTRIES: usize = 0x1E8;
    pub(super) const SETUP_SECTS: usize = 0x1F1;
    pub(super) const BOOT_FLAG: usize = 0x1FE;
    pub(super) const JUMP_LENGTH: usize = 0x201;
    pub(super) const MAGIC: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21C;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const INITRD_ADDR_MAX: usize = 0x22C;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const RELOCATABLE: usize = 0x234;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const PREF_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
    pub(super) const E820_TABLE: usize = 0x2D0;
}

/// The first page of the file; every access stays inside it.
struct Header([u8; PAGE]);

impl Header {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut value = [0; N];
        value.copy_from_slice(&self.0[at..at + N]);
        value
    }

    fn u8(&self, at: usize) -> u8 {
        self.0[at]
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    /// End of the setup header: the jump over it says how long it is.
    fn end(&self) -> usize {
        field::MAGIC + usize::from(self.u8(field::JUMP_LENGTH))
    }
}

/// A loaded kernel and what its zero page needs.
pub(super) struct Kernel {
    header: Header,
    pub(super) entry: Entry,
    /// End (exclusive) of what it needs until it has unpacked itself.
    pub(super) end: u64,
    /// Highest address at which a byte of the initrd may lie.
    pub(super) initrd_max: u64,
}

/// Loads the protected-mode part, at the address that the kernel prefers.
pub(super) fn load(image: &Image, ram: &GuestRam, cmdline: usize) -> Result<Kernel, BootError> {
    let mut page = [0; PAGE];
    let present = image.size().min(PAGE as u64) as usize;
    image.read_exact_at(&mut page[..present], 0)?;
    let header = Header(page);
    if header.bytes(field::MAGIC) != *b"HdrS" || header.u16(field::BOOT_FLAG) != 0xAA55 {
        return Err(BootError::Unknown);
    }
    check(&header, cmdline)?;
    let setup_sectors = match header.u8(field::SETUP_SECTS) {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let code = (setup_sectors + 1) * SECTOR;
    let size = image
        .size()
        .checked_sub(code)
        .filter(|&size| size > ENTRY_64)
        .ok_or(BootError::Truncated {
            file: "kernel",
            offset: code,
            end: code + ENTRY_64 + 1,
            size: image.size(),
        })?;
    let init_size = u64::from(header.u32(field::INIT_SIZE)).max(size);
    let start = place(&header, ram, init_size)?;
    image.load(ram, code, start, size)?;
    Ok(Kernel {
        entry: Entry {
            mode: EntryMode::Linux64,
            rip: start + ENTRY_64,
        },
        end: start + init_size,
        initrd_max: match header.u16(field::XLOADFLAGS) & XLF_CAN_BE_LOADED_ABOVE_4G {
            0 => u64::from(header.u32(field::INITRD_ADDR_MAX)),
            _ => u64::from(u32::MAX),
        },
        header,
    })
}

fn check(header: &Header, cmdline: usize) -> Result<(), BootError> {
    if header.u16(field::VERSION) < MIN_VERSION {
        return Err(BootError::BzImage("boot protocol older than 2.12"));
    }
    if header.u8(field::LOADFLAGS) & LOADED_HIGH == 0 {
        return Err(BootError::BzImage("a zImage, not a bzImage"));
    }
    if header.u16(field::XLOADFLAGS) & XLF_KERNEL_64 == 0 {
        return Err(BootError::BzImage("no 64-bit entry point (a 32-bit kernel)"));
    }
    if header.end() > field::E820_TABLE {
        return Err(BootError::BzImage("a setup header longer than its place"));
    }
    if cmdline > header.u32(field::CMDLINE_SIZE) as usize {
        return Err(BootError::CmdlineTooLong(cmdline));
    }
    Ok(())
}

/// The preferred address, or the next one above it that is allowed: a relocatable kernel that is
/// loaded below moves itself there (boot.rst, `kernel_alignment` and `pref_address`).
fn place(header: &Header, ram: &GuestRam, init_size: u64) -> Result<u64, BootError> {
    let ram_end = layout::low_ram_end(ram.size());
    let fits = |start: u64| start.checked_add(init_size).is_some_and(|end| end <= ram_end);
    let preferred = header.u64(field::PREF_ADDRESS);
    if preferred >= layout::KERNEL_MIN && fits(preferred) {
        return Ok(preferred);
    }
    let alignment = u64::from(header.u32(field::KERNEL_ALIGNMENT));
    if header.u8(field::RELOCATABLE) != 0 && alignment.is_power_of_two() {
        let lowest = layout::KERNEL_MIN
            .max(preferred)
            .checked_next_multiple_of(alignment);
        if let Some(lowest) = lowest.filter(|&lowest| fits(lowest)) {
            return Ok(lowest);
        }
    }
    Err(BootError::MemoryTooSmall {
        need: preferred.max(layout::KERNEL_MIN).saturating_add(init_size),
        end: ram_end,
    })
}

impl Kernel {
    /// Writes `struct boot_params`: the kernel's own setup header, completed.
    pub(super) fn write_zero_page(
        &self,
        ram: &GuestRam,
        initrd: Option<Placed>,
        rsdp: u64,
    ) -> Result<(), BootError> {
        let mut page = [0u8; PAGE];
        let header_end = self.header.end();
        page[HEADER..header_end].copy_from_slice(&self.header.0[HEADER..header_end]);
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        put(field::TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
        put(field::CMD_LINE_PTR, &(layout::CMDLINE as u32).to_le_bytes());
        put(field::ACPI_RSDP, &rsdp.to_le_bytes());
        // Both lie below 4 GiB: `initrd_max` and the PCI hole bound them.
        let (start, size) = initrd.map_or((0, 0), |i| (i.start as u32, i.size as u32));
        put(field::RAMDISK_IMAGE, &start.to_le_bytes());
        put(field::RAMDISK_SIZE, &size.to_le_bytes());
        let map = layout::memory_map(ram.size());
        put(field::E820_ENTRIES, &[map.len() as u8]);
        for (index, region) in map.iter().enumerate() {
            let at = field::E820_TABLE + index * 20;
            put(at, &region.start.to_le_bytes());
            put(at + 8, &region.size.to_le_bytes());
            put(at + 16, &(region.kind as u32).to_le_bytes());
        }
        Ok(ram.memory().write_slice(&page, GuestAddress(layout::ZERO_PAGE))?)
    }
}
