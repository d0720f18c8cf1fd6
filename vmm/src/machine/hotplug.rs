//! PCI hot-plug registers: which devices came, which are to go, and which the guest has let go of. The DSDT's
//! methods are their driver; the generic event device tells it to look.

use std::sync::atomic::{AtomicU32, Ordering};
use vm_spec::machine::{HOTPLUG_EJECT_PORT, HOTPLUG_PORT, HOTPLUG_REMOVAL_PORT, LAST_SLOT};

const LAST_PORT: u16 = HOTPLUG_PORT + 15;
/// Width of each register in bytes.
const WIDTH: usize = 4;

/// A register has a bit for each PCI device number.
#[must_use]
pub(super) fn bit(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0)
}

/// The registers.
pub struct Hotplug {
    /// Slots whose devices may come and go; 0: there are no such registers.
    slots: u32,
    inserted: AtomicU32,
    wanted: AtomicU32,
    /// What was ever wanted of the devices that are there.
    asked: AtomicU32,
}

impl Hotplug {
    /// Those of a machine with such `slots`, a bit each.
    #[must_use]
    pub fn new(slots: u32) -> Self {
        Self {
            slots,
            inserted: AtomicU32::new(0),
            wanted: AtomicU32::new(0),
            asked: AtomicU32::new(0),
        }
    }

    /// Whether the device in `slot` may come and go.
    #[must_use]
    pub fn has(&self, slot: u8) -> bool {
        self.slots & bit(slot) != 0
    }

    /// There is a new device in `slot`, of which nothing is wanted.
    pub fn insert(&self, slot: u8) {
        self.forget(bit(slot));
        self.inserted.fetch_or(bit(slot), Ordering::SeqCst);
    }

    /// The guest is to let go of the device in `slot`.
    pub fn ask_back(&self, slot: u8) {
        self.asked.fetch_or(bit(slot), Ordering::SeqCst);
        self.wanted.fetch_or(bit(slot), Ordering::SeqCst);
    }

    /// The device in `slot` is gone.
    pub fn emptied(&self, slot: u8) {
        self.forget(bit(slot));
    }

    fn forget(&self, slots: u32) {
        for register in [&self.inserted, &self.asked, &self.wanted] {
            register.fetch_and(!slots, Ordering::SeqCst);
        }
    }

    /// Back to power-on: a guest that boots looks at the bus itself, but knows nothing of what the last one was
    /// asked for. Whether there is such.
    #[must_use]
    pub fn reset(&self) -> bool {
        let asked = self.asked.load(Ordering::SeqCst);
        self.inserted.store(0, Ordering::SeqCst);
        self.wanted.store(asked, Ordering::SeqCst);
        asked != 0
    }

    /// A guest's read. False: the port is none of these.
    pub fn read(&self, port: u16, data: &mut [u8]) -> bool {
        if self.slots == 0 || !(HOTPLUG_PORT..=LAST_PORT).contains(&port) {
            return false;
        }
        // Only a read of the register's width: reading clears it.
        let register = match port {
            HOTPLUG_PORT if data.len() == WIDTH => &self.inserted,
            HOTPLUG_REMOVAL_PORT if data.len() == WIDTH => &self.wanted,
            _ => {
                data.fill(0);
                return true;
            }
        };
        data.copy_from_slice(&register.swap(0, Ordering::SeqCst).to_le_bytes());
        true
    }

