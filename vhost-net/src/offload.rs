//! Which offloads the driver acknowledged, as the header check and the TAP need them.

use crate::header::{GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MRG_RXBUF,
};

/// `TUNSETOFFLOAD` argument: what the reader of the TAP can take unfinished (linux/if_tun.h).
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct TunOffload(u32);

impl TunOffload {
    /// Frames whose checksum is still to be computed.
    pub const CSUM: Self = Self(0x01);
    /// TCP over IPv4 super-frames.
    pub const TSO4: Self = Self(0x02);
    /// TCP over IPv6 super-frames.
    pub const TSO6: Self = Self(0x04);
    /// TCP super-frames with ECN.
    pub const TSO_ECN: Self = Self(0x08);
    /// Both kinds of UDP super-frames: the kernel takes them together or not at all.
    pub const USO: Self = Self(0x60);
    /// All that kernels before 6.2 know.
    pub const TCP: Self = Self(0x0f);

    /// The bits.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }

    /// The set of these bits, as far as they mean something.
    #[must_use]
    pub fn from_bits(bits: u32) -> Self {
        Self(bits & Self::TCP.with(Self::USO).0)
    }

    /// All of `other` is in this set, too.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// Both sets together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// Offload feature bits that need nothing but a TAP with virtio-net headers.
pub const TCP_FEATURES: u64 = bit(VIRTIO_NET_F_CSUM)
    | bit(VIRTIO_NET_F_GUEST_CSUM)
    | bit(VIRTIO_NET_F_GUEST_TSO4)
    | bit(VIRTIO_NET_F_GUEST_TSO6)
    | bit(VIRTIO_NET_F_GUEST_ECN)
    | bit(VIRTIO_NET_F_HOST_TSO4)
    | bit(VIRTIO_NET_F_HOST_TSO6)
    | bit(VIRTIO_NET_F_HOST_ECN);

/// Offload feature bits that need a kernel with UDP segmentation on TAPs (6.2).
pub const USO_FEATURES: u64 =
    bit(VIRTIO_NET_F_GUEST_USO4) | bit(VIRTIO_NET_F_GUEST_USO6) | bit(VIRTIO_NET_F_HOST_USO);

/// The acknowledged features, asked by what they allow.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Offloads {
    features: u64,
}

impl Offloads {
    /// The offloads in an acknowledged feature set.
    #[must_use]
    pub fn new(features: u64) -> Self {
        Self { features }
    }

    fn has(self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }

    /// The device may leave checksums to the kernel (VIRTIO_NET_F_CSUM).
    #[must_use]
    pub fn host_csum(&self) -> bool {
        self.has(VIRTIO_NET_F_CSUM)
    }

    /// The driver takes frames with unfinished checksums (VIRTIO_NET_F_GUEST_CSUM).
    #[must_use]
    pub fn guest_csum(&self) -> bool {
        self.has(VIRTIO_NET_F_GUEST_CSUM)
    }

    /// Received frames may span several buffers (VIRTIO_NET_F_MRG_RXBUF).
    #[must_use]
    pub fn mergeable(&self) -> bool {
        self.has(VIRTIO_NET_F_MRG_RXBUF)
    }

    /// The driver may send super-frames of this `gso_type`.
    #[must_use]
    pub fn host_segments(&self, gso_type: u8) -> bool {
        let ecn = gso_type & GSO_ECN != 0;
        let known = match gso_type & !GSO_ECN {
            GSO_TCPV4 => self.has(VIRTIO_NET_F_HOST_TSO4),
            GSO_TCPV6 => self.has(VIRTIO_NET_F_HOST_TSO6),
            GSO_UDP_L4 => !ecn && self.has(VIRTIO_NET_F_HOST_USO),
            _ => false,
        };
        known && (!ecn || self.has(VIRTIO_NET_F_HOST_ECN))
    }

    /// What the TAP may leave unfinished for this driver.
    #[must_use]
    pub fn tun(&self) -> TunOffload {
        if !self.guest_csum() {
            return TunOffload::default();
        }
        let uso = self.has(VIRTIO_NET_F_GUEST_USO4) && self.has(VIRTIO_NET_F_GUEST_USO6);
        let tso = self.has(VIRTIO_NET_F_GUEST_TSO4) || self.has(VIRTIO_NET_F_GUEST_TSO6);
        [
            (self.has(VIRTIO_NET_F_GUEST_TSO4), TunOffload::TSO4),
            (self.has(VIRTIO_NET_F_GUEST_TSO6), TunOffload::TSO6),
            // The kernel refuses ECN without TSO.
            (tso && self.has(VIRTIO_NET_F_GUEST_ECN), TunOffload::TSO_ECN),
            (uso, TunOffload::USO),
        ]
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(TunOffload::CSUM, |all, (_, one)| all.with(one))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tap_gets_what_the_driver_acknowledged() {
        assert_eq!(Offloads::new(0).tun().bits(), 0);
        assert_eq!(Offloads::new(TCP_FEATURES).tun(), TunOffload::TCP);
        let all = TCP_FEATURES | USO_FEATURES;
        assert_eq!(Offloads::new(all).tun().bits(), 0x6f);
        let one_kind_of_uso = all & !bit(VIRTIO_NET_F_GUEST_USO6);
        assert_eq!(Offloads::new(one_kind_of_uso).tun(), TunOffload::TCP);
        let no_checksums = all & !bit(VIRTIO_NET_F_GUEST_CSUM);
        assert_eq!(Offloads::new(no_checksums).tun().bits(), 0);
    }

    #[test]
    fn ecn_needs_its_own_feature_and_tcp() {
        let no_ecn = Offloads::new(TCP_FEATURES & !bit(VIRTIO_NET_F_HOST_ECN));
        assert!(no_ecn.host_segments(GSO_TCPV4));
        assert!(!no_ecn.host_segments(GSO_TCPV4 | GSO_ECN));
        let all = Offloads::new(u64::MAX);
        assert!(all.host_segments(GSO_TCPV6 | GSO_ECN));
        assert!(!all.host_segments(GSO_UDP_L4 | GSO_ECN));
    }
}
