//! What the transport must know of each virtio device type: nothing but its PCI class, the
//! sizes of its configuration space, and how many queues it has.

use super::mailbox::ConfigWrite;
use crate::frontend::{Error, MAX_QUEUES};
use std::ops::Range;

/// `sense_size` and `cdb_size` of SCSI (5.6.4).
const SCSI_SIZES: Range<usize> = 20..28;
/// `writeback` of a disk (5.2.4).
const BLK_WRITEBACK: usize = 32;

/// A virtio device id (virtio 1.3, 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct DeviceType(pub(super) u16);

impl DeviceType {
    pub(super) const NET: Self = Self(1);
    pub(super) const BLOCK: Self = Self(2);
    pub(super) const CONSOLE: Self = Self(3);
    const ENTROPY: Self = Self(4);
    const BALLOON: Self = Self(5);
    const SCSI: Self = Self(8);
    const P9: Self = Self(9);
    pub(super) const VSOCK: Self = Self(19);
    const CRYPTO: Self = Self(20);
    const IOMMU: Self = Self(23);
    const MEM: Self = Self(24);
    const SOUND: Self = Self(25);
    pub(super) const FS: Self = Self(26);
    const PMEM: Self = Self(27);
    const SCMI: Self = Self(32);
    const I2C: Self = Self(34);
    const CAN: Self = Self(36);
    const GPIO: Self = Self(41);
    const SPI: Self = Self(45);

    /// PCI class code (24 bits). Drivers match on the device id; this is for `lspci`.
    pub(super) fn class(self) -> u32 {
        match self {
            Self::NET => 0x02_0000,
            Self::BLOCK | Self::FS => 0x01_8000,
            Self::SCSI => 0x01_0000,
            Self::CONSOLE => 0x07_8000,
            Self::VSOCK => 0x02_8000,
            Self::CRYPTO => 0x10_8000,
            Self::SOUND => 0x04_0100,
            _ => 0x00_FF00,
        }
    }

    /// Sizes of the configuration space to ask a back end for, the best first: there is no
    /// message that tells the size, and a back end refuses more than it has. There are some that read beyond
    /// what they have instead, and give that to the guest. So nothing is guessed: `None` for types that are not
    /// known here.
    pub(super) fn config_sizes(self) -> Option<&'static [usize]> {
        Some(match self {
            Self::NET => &[24, 20, 12, 10, 8],
            Self::BLOCK => &[96, 60, 56, 36, 8],
            Self::CONSOLE => &[12, 8],
            Self::ENTROPY | Self::I2C | Self::SCMI => &[],
            // Its length is a tag's: the spec's configuration has it.
            Self::P9 => &[],
            Self::BALLOON => &[16, 12, 8],
            Self::SCSI => &[36],
            Self::VSOCK | Self::GPIO => &[8],
            Self::CRYPTO => &[64, 56],
            Self::SOUND => &[16, 12],
            Self::FS => &[44, 40],
            Self::PMEM => &[16],
            Self::IOMMU => &[40, 36],
            Self::MEM => &[56],
            Self::CAN => &[2],
            Self::SPI => &[32],
            _ => return None,
        })
    }

    /// Entries of a queue at most, where nobody says (queue_size of virtio 1.3, 4.1.4.3). Where it is less than for
    /// others, known back ends refuse more.
    pub(super) fn queue_size(self) -> u16 {
        match self {
            Self::SOUND | Self::CAN => 64,
            Self::SCSI | Self::CONSOLE => 128,
            _ => 256,
        }
    }

    /// Whether what a driver writes to the configuration space stays as it was written. A console's is an
    /// act: a character (5.3.4).
    pub(super) fn keeps_writes(self) -> bool {
        self != Self::CONSOLE
    }

    /// Whether a write goes no further. SCSI's sizes are such: other monitors keep them to themselves, and
    /// there are back ends that end at the word of them. Linux's driver writes what they are by default.
    pub(super) fn ignores(self, write: &ConfigWrite) -> bool {
        let range = write.range();
        self == Self::SCSI && SCSI_SIZES.start <= range.start && range.end <= SCSI_SIZES.end
    }

    /// Does to `config` what a write is expected to do. That a disk has no cache (5.2.5) is not shown before
    /// it is so: the driver would not flush what is written until then.
    pub(super) fn foresee(self, write: &ConfigWrite, config: &mut [u8]) {
        let cache = config.get(BLK_WRITEBACK).copied();
        write.apply(config);
        if self == Self::BLOCK
            && let (Some(now @ 0), Some(before)) = (config.get_mut(BLK_WRITEBACK), cache)
        {
            *now = before;
        }
    }

    /// Queues by the device's chapter in virtio 1.3, where `config` and what is offered say or the type
    /// fixes it.
    pub(super) fn queues(self, features: u64, config: &[u8]) -> Option<u16> {
        let word = |offset: usize| {
            let bytes = config.get(offset..offset + 4)?;
            Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        };
        let clamp = |count: u32| count.min(MAX_QUEUES.into()) as u16;
        match self {
            Self::ENTROPY | Self::PMEM | Self::I2C | Self::SPI => Some(1),
            // requestq, and with VIRTIO_GPIO_F_IRQ eventq (5.18.2).
            Self::GPIO => Some(1 + (features & 1) as u16),
            Self::VSOCK => Some(3),
            Self::SOUND => Some(4),
            // hiprio, with VIRTIO_FS_F_NOTIFICATION one for that, then the request queues (5.11.2; a
            // space without the number has one).
            Self::FS => Some(clamp(
                word(36).unwrap_or(1).clamp(1, 255) + 1 + (features & 1) as u32,
            )),
            // controlq and eventq, then num_queues (5.6.2).
            Self::SCSI => word(0).map(|n| clamp(n.clamp(1, 254) + 2)),
            // max_dataqueues, then controlq (5.9.2).
            Self::CRYPTO => word(4).map(|n| clamp(n.clamp(1, 255) + 1)),
            _ => None,
        }
    }

    /// Whether a queue carries requests, each of which ends by itself: in others buffers wait for what comes.
    pub(super) fn has_requests(self, queue: u16, features: u64) -> bool {
        match self {
            Self::BLOCK => true,
            // All but the notifications', and all but the events'.
            Self::FS => queue != 1 || features & 1 == 0,
            Self::SCSI => queue != 1,
            _ => false,
        }
    }

    /// The last queues that the type must show but a back end need not serve: nobody waits for
    /// them. Vsock's event queue is such a one: QEMU's back ends never see it.
    pub(super) fn required(self, queues: u16) -> u16 {
        if self == Self::VSOCK { 2 } else { queues }
    }

    /// Checks what `limit` queues of a back end mean for a device of `queues` queues.
    pub(super) fn served(self, queues: u16, limit: Option<u64>) -> Result<u16, Error> {
        let served = limit.map_or(queues, |limit| limit.min(queues.into()) as u16);
        let needed = self.required(queues);
        match limit {
            Some(offered) if served < needed => Err(Error::Queues { offered, needed }),
            _ => Ok(served),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_type_with_a_name_in_specs_is_asked_at_random() {
        for named in [
            1, 2, 3, 4, 5, 8, 9, 19, 20, 23, 24, 25, 26, 27, 32, 34, 36, 41, 45,
        ] {
            assert!(DeviceType(named).config_sizes().is_some(), "{named}");
        }
        assert_eq!(DeviceType::CAN.config_sizes(), Some(&[2][..]));
        assert_eq!(DeviceType(63).config_sizes(), None);
    }
}