    /// The slots that a guest's write lets go of: there is no more to say of them.
    pub fn ejected(&self, port: u16, data: &[u8]) -> impl Iterator<Item = u8> + use<> {
        let written = match <[u8; WIDTH]>::try_from(data) {
            Ok(bytes) if port == HOTPLUG_EJECT_PORT => u32::from_le_bytes(bytes) & self.slots,
            _ => 0,
        };
        self.forget(written);
        (0..=LAST_SLOT).filter(move |slot| written & bit(*slot) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(hotplug: &Hotplug, port: u16) -> u32 {
        let mut data = [0xFF; WIDTH];
        assert!(hotplug.read(port, &mut data));
        u32::from_le_bytes(data)
    }

    #[test]
    fn each_change_is_read_once_and_only_slots_of_the_machine_are_ejected() {
        let hotplug = Hotplug::new(1 << 2 | 1 << 31);
        hotplug.insert(2);
        hotplug.insert(31);
        hotplug.ask_back(2);
        // A narrow read takes nothing.
        let mut byte = [0xFF];
        assert!(hotplug.read(HOTPLUG_PORT, &mut byte));
        assert_eq!(byte, [0]);
        assert_eq!(read(&hotplug, HOTPLUG_PORT), 1 << 2 | 1 << 31);
        assert_eq!(read(&hotplug, HOTPLUG_PORT), 0);
        assert_eq!(read(&hotplug, HOTPLUG_REMOVAL_PORT), 1 << 2);
        assert_eq!(read(&hotplug, HOTPLUG_REMOVAL_PORT), 0);
        assert_eq!(read(&hotplug, LAST_PORT), 0);
        let ejected = |port, data: &[u8]| hotplug.ejected(port, data).collect::<Vec<_>>();
        assert_eq!(ejected(HOTPLUG_EJECT_PORT, &[0xFF; 4]), [2, 31]);
        assert!(ejected(HOTPLUG_EJECT_PORT, &[0xFF]).is_empty());
        assert!(ejected(HOTPLUG_PORT, &[0xFF; 4]).is_empty());
        hotplug.insert(2);
        assert!(!hotplug.reset());
        assert_eq!(read(&hotplug, HOTPLUG_PORT), 0);
        assert!(hotplug.has(31) && !hotplug.has(0) && !hotplug.has(32));
    }

    #[test]
    fn what_was_wanted_of_a_device_is_not_wanted_of_the_next() {
        let hotplug = Hotplug::new(1 << 2);
        let eject = || hotplug.ejected(HOTPLUG_EJECT_PORT, &4u32.to_le_bytes()).count();
        // The guest never heard that it was to go, and lets go of it all the same.
        hotplug.insert(2);
        hotplug.ask_back(2);
        assert_eq!(eject(), 1);
        assert_eq!(read(&hotplug, HOTPLUG_PORT), 0);
        assert_eq!(read(&hotplug, HOTPLUG_REMOVAL_PORT), 0);
        // Asked when it had gone already.
        hotplug.ask_back(2);
        hotplug.insert(2);
        assert_eq!(read(&hotplug, HOTPLUG_PORT), 1 << 2);
        assert_eq!(read(&hotplug, HOTPLUG_REMOVAL_PORT), 0);
        assert!(!hotplug.reset());
    }

    #[test]
    fn a_guest_that_boots_is_asked_for_what_the_last_one_kept() {
        let hotplug = Hotplug::new(1 << 2);
        hotplug.insert(2);
        hotplug.ask_back(2);
        assert_eq!(read(&hotplug, HOTPLUG_REMOVAL_PORT), 1 << 2);
        for _ in 0..2 {
            assert!(hotplug.reset());
            assert_eq!(read(&hotplug, HOTPLUG_PORT), 0);
            assert_eq!(read(&hotplug, HOTPLUG_REMOVAL_PORT), 1 << 2);
        }
        assert_eq!(
            hotplug.ejected(HOTPLUG_EJECT_PORT, &4u32.to_le_bytes()).count(),
            1
        );
        assert!(!hotplug.reset());
    }

    #[test]
    fn a_machine_without_such_slots_has_no_registers() {
        let hotplug = Hotplug::new(0);
        let mut data = [0x55; 4];
        assert!(!hotplug.read(HOTPLUG_PORT, &mut data));
        assert_eq!(data, [0x55; 4]);
        assert_eq!(hotplug.ejected(HOTPLUG_EJECT_PORT, &[0xFF; 4]).count(), 0);
    }
}
