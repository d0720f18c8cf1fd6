//! Ports, interrupts and waiting.
#![expect(unsafe_code, reason = "port instructions and halting")]

use core::{
    arch::asm,
    sync::atomic::{AtomicU64, Ordering},
};
use guest_contract::machine;

unsafe extern "C" {
    static interrupt_count: AtomicU64;
    static mut idt: [u64; 128];
    static vector_counts: [AtomicU64; crate::boot::VECTORS as usize];
}

macro_rules! port {
    ($read:ident, $write:ident, $type:ty, $register:tt, $width:literal) => {
        #[doc = concat!("Reads ", $width, " bits from a port.")]
        pub(crate) fn $read(port: u16) -> $type {
            let value: $type;
            // SAFETY: no device of this machine writes to memory that Rust knows on a port read.
            unsafe { asm!(concat!("in ", $register, ", dx"), out($register) value, in("dx") port, options(nomem, nostack, preserves_flags)) };
            value
        }
        #[doc = concat!("Writes ", $width, " bits to a port.")]
        pub(crate) fn $write(port: u16, value: $type) {
            // SAFETY: no device of this machine changes memory that Rust knows on a port write.
            unsafe { asm!(concat!("out dx, ", $register), in($register) value, in("dx") port, options(nostack, preserves_flags)) };
        }
    };
}

port!(in8, out8, u8, "al", 8);
port!(in32, out32, u32, "eax", 32);

/// Interrupts taken so far, all vectors together.
pub(crate) fn interrupts() -> u64 {
    // SAFETY: defined in boot.s, eight bytes, written by interrupt entries only.
    unsafe { interrupt_count.load(Ordering::Acquire) }
}

/// Interrupts taken so far on device vector `index`.
pub(crate) fn vector_interrupts(index: u8) -> u64 {
    // SAFETY: defined in boot.s, one word a vector, written by interrupt entries only.
    unsafe { vector_counts[usize::from(index)].load(Ordering::Acquire) }
}

/// Halts until [`interrupts`] differs from `seen`; returns at once where it does already.
pub(crate) fn wait_for_interrupt(seen: u64) {
    // SAFETY: the fault's handler reads that one word, changes no register, and returns behind
    // the instruction.
    unsafe { asm!("hlt", in("rdi") &raw const interrupt_count, in("rsi") seen) }
}

/// Halts for ever, with interrupts on.
pub(crate) fn halt() -> ! {
    let never = 0_u64;
    loop {
        // SAFETY: as above; the word that it compares never changes.
        unsafe { asm!("hlt", in("rdi") &raw const never, in("rsi") never) }
    }
}

/// Raises an exception that has no handler, nor has its double fault.
pub(crate) fn triple_fault() -> ! {
    let table = &raw mut idt;
    // SAFETY: nothing that runs after this needs the table.
    unsafe { table.write_bytes(0, 1) };
    // SAFETY: does not return.
    unsafe { asm!("ud2", options(noreturn)) }
}

/// Time stamp counter.
pub(crate) fn time() -> u64 {
    // SAFETY: reading the counter has no effect on memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// ACPI S5.
pub(crate) fn power_off() -> ! {
    out8(machine::SLEEP_CONTROL, machine::SLEEP_S5);
    halt()
}

/// ACPI reset register.
pub(crate) fn reset() -> ! {
    out8(machine::RESET, machine::RESET_VALUE);
    halt()
}
