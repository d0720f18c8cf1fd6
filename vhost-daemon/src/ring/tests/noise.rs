//! A ring full of noise: whatever the driver writes, the device ends in bounded time without a
//! panic, and every buffer that it is given lies in guest memory.

use super::driver::{Driver, SIZE};
use vm_memory::VolatileSlice;

/// Rounds of noise.
const ROUNDS: u32 = 20_000;

/// xorshift64*: the same noise in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Descriptors whose addresses are near memory's edges, whose flags and links are anything.
fn scribble(driver: &mut Driver, noise: &mut Noise) {
    for table in [driver.table(), driver.buffer(4)] {
        for index in 0..SIZE {
            let address = match noise.below(4) {
                0 => noise.next(),
                1 => driver.buffer(4),
                _ => driver.buffer(0) + noise.below(0x2_0000),
            };
            let length = match noise.below(4) {
                0 => noise.next() as u32,
                1 => 16 * noise.below(9) as u32,
                _ => noise.below(0x3000) as u32,
            };
            let flags = noise.below(8) as u16;
            let next = noise.below(u64::from(SIZE) + 1) as u16;
            driver.describe_in(table, index, address, length, flags, next);
        }
    }
    driver.set_available_index(0);
    for _ in 0..noise.below(u64::from(SIZE) + 2) {
        driver.offer(noise.below(u64::from(SIZE) + 1) as u16);
    }
}

#[test]
fn noise_is_a_fault_or_a_buffer_in_memory() {
    let mut noise = Noise(0x9E37_79B9_7F4A_7C15);
    let mut driver = Driver::new();
    let (mut chains, mut faults) = (0, 0);
    for _ in 0..ROUNDS {
        scribble(&mut driver, &mut noise);
        let mut ring = driver.ring();
        for _ in 0..=SIZE {
            match ring.pop() {
                Ok(None) => break,
                Err(_) => {
                    faults += 1;
                    break;
                }
                Ok(Some(chain)) => {
                    chains += 1;
                    let mut slices: Vec<VolatileSlice<'_>> = Vec::new();
                    chain.readable_slices(0, usize::MAX, &mut slices);
                    chain.writable_slices(0, usize::MAX, &mut slices);
                    let total: usize = slices.iter().map(VolatileSlice::len).sum();
                    assert_eq!(total, chain.readable_length() + chain.writable_length());
                    drop(slices);
                    ring.complete(chain, 0);
                }
            }
        }
    }
    assert!(chains > 1000 && faults > 1000, "{chains} chains, {faults} faults");
}
