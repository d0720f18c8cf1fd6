//! Function 00:00.0. Linux takes configuration mechanism 1 for real only when it finds a host
//! bridge (or VGA, or an Intel device) on bus 0.

use super::Function;
use super::config_space::{ConfigSpace, Identity};
use std::sync::{Mutex, PoisonError};

/// A host bridge with no resource of its own.
#[derive(Debug)]
pub struct HostBridge {
    space: Mutex<ConfigSpace>,
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
    /// The bridge at power-on.
    #[must_use]
    pub fn new() -> Self {
        Self {
            space: Mutex::new(ConfigSpace::new(POWER_ON)),
        }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl Function for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.space
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.space
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
    }

    fn finish_reset(&self) {
        *self.space.lock().unwrap_or_else(PoisonError::into_inner) = ConfigSpace::new(POWER_ON);
    }
}
