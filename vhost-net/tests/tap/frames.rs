//! Frames that tests send and check.

use crate::namespace::TestTap;

/// Bytes of Ethernet and IPv4 headers.
pub const L4: usize = 34;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// Who sends to whom.
#[derive(Clone, Copy)]
pub struct Path {
    pub from_mac: [u8; 6],
    pub to_mac: [u8; 6],
    pub from_ip: [u8; 4],
    pub to_ip: [u8; 4],
}

impl Path {
    /// To the host's MAC address, but to nobody's IP address: nothing answers.
    pub fn to_host(tap: &TestTap) -> Self {
        let [a, b, c, _] = tap.host_ip();
        Self {
            from_mac: tap.guest_mac(),
            to_mac: tap.host_mac(),
            from_ip: tap.guest_ip(),
            to_ip: [a, b, c, 9],
        }
    }

    pub fn to_guest(tap: &TestTap) -> Self {
        Self {
            from_mac: tap.host_mac(),
            to_mac: tap.guest_mac(),
            from_ip: tap.host_ip(),
            to_ip: tap.guest_ip(),
        }
    }

    fn packet(&self, protocol: u8, segment: &[u8]) -> Vec<u8> {
        let mut frame = [self.to_mac, self.from_mac].concat();
        frame.extend([8, 0]);
        let total = (20 + segment.len()) as u16;
        let mut header = vec![0x45, 0];
        header.extend(total.to_be_bytes());
        header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
        header.extend([self.from_ip, self.to_ip].concat());
        let sum = !fold(sum(&header));
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        frame.extend(header);
        frame.extend(segment);
        frame
    }

    /// Sum of the pseudo header, which NEEDS_CSUM wants in the checksum's place.
    pub fn pseudo(&self, protocol: u8, length: usize) -> u16 {
        fold(sum(&[self.from_ip, self.to_ip].concat()) + u32::from(protocol) + length as u32)
    }

    /// A UDP frame; `finished` or with the pseudo header's sum.
    pub fn udp(&self, ports: [u16; 2], payload: &[u8], finished: bool) -> Vec<u8> {
        let length = 8 + payload.len();
        let mut segment: Vec<u8> = ports.iter().flat_map(|port| port.to_be_bytes()).collect();
        segment.extend((length as u16).to_be_bytes());
        segment.extend(self.pseudo(UDP, length).to_be_bytes());
        segment.extend(payload);
        if finished {
            let sum = !fold(sum(&segment));
            segment[6..8].copy_from_slice(&sum.to_be_bytes());
        }
        self.packet(UDP, &segment)
    }

    /// A TCP frame (ACK) with an unfinished checksum.
    pub fn tcp(&self, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut segment = vec![0x30, 0x39, 0x27, 0x0f];
        segment.extend(sequence.to_be_bytes());
        segment.extend([0, 0, 0, 0, 0x50, 0x10, 0x40, 0, 0, 0, 0, 0]);
        let length = segment.len() + payload.len();
        segment[16..18].copy_from_slice(&self.pseudo(TCP, length).to_be_bytes());
        segment.extend(payload);
        self.packet(TCP, &segment)
    }

    /// A TCP frame (ACK) over IPv6 with no checksum yet.
    pub fn tcp6(&self, payload: &[u8]) -> Vec<u8> {
        let mut frame = [self.to_mac, self.from_mac].concat();
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((20 + payload.len() as u16).to_be_bytes());
        frame.extend([TCP, 64]);
        for last in [1, 2] {
            frame.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        }
        frame.extend([0x30, 0x39, 0x27, 0x0f, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10]);
        frame.extend([0x40, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }
}

/// The TCP or UDP checksum of an IPv4 frame is right.
pub fn checksum_is_right(frame: &[u8]) -> bool {
    let total = usize::from(u16::from_be_bytes([frame[16], frame[17]])) + 14;
    let segment = &frame[L4..total];
    let pseudo = sum(&frame[26..34]) + u32::from(frame[23]) + segment.len() as u32;
    fold(sum(segment) + pseudo) == 0xffff
}

fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Bytes that differ from frame to frame.
pub fn pattern(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}
