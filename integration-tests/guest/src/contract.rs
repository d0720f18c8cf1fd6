//! What the tiny guest and the tests that run it agree on: the machine's addresses, the data
//! that goes over the disk and the wire, and the checksum of it.
#![no_std]
#![forbid(unsafe_code)]

pub mod machine;

/// What `tiny-byte` writes.
pub const BYTE: u8 = b'B';

/// One word of the pattern: word `word` of block `block` under `seed` (SplitMix64's finalizer,
/// so that a lost, doubled, shifted or swapped block differs).
#[must_use]
pub fn pattern_word(seed: u64, block: u64, word: u64) -> u64 {
    let mut x = seed
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .wrapping_add(block << 20)
        .wrapping_add(word)
        .wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Fills `data` with the pattern of `block`; a tail shorter than eight bytes stays as it is.
pub fn fill(data: &mut [u8], seed: u64, block: u64) {
    for (word, bytes) in data.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&pattern_word(seed, block, word as u64).to_le_bytes());
    }
}

/// Whether `data` holds the pattern of `block`.
#[must_use]
pub fn holds(data: &[u8], seed: u64, block: u64) -> bool {
    data.chunks_exact(8)
        .enumerate()
        .all(|(word, bytes)| bytes == pattern_word(seed, block, word as u64).to_le_bytes())
}

/// A running checksum over 64-bit words (FNV-1a, a word at a time).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checksum(pub u64);

impl Default for Checksum {
    fn default() -> Self {
        Self(0xCBF2_9CE4_8422_2325)
    }
}

impl Checksum {
    /// Takes in `data`; a tail shorter than eight bytes is left out.
    pub fn update(&mut self, data: &[u8]) {
        for bytes in data.chunks_exact(8) {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            self.0 = (self.0 ^ u64::from_le_bytes(word)).wrapping_mul(0x0100_0000_01B3);
        }
    }
}

/// Length of a test frame on the wire: Ethernet header and payload, no padding needed.
pub const FRAME_LENGTH: usize = 256;
/// Ethernet type of the test's frames (IEEE 802 local experimental 1).
pub const FRAME_TYPE: [u8; 2] = [0x88, 0xB5];
/// Seed of frames that the guest sends.
pub const GUEST_FRAMES: u64 = 0x6775_6573;
/// Seed of frames that the host sends.
pub const HOST_FRAMES: u64 = 0x686F_7374;
/// Where a frame's number lies (little endian, 64 bits); the pattern follows.
pub const FRAME_NUMBER: usize = 16;
/// Where a frame's pattern starts.
pub const FRAME_PATTERN: usize = 24;

/// Writes frame `number` into `frame` ([`FRAME_LENGTH`] bytes).
pub fn write_frame(frame: &mut [u8; FRAME_LENGTH], to: [u8; 6], from: [u8; 6], seed: u64, number: u64) {
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame[12..14].copy_from_slice(&FRAME_TYPE);
    frame[14..16].fill(0);
    frame[FRAME_NUMBER..FRAME_PATTERN].copy_from_slice(&number.to_le_bytes());
    fill(&mut frame[FRAME_PATTERN..], seed, number);
}

/// The number of a test frame whose pattern is right; `None` for any other traffic.
#[must_use]
pub fn frame_number(frame: &[u8], seed: u64) -> Option<u64> {
    if frame.len() != FRAME_LENGTH || frame[12..14] != FRAME_TYPE {
        return None;
    }
    let mut number = [0; 8];
    number.copy_from_slice(&frame[FRAME_NUMBER..FRAME_PATTERN]);
    let number = u64::from_le_bytes(number);
    holds(&frame[FRAME_PATTERN..], seed, number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_tells_its_number_and_a_changed_one_does_not() {
        let mut frame = [0; FRAME_LENGTH];
        write_frame(&mut frame, [2; 6], [4; 6], GUEST_FRAMES, 77);
        assert_eq!(frame_number(&frame, GUEST_FRAMES), Some(77));
        assert_eq!(frame_number(&frame, HOST_FRAMES), None);
        frame[200] ^= 1;
        assert_eq!(frame_number(&frame, GUEST_FRAMES), None);
    }

    #[test]
    fn the_checksum_depends_on_the_order() {
        let (mut one, mut other) = (Checksum::default(), Checksum::default());
        one.update(&[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        other.update(&[2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_ne!(one, other);
    }
}
