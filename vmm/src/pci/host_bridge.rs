//! Function 00:00.0. Linux takes configuration mechanism 1 for real only when it finds a host
//! bridge (or VGA, or an Intel device) on bus 0.

use super::Function;
use super::config_space::{ConfigSpace, Identity};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};
use vm_spec::machine::STATUS_REGISTER;

/// Vendor-specific (PCI 3.0, appendix H), with the body: its length, which of ours it is, the exit status.
const VENDOR_SPECIFIC: u8 = 0x09;
const STATUS_CAPABILITY: [u8; 6] = [8, 0, 0, 0, 0, 0];
/// The status, with a bit that tells it from none.
const WRITTEN: u16 = 1 << 8;

/// A host bridge with no resource of its own.
#[derive(Debug)]
pub struct HostBridge {
    space: Mutex<ConfigSpace>,
    takes_status: bool,
    status: AtomicU16,
}

const POWER_ON: Identity = Identity {
    // Red Hat's generic PCI Express host bridge, which no operating system has quirks for.
    vendor: 0x1B36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0,
    subsystem: 0,
};

impl HostBridge {
    /// The bridge at power-on. `takes_status`: with the register that a command's exit status is written to.
    #[must_use]
    pub fn new(takes_status: bool) -> Self {
        Self {
            space: Mutex::new(power_on(takes_status)),
            takes_status,
            status: AtomicU16::new(0),
        }
    }

    /// The exit status that was written since the last look.
    pub(super) fn take_status(&self) -> Option<u8> {
        let [status, written] = self.status.swap(0, Ordering::Relaxed).to_le_bytes();
        (written != 0).then_some(status)
    }
}

fn power_on(takes_status: bool) -> ConfigSpace {
    let mut space = ConfigSpace::new(POWER_ON);
    if takes_status {
        space.add_capability(VENDOR_SPECIFIC, &STATUS_CAPABILITY, &[0; STATUS_CAPABILITY.len()]);
    }
    space
}

impl Function for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.space
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let place = STATUS_REGISTER.checked_sub(offset).map(usize::from);
        if self.takes_status
            && let Some(status) = place.and_then(|place| data.get(place))
        {
            self.status.store(WRITTEN | u16::from(*status), Ordering::Relaxed);
        }
        self.space
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
    }

    fn finish_reset(&self) {
        *self.space.lock().unwrap_or_else(PoisonError::into_inner) = power_on(self.takes_status);
        self.status.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_taken_once_and_only_where_there_is_a_register() {
        let bridge = HostBridge::new(true);
        let mut capability = [0; 8];
        bridge.config_read(0x40, &mut capability);
        assert_eq!(capability, [VENDOR_SPECIFIC, 0, 8, 0, 0, 0, 0, 0]);
        assert_eq!(bridge.take_status(), None);
        bridge.config_write(STATUS_REGISTER, &[0]);
        assert_eq!(bridge.take_status(), Some(0));
        assert_eq!(bridge.take_status(), None);
        bridge.config_write(0x42, &[1, 2, 255, 4]);
        assert_eq!(bridge.take_status(), Some(255));
        bridge.config_write(0x45, &[1]);
        bridge.config_write(0x40, &[1; 4]);
        assert_eq!(bridge.take_status(), None);
        bridge.config_write(STATUS_REGISTER, &[1]);
        bridge.finish_reset();
        assert_eq!(bridge.take_status(), None);

        let without = HostBridge::new(false);
        without.config_write(STATUS_REGISTER, &[1]);
        assert_eq!(without.take_status(), None);
        without.config_read(0x40, &mut capability);
        assert_eq!(capability, [0; 8]);
    }
}
