//! The one piece of firmware: what a jump to the real-mode reset vector runs.

use super::BootError;
use crate::memory::{GuestRam, layout};
use vm_memory::{Bytes, GuestAddress};
use vm_spec::machine;

/// Writes code that resets the machine by its ACPI reset register.
pub(super) fn write(ram: &GuestRam) -> Result<(), BootError> {
    let [low, high] = machine::RESET_PORT.to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; again: hlt; jmp again
    let code = [
        0xBA,
        low,
        high,
        0xB0,
        machine::RESET_VALUE,
        0xEE,
        0xF4,
        0xEB,
        0xFD,
    ];
    Ok(ram
        .memory()
        .write_slice(&code, GuestAddress(layout::RESET_VECTOR))?)
}
