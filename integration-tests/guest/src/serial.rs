//! COM1, by polling nothing: the machine's 16550 takes a byte at any time.

use crate::cpu;
use core::fmt;
use guest_contract::machine::COM1;

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
