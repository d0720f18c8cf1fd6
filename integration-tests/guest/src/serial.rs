//! COM1. Output polls nothing: the machine's 16550 takes a byte at any time. Input comes by
//! interrupt, so that waiting for it makes no exit.

use crate::{
    boot::{FIRST_VECTOR, VECTORS},
    cpu,
    mmio::Address,
};
use core::fmt;
use guest_contract::machine::{COM1, COM1_GSI, IO_APIC};

/// Writes to COM1.
pub(crate) struct Com1;

impl fmt::Write for Com1 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            cpu::out8(COM1, byte);
        }
        Ok(())
    }
}

/// Prints one line on COM1.
macro_rules! line {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        // Com1 never fails.
        let _ = writeln!($crate::serial::Com1, $($argument)*);
    }};
}
pub(crate) use line;

/// Whether a byte came from the console since [`listen`], as its interrupt tells: no exit.
pub(crate) fn heard() -> bool {
    cpu::vector_interrupts(VECTORS - 1) != 0
}

/// Makes bytes from the console come by interrupt.
pub(crate) fn listen() {
    // The I/O APIC's redirection entry: the last device vector, edge, to APIC 0.
    let io_apic = Address(IO_APIC);
    let entry = 0x10 + COM1_GSI * 2;
    for (register, value) in [(entry + 1, 0), (entry, u32::from(FIRST_VECTOR + VECTORS - 1))] {
        io_apic.write32(0, register);
        io_apic.write32(0x10, value);
    }
    cpu::out8(COM1 + 1, 1);
}

/// Waits, halted, for a byte from the console.
pub(crate) fn wait_for_byte() -> u8 {
    listen();
    loop {
        let seen = cpu::interrupts();
        if cpu::in8(COM1 + 5) & 1 != 0 {
            return cpu::in8(COM1);
        }
        cpu::wait_for_interrupt(seen);
    }
}
