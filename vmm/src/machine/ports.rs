//! Ports that end, reset or signal: ACPI sleep and reset registers, the old reset ports, the
//! panic device and the generic event device.

use super::events::GuestEvent;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use vm_spec::machine;

/// SLP_EN of the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
/// 8042 command port and 'pulse reset line'.
const KEYBOARD_COMMAND: u16 = 0x64;
const PULSE_RESET: u8 = 0xFE;
/// Reset control register of PCI host bridges; bit 2 resets the CPU.
const RESET_CONTROL: u16 = 0xCF9;
const RESET_CPU: u8 = 1 << 2;
/// pvpanic: the guest panicked.
const PANICKED: u8 = 1;
/// Generic event device: power button.
const POWER_BUTTON: u8 = 1;
/// Generic event device: a look at the hot-plug registers.
const HOTPLUG: u8 = 1 << 1;
/// 8042 status: its input buffer is empty, so that a guest does not wait before it writes.
const KEYBOARD_READY: u8 = 0;

/// The platform's single-byte registers.
pub struct Ports {
    pending: AtomicU8,
    interrupt: EventFd,
}

impl Ports {
    /// Registers at power-on.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            pending: AtomicU8::new(0),
            interrupt: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        })
    }

    /// The eventfd that raises the generic event device's interrupt.
    #[must_use]
    pub fn interrupt(&self) -> BorrowedFd<'_> {
        self.interrupt.as_fd()
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// When the interrupt cannot be signalled.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.raise(POWER_BUTTON)
    }

    /// Tells the guest that the hot-plug registers have news.
    ///
    /// # Errors
    /// When the interrupt cannot be signalled.
    pub fn tell_of_hotplug(&self) -> io::Result<()> {
        self.raise(HOTPLUG)
    }

    fn raise(&self, event: u8) -> io::Result<()> {
        self.pending.fetch_or(event, Ordering::SeqCst);
        self.interrupt.write(1)?;
        Ok(())
    }

    /// Whether something happened that the guest has not read.
    #[must_use]
    pub fn has_unread_event(&self) -> bool {
        self.pending.load(Ordering::SeqCst) != 0
    }

    /// Raises the interrupt for what happened before.
    pub fn raise_again(&self) {
        // A full counter means that the signal is pending already.
        let _ = self.interrupt.write(1);
    }

    /// Back to power-on.
    pub fn reset(&self) {
        self.pending.store(0, Ordering::SeqCst);
    }

    /// A guest's read. None: not one of these ports.
    #[must_use]
    pub fn read(&self, port: u16) -> Option<u8> {
        match port {
            machine::GED_PORT => Some(self.pending.swap(0, Ordering::SeqCst)),
            machine::PVPANIC_PORT => Some(PANICKED),
            machine::SLEEP_CONTROL_PORT | machine::SLEEP_STATUS_PORT | machine::RESET_PORT => Some(0),
            KEYBOARD_COMMAND => Some(KEYBOARD_READY),
            RESET_CONTROL => Some(0),
            _ => None,
        }
    }

    /// A guest's write of one byte. `Some` when it ends this boot.
    #[must_use]
    pub fn write(&self, port: u16, value: u8) -> Option<GuestEvent> {
        match port {
            machine::SLEEP_CONTROL_PORT => {
                let kind = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                (value & SLEEP_ENABLE != 0 && kind == machine::S5_SLEEP_TYPE).then_some(GuestEvent::PowerOff)
            }
            machine::RESET_PORT => (value == machine::RESET_VALUE).then_some(GuestEvent::Reset),
            machine::PVPANIC_PORT => (value & PANICKED != 0).then_some(GuestEvent::Panic),
            KEYBOARD_COMMAND => (value == PULSE_RESET).then_some(GuestEvent::Reset),
            RESET_CONTROL => (value & RESET_CPU != 0).then_some(GuestEvent::Reset),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_register_ends_the_boot_its_own_way_and_only_with_its_value() {
        let ports = Ports::new().unwrap();
        let s5 = SLEEP_ENABLE | machine::S5_SLEEP_TYPE << SLEEP_TYPE_SHIFT;
        for (port, value, event) in [
            (machine::SLEEP_CONTROL_PORT, s5, GuestEvent::PowerOff),
            (machine::RESET_PORT, machine::RESET_VALUE, GuestEvent::Reset),
            (machine::PVPANIC_PORT, 1, GuestEvent::Panic),
            (KEYBOARD_COMMAND, PULSE_RESET, GuestEvent::Reset),
            (RESET_CONTROL, 6, GuestEvent::Reset),
        ] {
            assert_eq!(ports.write(port, 0), None, "{port:#x}");
            assert_eq!(ports.write(port, value), Some(event), "{port:#x}");
        }
        assert_eq!(ports.write(machine::SLEEP_CONTROL_PORT, s5 & !SLEEP_ENABLE), None);
    }

    #[test]
    fn a_pressed_power_button_is_read_once_and_raises_the_interrupt() {
        let ports = Ports::new().unwrap();
        ports.press_power_button().unwrap();
        assert_eq!(ports.interrupt.read().unwrap(), 1);
        assert_eq!(ports.read(machine::GED_PORT), Some(POWER_BUTTON));
        assert_eq!(ports.read(machine::GED_PORT), Some(0));
    }
}
