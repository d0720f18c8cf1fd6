//! The registers that a driver sees (virtio 1.3, 4.1.4.3) and the device status machine
//! (2.1, 3.1). Only state: what a write causes is returned as an [`Effect`].
//!
//! ```text
//! 0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK (judged here) -> DRIVER_OK -> Effect::Start
//! ^                                                              |
//! |  rings drained by the device's thread                        | status = 0
//! +------------------------ resetting (reads non-zero) <---------+   Effect::Drain
//! ```

use super::queue::QueueRegisters;
use crate::frontend::MemoryTable;
use crate::pci::NO_VECTOR;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};

const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// Bits that a driver may set.
const DRIVER_BITS: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8
    | VIRTIO_CONFIG_S_DRIVER as u8
    | FEATURES_OK
    | DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED as u8;
/// ISR status: the configuration has changed (4.1.4.5).
const ISR_CONFIG: u8 = 1 << 1;

/// Bytes of `struct virtio_pci_common_cfg`.
pub(super) const COMMON_SIZE: usize = 64;

/// What a write to the registers asks of the rest of the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// `config_msix_vector` was written.
    ConfigVector(u16),
    /// `queue_msix_vector` was written.
    QueueVector {
        /// The queue.
        queue: u16,
        /// The new vector.
        vector: u16,
    },
    /// A queue was enabled: its doorbell works from now on.
    Enabled(u16),
    /// DRIVER_OK: start the enabled queues.
    Start,
    /// Reset with no ring running: done at once.
    Cleared,
    /// Reset with rings running: drain them, then call [`Registers::clear`].
    Drain,
}

/// All registers but MSI-X's.
pub(super) struct Registers {
    offered: u64,
    /// What is offered from the next reset on.
    offered_next: u64,
    pub(super) config: Vec<u8>,
    pub(super) queues: Vec<QueueRegisters>,
    /// Entries of a queue at most.
    queue_size: u16,
    pub(super) config_vector: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    /// Words of features, a bit each, past the two that exist here in which the driver acknowledged one; the
    /// highest bit is for all words from there on.
    unknown_features: u64,
    queue_select: u16,
    status: u8,
    generation: u8,
    /// The driver has read of the configuration since it changed.
    config_read: bool,
    isr: u8,
    resetting: bool,
}

impl Registers {
    pub(super) fn new(offered: u64, config: Vec<u8>, queues: u16, queue_size: u16) -> Self {
        Self {
            offered,
            offered_next: offered,
            config,
            queues: vec![QueueRegisters::new(queue_size); queues.into()],
            queue_size,
            config_vector: NO_VECTOR,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            unknown_features: 0,
            queue_select: 0,
            status: 0,
            generation: 0,
            config_read: false,
            isr: 0,
            resetting: false,
        }
    }

    /// Features that the driver accepted; final once it has set DRIVER_OK.
    pub(super) fn driver_features(&self) -> u64 {
        self.driver_features
    }

