//! Where RAM and what the boot loader leaves in it lie in the guest's physical address space.

use vm_spec::machine;

/// First byte that RAM below 1 MiB does not have: above lie the ACPI tables.
pub const LOW_RAM_END: u64 = 0x9_FC00;
/// Global descriptor table of the boot CPU.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` (PVH), followed by its module list and memory map.
pub const START_INFO: u64 = 0x6000;
/// Zero page (Linux boot protocol).
pub const ZERO_PAGE: u64 = 0x7000;
/// Identity page tables for 64-bit entry: PML4, PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line in bytes, without its NUL (Linux x86 `COMMAND_LINE_SIZE` - 1).
pub const CMDLINE_MAX: usize = 2047;
/// ACPI tables, RSDP first: the legacy search range, so that a kernel without a pointer finds it.
pub const ACPI_START: u64 = 0xE_0000;
/// Where ACPI tables end: at the system ROM, which Linux takes for one whole range, F0000 to FFFFF. A range
/// that reached into it is a conflict of resources, of which Linux tells as it boots.
pub const ACPI_END: u64 = 0xF_0000;
/// Where firmware would be entered from real mode (FFFF:0000). Linux resets a hardware-reduced
/// machine without EFI by jumping there.
pub const RESET_VECTOR: u64 = 0xF_FFF0;
/// Lowest address at which a kernel may be loaded; everything below is the loader's.
pub const KERNEL_MIN: u64 = 0x10_0000;

/// What a range of the guest's address space is, by E820 type (ACPI 6.5, 15, table 15.13; the
/// PVH memory map uses the same numbers).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum RegionKind {
    /// Usable RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
    /// ACPI tables, usable as RAM once read.
    AcpiReclaimable = 3,
}

/// A range of the guest's address space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// First guest physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: RegionKind,
}

/// End (exclusive) of RAM below the PCI hole for `memory` bytes of RAM.
#[must_use]
pub fn low_ram_end(memory: u64) -> u64 {
    memory.min(machine::PCI_HOLE_START)
}

/// Guest address ranges backed by RAM: (start, size), in order.
#[must_use]
pub fn ram_ranges(memory: u64) -> Vec<(u64, u64)> {
    let low = low_ram_end(memory);
    let mut ranges = vec![(0, low)];
    if memory > low {
        ranges.push((machine::HIGH_RAM_START, memory - low));
    }
    ranges
}

/// The memory map that a guest is told.
#[must_use]
pub fn memory_map(memory: u64) -> Vec<Region> {
    let region = |start, end, kind| Region {
        start,
        size: end - start,
        kind,
    };
    let mut map = vec![
        region(0, LOW_RAM_END, RegionKind::Ram),
        region(ACPI_START, ACPI_END, RegionKind::AcpiReclaimable),
        region(ACPI_END, KERNEL_MIN, RegionKind::Reserved),
        region(KERNEL_MIN, low_ram_end(memory), RegionKind::Ram),
        // Linux trusts the MCFG window only where the map or the DSDT reserves it.
        region(
            machine::ECAM_START,
            machine::ECAM_START + machine::ECAM_SIZE,
            RegionKind::Reserved,
        ),
    ];
    if let Some(&(start, size)) = ram_ranges(memory).get(1) {
        map.push(region(start, start + size, RegionKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_beyond_three_gibibytes_continues_at_four() {
        assert_eq!(ram_ranges(1 << 30), [(0, 1 << 30)]);
        assert_eq!(ram_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ram_ranges(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn nothing_but_the_system_rom_lies_in_its_place() {
        let rom = 0xF_0000..0x10_0000;
        let map = memory_map(machine::MIN_MEMORY);
        let inside: Vec<_> = map
            .iter()
            .filter(|r| r.start < rom.end && r.start + r.size > rom.start)
            .collect();
        assert!(
            matches!(inside[..], [r] if r.start == rom.start && r.size == 0x1_0000 && r.kind == RegionKind::Reserved),
            "{inside:?}"
        );
        assert!(rom.contains(&RESET_VECTOR));
    }

    #[test]
    fn the_map_is_sorted_disjoint_and_hides_no_ram_above_one_mebibyte() {
        for memory in [machine::MIN_MEMORY, 3 << 30, 5 << 30, machine::MAX_MEMORY] {
            let map = memory_map(memory);
            assert!(map.windows(2).all(|w| w[0].start + w[0].size <= w[1].start));
            let ram: u64 = map
                .iter()
                .filter(|r| r.kind == RegionKind::Ram && r.start >= KERNEL_MIN)
                .map(|r| r.size)
                .sum();
            assert_eq!(ram, memory - KERNEL_MIN);
        }
    }
}
