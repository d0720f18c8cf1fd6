//! Register values with which a kernel is entered, and those of a processor at power-on.

use crate::memory::layout;
use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use vm_spec::machine;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NW_CD: u64 = 3 << 29;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;
const APIC_ENABLED: u64 = 1 << 11;
const APIC_BSP: u64 = 1 << 8;

/// The protocol by which a kernel is entered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryMode {
    /// PVH: 32-bit protected mode without paging, EBX points to `hvm_start_info`.
    Pvh,
    /// Linux 64-bit: long mode with identity page tables, RSI points to the zero page.
    Linux64,
}

/// Where and how the boot CPU starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The protocol.
    pub mode: EntryMode,
    /// First instruction (guest physical).
    pub rip: u64,
}

/// Selectors of code and data in both protocols: Linux's `__BOOT_CS` and `__BOOT_DS`.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
/// Descriptors of a flat segment of 4 GiB.
const CODE_32: u64 = 0x00CF_9B00_0000_FFFF;
const CODE_64: u64 = 0x00AF_9B00_0000_FFFF;
const DATA_32: u64 = 0x00CF_9300_0000_FFFF;

impl EntryMode {
    /// The descriptors at [`layout::GDT`], to which the segment registers refer.
    #[must_use]
    pub fn gdt(self) -> [u64; 4] {
        let code = match self {
            Self::Pvh => CODE_32,
            Self::Linux64 => CODE_64,
        };
        [0, 0, code, DATA_32]
    }
}

fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        limit: 0xFFFF_FFFF,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

fn tables(sregs: &mut kvm_sregs) {
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 0xB,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment {
        type_: 2,
        unusable: 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable {
        limit: 0xFFFF,
        ..Default::default()
    };
}

impl Entry {
    /// General registers at the first instruction.
    #[must_use]
    pub(super) fn regs(&self) -> kvm_regs {
        let mut regs = kvm_regs {
            rip: self.rip,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        };
        match self.mode {
            EntryMode::Pvh => regs.rbx = layout::START_INFO,
            EntryMode::Linux64 => regs.rsi = layout::ZERO_PAGE,
        }
        regs
    }

    /// Segment and control registers at the first instruction.
    #[must_use]
    pub(super) fn sregs(&self) -> kvm_sregs {
        let data = segment(DATA, 0x3);
        let mut sregs = kvm_sregs {
            cs: segment(CODE, 0xB),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            cr0: CR0_PE | CR0_ET,
            apic_base: machine::LAPIC_START | APIC_ENABLED | APIC_BSP,
            ..Default::default()
        };
        tables(&mut sregs);
        sregs.gdt = kvm_dtable {
            base: layout::GDT,
            limit: (size_of_val(&self.mode.gdt()) - 1) as u16,
            ..Default::default()
        };
        if self.mode == EntryMode::Linux64 {
            sregs.cs = kvm_segment {
                l: 1,
                db: 0,
                ..segment(CODE, 0xB)
            };
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME_LMA;
        }
        sregs
    }
}

/// Segment and control registers of an application processor at power-on, waiting for INIT.
#[must_use]
pub(super) fn power_on_sregs() -> kvm_sregs {
    let real = |type_| kvm_segment {
        limit: 0xFFFF,
        type_,
        present: 1,
        s: 1,
        ..Default::default()
    };
    let mut sregs = kvm_sregs {
        cs: kvm_segment {
            base: 0xFFFF_0000,
            selector: 0xF000,
            ..real(0xB)
        },
        ds: real(0x3),
        es: real(0x3),
        fs: real(0x3),
        gs: real(0x3),
        ss: real(0x3),
        cr0: CR0_ET | CR0_NW_CD,
        apic_base: machine::LAPIC_START | APIC_ENABLED,
        ..Default::default()
    };
    tables(&mut sregs);
    sregs.gdt.limit = 0xFFFF;
    sregs
}

/// x87 and SSE control words at power-on.
#[must_use]
pub(super) fn power_on_fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37F,
        mxcsr: 0x1F80,
        ..Default::default()
    }
}

/// Debug registers at power-on.
#[must_use]
pub(super) fn power_on_debug() -> kvm_debugregs {
    kvm_debugregs {
        dr6: 0xFFFF_0FF0,
        dr7: 0x400,
        ..Default::default()
    }
}

/// Brings the register page of local APIC `id` to power-on state (Intel SDM 3A, 11.4.7.1), keeping
/// its version. The id is written anew: a guest's x2APIC mode leaves it in another form, of which
/// KVM before Linux 6.3 makes nothing when the mode ends.
pub(super) fn power_on_lapic(page: &mut [std::ffi::c_char; 1024], id: u8) {
    let version = read(page, 0x30);
    page.fill(0);
    write(page, 0x20, u32::from(id) << 24);
    write(page, 0x30, version);
    write(page, 0xE0, 0xFFFF_FFFF); // destination format: flat
    write(page, 0xF0, 0xFF); // spurious vector, software disabled
    for lvt in [0x2F0, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370] {
        write(page, lvt, 1 << 16); // masked
    }
}

fn read(page: &[std::ffi::c_char; 1024], offset: usize) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|i| page[offset + i] as u8))
}

fn write(page: &mut [std::ffi::c_char; 1024], offset: usize, value: u32) {
    for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
        page[offset + i] = byte as std::ffi::c_char;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Intel SDM 3A, 3.4.5: what a processor would load from the descriptor.
    fn descriptor(segment: &kvm_segment) -> u64 {
        let flags = [
            (40, segment.type_),
            (44, segment.s),
            (45, segment.dpl),
            (47, segment.present),
            (52, segment.avl),
            (53, segment.l),
            (54, segment.db),
            (55, segment.g),
        ];
        let limit = u64::from(segment.limit >> 12);
        let base = segment.base & 0xFF_FFFF;
        flags.into_iter().fold(
            limit & 0xFFFF | limit >> 16 << 48 | base << 16,
            |bits, (at, flag)| bits | u64::from(flag) << at,
        )
    }

    #[test]
    fn a_kernel_finds_the_segments_it_runs_on_in_the_gdt() {
        for (mode, code) in [(EntryMode::Pvh, CODE_32), (EntryMode::Linux64, CODE_64)] {
            let sregs = Entry { mode, rip: 0 }.sregs();
            assert_eq!(usize::from(sregs.gdt.limit) + 1, size_of_val(&mode.gdt()));
            for segment in [sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss] {
                let entry = mode.gdt()[usize::from(segment.selector / 8)];
                assert_eq!(descriptor(&segment), entry, "{mode:?} {:#x}", segment.selector);
            }
            // Linux/x86 boot protocol, 64-bit: __BOOT_CS is 0x10, __BOOT_DS is 0x18.
            assert_eq!((sregs.cs.selector, sregs.ds.selector), (0x10, 0x18));
            assert_eq!(mode.gdt()[2], code);
        }
    }

    #[test]
    fn a_local_apic_that_was_in_x2apic_mode_has_its_id_in_the_old_place_again() {
        let mut page = [-1; 1024];
        write(&mut page, 0x20, 3); // as x2APIC mode has it
        write(&mut page, 0x30, 0x5_0014);
        power_on_lapic(&mut page, 3);
        assert_eq!(read(&page, 0x20), 3 << 24);
        assert_eq!(read(&page, 0x30), 0x5_0014);
        assert_eq!(read(&page, 0x80), 0, "task priority");
        assert_eq!(read(&page, 0x320), 1 << 16, "the timer is masked");
    }
}
