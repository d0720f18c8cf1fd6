//! A ring that goes on from an in-flight region which somebody has scribbled in.

use super::guest;
use crate::ring::InflightRegion;
use arbitrary::Unstructured;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

const ENTRIES: u16 = 16;

/// Recovers from a region whose bytes are the input's, and serves what it says.
pub fn inflight(input: &[u8]) {
    static REGION: OnceLock<(InflightRegion, OwnedFd)> = OnceLock::new();
    let made = || InflightRegion::create(1, ENTRIES).expect("a region");
    let (region, fd) = REGION.get_or_init(made);
    region.zero();
    let mut input = Unstructured::new(input);
    let length = region.size().min(input.len());
    let bytes = input.bytes(length).unwrap_or_default();
    nix::sys::uio::pwrite(fd, bytes, 0).expect("the region is written");
    let queue = region.queue(0, ENTRIES);
    let Some(mut ring) = guest::ring(&mut input, queue) else {
        return;
    };
    for _ in 0..2 * ENTRIES {
        match ring.pop() {
            Ok(Some(chain)) => ring.complete(chain, 0),
            Ok(None) => break,
            Err(_) => return,
        }
    }
    if ring.publish().is_ok() {
        assert_eq!(ring.held(), 0);
    }
}
