//! A guest whose driver is the fuzzer: memory at guest address 0, so that small numbers are addresses.

use crate::memory::{GuestAddress, GuestMemory, RegionSpec, Sealing};
use crate::ring::{InflightQueue, Ring, RingSetup};
use crate::{QueueHandler, RingFault};
use arbitrary::Unstructured;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

/// Bytes of each of the two regions, which touch.
const REGION: u64 = 0x8000;
/// Largest ring, in entries.
const MOST_ENTRIES: u16 = 16;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x140;
/// Rounds of a handler in one input.
const MOST_ROUNDS: usize = 16;

/// A memfd of `size` bytes that cannot shrink.
pub(super) fn sealed(size: u64) -> OwnedFd {
    let fd = memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).expect("a memfd");
    nix::unistd::ftruncate(&fd, size as i64).expect("a longer memfd");
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).expect("a seal");
    fd
}

fn memory() -> &'static Arc<GuestMemory> {
    static MEMORY: OnceLock<Arc<GuestMemory>> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let region = |guest_address| RegionSpec {
            guest_address,
            size: REGION,
            user_address: guest_address,
            offset: 0,
        };
        let one = GuestMemory::default().with_region(region(0), sealed(REGION), Sealing::Required);
        let two = one
            .expect("a region")
            .with_region(region(REGION), sealed(REGION), Sealing::Required);
        Arc::new(two.expect("a second region"))
    })
}

/// Copies `bytes` to guest memory as far as they fit.
fn write(address: u64, bytes: &[u8]) {
    for (byte, at) in bytes.iter().zip(address..2 * REGION) {
        poke(at, *byte);
    }
}

fn poke(at: u64, byte: u8) {
    let place = memory().segment(GuestAddress(at), 1);
    let slice = place.as_ref().and_then(|place| memory().slice(place));
    slice.expect("guest memory").copy_from(&[byte]);
}

fn clear() {
    for start in [0, REGION] {
        let place = memory().segment(GuestAddress(start), REGION as usize);
        let slice = place.as_ref().and_then(|place| memory().slice(place));
        slice.expect("guest memory").copy_from(&[0; REGION as usize]);
    }
}

/// What the driver does next: some bytes to some place.
pub(super) fn scribble(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let at = u64::from(input.arbitrary::<u16>()?);
    let length = usize::from(input.arbitrary::<u8>()?).min(input.len());
    write(at, input.bytes(length)?);
    Ok(())
}

/// A ring as the input has it, in cleared memory with a first scribble. `None`: the input is too
/// short, or the ring is refused.
pub(super) fn ring(input: &mut Unstructured<'_>, inflight: Option<InflightQueue>) -> Option<Ring> {
    let shape: u8 = input.arbitrary().ok()?;
    let setup = RingSetup {
        size: 1 << (shape & 7).min(MOST_ENTRIES.ilog2() as u8),
        descriptors: GuestAddress(0),
        available: GuestAddress(AVAILABLE),
        used: GuestAddress(USED),
        base: input.arbitrary::<u8>().ok()?.into(),
        event_idx: shape & 8 != 0,
        indirect: shape & 16 != 0,
    };
    clear();
    scribble(input).ok()?;
    Ring::start(Arc::clone(memory()), &setup, inflight).ok()
}

/// Puts `handler` to a driver that writes what it likes between rounds. Whatever it does, the
/// handler ends each round, and holds nothing after a drain of a ring that is whole.
pub fn serve(handler: &mut dyn QueueHandler, features: u64, input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Some(mut ring) = ring(&mut input, None) else {
        return;
    };
    handler.start(features);
    handler.resume(0);
    let mut whole = true;
    for _ in 0..MOST_ROUNDS {
        if round(handler, &mut ring).is_err() {
            whole = false;
            break;
        }
        if input.is_empty() || scribble(&mut input).is_err() {
            break;
        }
    }
    let drained = handler.drain(&mut ring);
    if whole && drained.is_ok() && ring.publish().is_ok() {
        assert_eq!(ring.held(), 0, "chains are held after a drain");
    }
}

/// As the worker does it.
fn round(handler: &mut dyn QueueHandler, ring: &mut Ring) -> Result<(), RingFault> {
    ring.begin_round()?;
    handler.process(ring)?;
    ring.publish()?;
    ring.needs_interrupt()?;
    ring.renew_budget();
    ring.enable_kicks()?;
    Ok(())
}
