//! Stops a guest's virtio-net header from describing anything beyond its own frame.
//!
//! The kernel trusts the header that precedes a frame on a TAP for where checksums go and how a
//! frame is cut into segments. [`TxHeader`] can only be made by a check against the frame and the
//! negotiated features, and only a [`TxHeader`] is ever written to the TAP (virtio 1.3, 5.1.6).

use crate::offload::Offloads;
use zerocopy::byteorder::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of `struct virtio_net_hdr` with `num_buffers`, as VERSION_1 has it always.
pub const HEADER_SIZE: usize = 12;
/// Bytes of an Ethernet header without tags.
pub const ETHERNET_HEADER: usize = 14;
/// Longest frame either way: the largest IPv6 packet behind an Ethernet header with one tag.
pub const MAX_FRAME: usize = ETHERNET_HEADER + 4 + 40 + 65535;

/// Bytes of a TCP header's longest options.
const MOST_TCP_OPTIONS: usize = 40;

/// Most segments of one frame: those of the longest packet at the least MTU of IPv4 (RFC 791, 68 bytes),
/// 28 bytes each. The host cuts a frame while it takes it, so without a bound one byte each would make
/// 65,000 packets of one. Not a least size: what a guest cuts small, it cuts into few.
pub const MOST_SEGMENTS: usize = 65535_usize.div_ceil(68 - 20 - 20);

/// `flags`: the checksum is still to be computed.
pub const F_NEEDS_CSUM: u8 = 1;
/// `gso_type`: not segmented.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: UDP, one datagram a segment.
pub const GSO_UDP_L4: u8 = 5;
/// `gso_type`, ORed in: the TCP segments carry ECN.
pub const GSO_ECN: u8 = 0x80;

/// `struct virtio_net_hdr` with `num_buffers`, in the device's (little-endian) byte order.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct NetHeader {
    /// `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`.
    pub gso_type: u8,
    /// Bytes of headers, a hint, where `gso_type` is set.
    pub hdr_len: U16,
    /// Bytes of payload in each segment.
    pub gso_size: U16,
    /// Where the checksummed part starts in the frame.
    pub csum_start: U16,
    /// Where the checksum is, counted from `csum_start`.
    pub csum_offset: U16,
    /// Receive only: buffers that this frame occupies.
    pub num_buffers: U16,
}

/// Why a frame's header was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HeaderError {
    /// The frame is shorter than an Ethernet header.
    #[error("frame shorter than an Ethernet header")]
    Short,
    /// The frame is longer than [`MAX_FRAME`].
    #[error("frame longer than {MAX_FRAME} bytes")]
    Long,
    /// A checksum or segmentation that was not negotiated.
    #[error("offload that was not negotiated")]
    NotNegotiated,
    /// No such `gso_type`.
    #[error("unknown gso_type")]
    GsoType,
    /// A segmented frame without a segment size, or without a checksum to fill in.
    #[error("segmented frame without gso_size or NEEDS_CSUM")]
    GsoSize,
    /// More than [`MOST_SEGMENTS`].
    #[error("more than {MOST_SEGMENTS} segments")]
    Segments,
    /// The checksum lies outside the frame, or not where the protocol has it.
    #[error("csum_start or csum_offset outside the frame")]
    Checksum,
}

/// A header from the guest that fits its frame and the negotiated features.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TxHeader {
    clean: NetHeader,
    cut: Cut,
}

/// What becomes of a frame on its way to the network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    /// Packets, at least one.
    pub packets: usize,
    /// Bytes of headers that each has, as far as they are known without a look at the frame.
    pub headers: usize,
}

impl Cut {
    /// A frame that is one packet.
    pub const WHOLE: Self = Self {
        packets: 1,
        headers: 0,
    };

    fn new(headers: usize, frame: usize, gso_size: U16) -> Self {
        let packets = (frame - headers).div_ceil(gso_size.get().into()).max(1);
        Self { packets, headers }
    }

    /// What a frame of `frame` bytes stands for that comes from a TAP with this header: the packets that its
    /// kernel made it of, or would have cut it into. A header that cannot be true stands for one packet.
    #[must_use]
    pub fn received(header: &NetHeader, frame: usize) -> Self {
        let headers =
            transport(header.gso_type).map(|(_, least)| usize::from(header.csum_start.get()) + least);
        match headers {
            Some(headers) if headers <= frame && header.gso_size.get() > 0 => {
                let Self { packets, headers } = Self::new(headers, frame, header.gso_size);
                let packets = packets.min(MOST_SEGMENTS);
                Self { packets, headers }
            }
            _ => Self::WHOLE,
        }
    }
}

