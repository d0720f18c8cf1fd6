//! The frames of the network benchmark.

/// Bytes of Ethernet, IPv4 and TCP headers.
const TCP_HEADERS: usize = 54;
const MSS: u16 = 1448;
/// Payload of a super-frame: what fits 64 KiB in whole segments.
const SUPER: usize = 45 * MSS as usize;

/// The guest's address.
pub(super) const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// Nobody's: the host drops what it gets for it, at once.
const NOBODY: [u8; 6] = [2, 0, 0, 0, 9, 9];
const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// How long frames are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Size {
    /// 64 bytes from the Ethernet header on.
    Small,
    /// 1500 bytes of IP.
    Full,
    /// Almost 64 KiB of TCP, to be segmented or taken whole.
    Super,
}

impl Size {
    /// As the table names it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Small => "64 B",
            Self::Full => "1500 B",
            Self::Super => "64 KiB",
        }
    }

    /// Bytes from the Ethernet header on.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Small => 64,
            Self::Full => 1514,
            Self::Super => TCP_HEADERS + SUPER,
        }
    }

    /// The first ten bytes of the virtio-net header.
    fn header(self) -> [u8; 10] {
        let [low, high] = MSS.to_le_bytes();
        match self {
            Self::Super => [1, 1, TCP_HEADERS as u8, 0, low, high, 34, 0, 16, 0],
            _ => [0; 10],
        }
    }

    fn frame(self, to: [u8; 6], from: [u8; 6], flow: u16) -> Vec<u8> {
        let (mut frame, length) = ([to, from].concat(), self.bytes());
        frame.extend([8, 0, 0x45, 0]);
        frame.extend(((length - 14) as u16).to_be_bytes());
        let protocol = if self == Self::Super { 6 } else { 17 };
        frame.extend([0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let words = frame[14..34].chunks(2);
        let sum: u32 = words
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        let folded = !((sum & 0xffff) + (sum >> 16)) as u16;
        frame[24..26].copy_from_slice(&folded.to_be_bytes());
        frame.extend((1000 + flow).to_be_bytes());
        frame.extend([0, 7]);
        if self == Self::Super {
            frame.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff]);
        } else {
            frame.extend(((length - 34) as u16).to_be_bytes());
        }
        frame.resize(length, 0);
        frame
    }

    /// From a host, of flow `flow`, as a packet socket takes it.
    pub(super) fn to_guest(self, flow: u16) -> Vec<u8> {
        [&self.header()[..], &self.frame(GUEST, SENDER, flow)].concat()
    }

    /// From the guest, as a driver or a TAP takes it.
    pub(super) fn to_host(self) -> Vec<u8> {
        [&self.header()[..], &[0; 2], &self.frame(NOBODY, GUEST, 0)].concat()
    }
}
