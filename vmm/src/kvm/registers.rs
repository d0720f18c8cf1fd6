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

/// Flat segments as both protocols want them; the descriptors lie at [`layout::GDT`].
pub const GDT_TABLE: [u64; 5] = [
    0,
    0,
    0x00CF_9B00_0000_FFFF, // 0x10: 32-bit code, 4 GiB
    0x00CF_9300_0000_FFFF, // 0x18: data, 4 GiB
    0x00AF_9B00_0000_FFFF, // 0x20: 64-bit code
];

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
        let data = segment(0x18, 0x3);
        let mut sregs = kvm_sregs {
            cs: segment(0x10, 0xB),
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
            limit: (size_of_val(&GDT_TABLE) - 1) as u16,
            ..Default::default()
        };
        if self.mode == EntryMode::Linux64 {
            sregs.cs = kvm_segment {
                l: 1,
                db: 0,
                ..segment(0x20, 0xB)
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
