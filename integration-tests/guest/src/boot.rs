//! From the PVH entry (32-bit protected mode, paging off) to ring 3 of long mode.
//!
//! Ring 0 code is slow on software KVM (emulated), ring 3 runs natively: so ring 0 does the least
//! it can. Page tables and descriptor tables are laid out by the assembler. Afterwards
//! ring 0 holds interrupt entries (count, end of interrupt, return) and the halt of
//! [`crate::cpu::wait_for_interrupt`]. Ring 3 reaches ports by the TSS's I/O map: software KVM
//! does not keep IOPL over `iretq`, nor does its `syscall` change the privilege level.
//!
//! ```text
//!  GDT  08 code, ring 0   10 data, ring 0   18 data, ring 3   20 code, ring 3   28 TSS
//!  IDT  00-1F exceptions (fatal)   30-3E MSI-X   3F spurious
//!  map  0-4 GiB identity, 2 MiB pages, all of it open to ring 3
//! ```
#![expect(unsafe_code, reason = "the entry point of a bare-metal program")]

use crate::{cpu, mmio::Address, scenario, serial};
use core::arch::global_asm;

global_asm!(include_str!("boot.s"), options(att_syntax));

/// The first vector that devices may use; [`VECTORS`] of them.
pub(crate) const FIRST_VECTOR: u8 = 0x30;
/// Vectors for devices.
pub(crate) const VECTORS: u8 = 15;

/// Called in ring 3, interrupts on, with the physical address of PVH's `hvm_start_info`.
#[unsafe(no_mangle)]
extern "C" fn user_main(start_info: u64) -> ! {
    // struct hvm_start_info: magic, version, flags, nr_modules (32 bits each), modlist_paddr,
    // cmdline_paddr (64 bits each).
    let start_info = Address(start_info);
    let magic = start_info.read32(0);
    let command_line = u64::from(start_info.read32(24)) | u64::from(start_info.read32(28)) << 32;
    if magic != 0x336E_C578 {
        serial::line!("result=fail no PVH start info");
        cpu::power_off();
    }
    let mut text: &[u8] = &[];
    if command_line != 0 {
        // SAFETY: cmdline_paddr is 0 or a string with its closing zero, which nobody writes to.
        text = unsafe { core::ffi::CStr::from_ptr(command_line as *const core::ffi::c_char) }.to_bytes();
    }
    scenario::run(core::str::from_utf8(text).unwrap_or(""))
}

/// Called in ring 0 for every exception, with the address of what the processor pushed (an error
/// code first, where the exception has one); none is expected.
#[unsafe(no_mangle)]
extern "C" fn exception(vector: u64, frame: u64) -> ! {
    let frame = Address(frame);
    let words = [frame.read32(0), frame.read32(8), frame.read32(16)];
    serial::line!(
        "result=fail exception {vector} frame {:x} {:x} {:x}",
        words[0],
        words[1],
        words[2]
    );
    cpu::power_off()
}