impl TxHeader {
    /// Checks `header` against a frame of `frame` bytes (the header not counted).
    ///
    /// Fields that virtio 1.3, 5.1.6.2.2 tells a device to ignore come out as zero.
    ///
    /// # Errors
    /// The first [`HeaderError`] that applies.
    pub fn check(header: NetHeader, frame: usize, offloads: &Offloads) -> Result<Self, HeaderError> {
        if frame < ETHERNET_HEADER {
            return Err(HeaderError::Short);
        }
        if frame > MAX_FRAME {
            return Err(HeaderError::Long);
        }
        let mut clean = NetHeader::default();
        if header.flags & F_NEEDS_CSUM != 0 {
            check_checksum(&header, frame, offloads)?;
            clean.flags = F_NEEDS_CSUM;
            clean.csum_start = header.csum_start;
            clean.csum_offset = header.csum_offset;
        }
        let mut cut = Cut::WHOLE;
        if header.gso_type != GSO_NONE {
            cut = check_segmentation(&header, frame, offloads)?;
            clean.gso_type = header.gso_type;
            clean.gso_size = header.gso_size;
            clean.hdr_len = header_length(&header, cut.headers, frame);
        }
        Ok(Self { clean, cut })
    }

    /// The bytes that go to the TAP ahead of the frame.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.clean.as_bytes()
    }

    /// What it asks for.
    #[must_use]
    pub fn cut(&self) -> Cut {
        self.cut
    }

    /// Where in the frame the kernel will write the two bytes of a checksum.
    #[must_use]
    pub fn checksum(&self) -> Option<usize> {
        let field = usize::from(self.clean.csum_start.get()) + usize::from(self.clean.csum_offset.get());
        (self.clean.flags & F_NEEDS_CSUM != 0).then_some(field)
    }
}

fn check_checksum(header: &NetHeader, frame: usize, offloads: &Offloads) -> Result<(), HeaderError> {
    if !offloads.host_csum() {
        return Err(HeaderError::NotNegotiated);
    }
    let start = usize::from(header.csum_start.get());
    let end = start + usize::from(header.csum_offset.get()) + 2;
    if start < ETHERNET_HEADER || end > frame {
        return Err(HeaderError::Checksum);
    }
    Ok(())
}

fn check_segmentation(header: &NetHeader, frame: usize, offloads: &Offloads) -> Result<Cut, HeaderError> {
    let (offset, least) = transport(header.gso_type).ok_or(HeaderError::GsoType)?;
    if !offloads.host_segments(header.gso_type) {
        return Err(HeaderError::NotNegotiated);
    }
    if header.gso_size.get() == 0 || header.flags & F_NEEDS_CSUM == 0 {
        return Err(HeaderError::GsoSize);
    }
    let headers = usize::from(header.csum_start.get()) + least;
    if header.csum_offset.get() != offset || headers > frame {
        return Err(HeaderError::Checksum);
    }
    let cut = Cut::new(headers, frame, header.gso_size);
    if cut.packets > MOST_SEGMENTS {
        return Err(HeaderError::Segments);
    }
    Ok(cut)
}

/// Where the header of the protocol that is segmented has its checksum, and how long it is at least.
fn transport(gso_type: u8) -> Option<(u16, usize)> {
    match gso_type & !GSO_ECN {
        GSO_TCPV4 | GSO_TCPV6 => Some((16, 20)),
        GSO_UDP_L4 => Some((6, 8)),
        _ => None,
    }
}

/// The hint `hdr_len`, if it can be true of a frame with at least `headers` bytes of them: a device must not
/// rely on it (virtio 1.3, 5.1.6.2.2), and the kernel refuses one beyond the frame.
fn header_length(header: &NetHeader, headers: usize, frame: usize) -> U16 {
    let true_ones = headers..=frame.min(headers + MOST_TCP_OPTIONS);
    if true_ones.contains(&header.hdr_len.get().into()) {
        header.hdr_len
    } else {
        U16::new(u16::try_from(headers).unwrap_or(0))
    }
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