    /// The common configuration structure as the driver reads it.
    pub(super) fn common(&self) -> [u8; COMMON_SIZE] {
        let mut bytes = [0; COMMON_SIZE];
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        };
        put(0, &self.device_feature_select.to_le_bytes());
        put(4, &window(self.offered, self.device_feature_select).to_le_bytes());
        put(8, &self.driver_feature_select.to_le_bytes());
        put(
            12,
            &window(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(16, &self.config_vector.to_le_bytes());
        put(18, &(self.queues.len() as u16).to_le_bytes());
        put(20, &[self.status, self.generation]);
        put(22, &self.queue_select.to_le_bytes());
        match self.queues.get(usize::from(self.queue_select)) {
            Some(queue) => {
                put(24, &queue.size.to_le_bytes());
                put(26, &queue.vector.to_le_bytes());
                put(28, &u16::from(queue.enabled.is_some()).to_le_bytes());
                put(30, &self.queue_select.to_le_bytes());
                for (i, area) in queue.areas.iter().enumerate() {
                    put(32 + 8 * i, &area.to_le_bytes());
                }
            }
            // A queue size of 0 says that there is no such queue.
            None => put(26, &NO_VECTOR.to_le_bytes()),
        }
        bytes
    }

    /// A driver's write to the common configuration. Each field has its own width (4.1.3.1), 64
    /// bits being two of 32 or one; all else is ignored, and so is everything during a reset.
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8], memory: &MemoryTable) -> Effect {
        if self.resetting {
            return Effect::None;
        }
        match *data {
            [value] if offset == 20 => return self.write_status(value),
            [a, b] => return self.write_half_word(offset, u16::from_le_bytes([a, b]), memory),
            [a, b, c, d] => self.write_word(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset.is_multiple_of(8) && offset >= 32 => {
                self.write_word(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_word(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Effect::None
    }

    fn write_word(&mut self, offset: u64, value: u32) {
        match offset {
            0 => self.device_feature_select = value,
            8 => self.driver_feature_select = value,
            12 if self.status & FEATURES_OK == 0 => match self.driver_feature_select {
                0 => self.driver_features = self.driver_features & !0xFFFF_FFFF | u64::from(value),
                1 => self.driver_features = self.driver_features & 0xFFFF_FFFF | u64::from(value) << 32,
                word => {
                    let bit = 1 << word.min(u64::BITS - 1);
                    self.unknown_features = self.unknown_features & !bit | if value == 0 { 0 } else { bit };
                }
            },
            32 | 36 | 40 | 44 | 48 | 52 => {
                if let Some(queue) = self.idle_queue() {
                    let area = &mut queue.areas[((offset - 32) / 8) as usize];
                    *area = match offset % 8 {
                        0 => *area & !0xFFFF_FFFF | u64::from(value),
                        _ => *area & 0xFFFF_FFFF | u64::from(value) << 32,
                    };
                }
            }
            _ => {}
        }
    }

    fn write_half_word(&mut self, offset: u64, value: u16, memory: &MemoryTable) -> Effect {
        let queue = self.queue_select;
        match offset {
            16 => return Effect::ConfigVector(value),
            22 => self.queue_select = value,
            24 => {
                let most = self.queue_size;
                if let Some(queue) = self.idle_queue() {
                    queue.resize(value, most);
                }
            }
            26 if usize::from(queue) < self.queues.len() => {
                return Effect::QueueVector { queue, vector: value };
            }
            28 if value == 1 && self.enable_queue(memory) => return Effect::Enabled(queue),
            _ => {}
        }
        Effect::None
    }

    /// Queues are enabled between FEATURES_OK and DRIVER_OK (3.1.1).
    fn enable_queue(&mut self, memory: &MemoryTable) -> bool {
        let set_up = self.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        set_up && self.idle_queue().is_some_and(|queue| queue.enable(memory))
    }

    /// The selected queue, when it may be changed.
    fn idle_queue(&mut self) -> Option<&mut QueueRegisters> {
        let queue = self.queues.get_mut(usize::from(self.queue_select))?;
        queue.enabled.is_none().then_some(queue)
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            if self.status & DRIVER_OK != 0 {
                self.resetting = true;
                return Effect::Drain;
            }
            self.clear();
            return Effect::Cleared;
        }
        // A driver only adds bits (2.1.1).
        let mut added = value & DRIVER_BITS & !self.status;
        if added & FEATURES_OK != 0 && !self.features_acceptable() {
            added &= !FEATURES_OK;
        }
        if (self.status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
        }
        self.status |= added;
        if added & DRIVER_OK != 0 {
            Effect::Start
        } else {
            Effect::None
        }
    }

    fn features_acceptable(&self) -> bool {
        let version_1 = self.driver_features >> VIRTIO_F_VERSION_1 & 1 != 0;
        version_1 && self.unknown_features == 0 && self.driver_features & !self.offered == 0
    }

    /// Begins a reset from outside. True: rings may be running.
    pub(super) fn begin_reset(&mut self) -> bool {
        self.resetting = true;
        self.status & DRIVER_OK != 0
    }

    /// Whether a reset has begun and is not done.
    pub(super) fn is_resetting(&self) -> bool {
        self.resetting
    }

    /// From the next reset on these features are offered: what a driver has seen stays as it is.
    pub(super) fn offer_next(&mut self, features: u64) {
        self.offered_next = features;
    }

    /// Everything back to its first value but the offer, the configuration and its generation.
    pub(super) fn clear(&mut self) {
        let fresh = Self::new(
            self.offered_next,
            std::mem::take(&mut self.config),
            self.queues.len() as u16,
            self.queue_size,
        );
        *self = Self {
            generation: self.generation,
            config_read: self.config_read,
            ..fresh
        };
    }

    /// The device is of no use until it is reset (2.1.2). True: the driver must be told.
    pub(super) fn set_needs_reset(&mut self) -> bool {
        self.status |= NEEDS_RESET;
        self.note_config_change()
    }

    /// Takes over a configuration. True: it has changed. Its generation does where the driver can have seen the
    /// one before (4.1.4.3.1): counted otherwise, 256 changes between two reads would be none.
    pub(super) fn set_config(&mut self, config: Vec<u8>) -> bool {
        let changed = self.config != config;
        if changed {
            self.config = config;
            let seen = std::mem::take(&mut self.config_read);
            self.generation = self.generation.wrapping_add(seen.into());
        }
        changed
    }

    /// Notes a configuration change in the ISR. True: the driver must be told.
    pub(super) fn note_config_change(&mut self) -> bool {
        self.isr |= ISR_CONFIG;
        self.status & DRIVER_OK != 0
    }

    /// ISR status; reading clears it.
    pub(super) fn take_isr(&mut self) -> u8 {
        std::mem::take(&mut self.isr)
    }

    /// The device-specific configuration, any width and alignment; past its end it is zero.
    pub(super) fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.config_read = true;
        for (byte, at) in data.iter_mut().zip(offset..) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            *byte = self.config.get(at).copied().unwrap_or(0);
        }
    }

    /// Whether a driver's write to the configuration is to be passed on.
    pub(super) fn accepts_config_write(&self, offset: u64, length: usize) -> bool {
        let end = usize::try_from(offset)
            .ok()
            .and_then(|offset| offset.checked_add(length));
        !self.resetting && end.is_some_and(|end| end <= self.config.len())
    }
}

/// The 32 bits of `features` that `select` names; past 64 there are none.
fn window(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_counts_once_until_it_was_read() {
        let mut registers = Registers::new(0, vec![0], 1, 256);
        let generation = |registers: &Registers| registers.common()[21];
        registers.read_config(0, &mut [0]);
        let before = generation(&registers);
        for change in 1..=256u16 {
            assert!(registers.set_config(vec![change as u8]));
        }
        assert_ne!(generation(&registers), before);
        let first = generation(&registers);
        registers.read_config(0, &mut [0]);
        registers.set_config(vec![7]);
        assert_ne!(generation(&registers), first);
    }
}
