//! A split ring in memory that the fuzzer writes.

use super::guest;
use crate::ring::Chain;
use arbitrary::Unstructured;
use vm_memory::VolatileSlice;

/// Most steps in one input.
const MOST_STEPS: usize = 64;

/// Takes, completes, puts back and publishes as the input says. Every chain lies in guest memory.
pub fn ring(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Some(mut ring) = guest::ring(&mut input, None) else {
        return;
    };
    let mut held: Vec<Chain> = Vec::new();
    for _ in 0..MOST_STEPS {
        let Ok([step]) = input.bytes(1).map(|bytes| [bytes[0]]) else {
            return;
        };
        let done = match step % 6 {
            0 | 1 => ring.pop().map(|chain| {
                held.extend(chain.inspect(check));
            }),
            2 => {
                if let Some(chain) = held.pop() {
                    ring.complete(chain, u32::from(step));
                }
                Ok(())
            }
            3 => held.pop().map_or(Ok(()), |chain| ring.put_back(chain)),
            4 => ring
                .publish()
                .and_then(|()| ring.needs_interrupt())
                .and_then(|_| {
                    ring.renew_budget();
                    ring.enable_kicks()
                })
                .map(drop),
            _ => {
                if guest::scribble(&mut input).is_err() {
                    return;
                }
                Ok(())
            }
        };
        if done.is_err() {
            return;
        }
        assert_eq!(usize::from(ring.held()), held.len());
        assert!(
            held.len() <= usize::from(ring.size()),
            "more chains than the ring has"
        );
    }
}

fn check(chain: &Chain) {
    let mut slices: Vec<VolatileSlice<'_>> = Vec::new();
    chain.readable_slices(0, usize::MAX, &mut slices);
    chain.writable_slices(0, usize::MAX, &mut slices);
    let total: usize = slices.iter().map(VolatileSlice::len).sum();
    assert_eq!(total, chain.readable_length() + chain.writable_length());
    let mut bytes = [0; 64];
    let read = chain.read_at(0, &mut bytes);
    assert_eq!(read, chain.readable_length().min(bytes.len()));
    let written = chain.write_at(0, &bytes[..16]);
    assert_eq!(written, chain.writable_length().min(16));
}
