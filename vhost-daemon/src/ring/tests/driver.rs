//! The driver's side of a ring of [`SIZE`] entries in one page-aligned memfd.

use crate::memory::tests::{sealed, spec};
use crate::memory::{GuestAddress, GuestMemory, Sealing};
use crate::ring::{InflightQueue, InflightRegion, Ring, RingFault, RingSetup};
use std::sync::Arc;
use vm_memory::Bytes;

pub(super) const SIZE: u16 = 8;
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

const BASE: u64 = 0x10_0000;
const MEMORY: u64 = 0x2_0000;
const AVAILABLE: u64 = BASE + 0x1000;
const USED: u64 = BASE + 0x2000;

pub(super) struct Driver {
    memory: Arc<GuestMemory>,
    event_idx: bool,
    available_index: u16,
}

impl Driver {
    pub(super) fn new() -> Self {
        let memory = GuestMemory::default().with_region(
            spec(BASE, MEMORY, BASE, 0),
            sealed(MEMORY),
            Sealing::Required,
        );
        Self {
            memory: Arc::new(memory.unwrap()),
            event_idx: false,
            available_index: 0,
        }
    }

    pub(super) fn with_event_idx() -> Self {
        Self {
            event_idx: true,
            ..Self::new()
        }
    }

    /// The device's side, new.
    pub(super) fn ring(&self) -> Ring {
        self.start(None).unwrap()
    }

    pub(super) fn ring_with(&self, region: &InflightRegion) -> Result<Ring, RingFault> {
        self.start(region.queue(0, SIZE))
    }

    fn start(&self, inflight: Option<InflightQueue>) -> Result<Ring, RingFault> {
        let setup = RingSetup {
            size: SIZE,
            descriptors: GuestAddress(BASE),
            available: GuestAddress(AVAILABLE),
            used: GuestAddress(USED),
            base: 0,
            event_idx: self.event_idx,
            indirect: true,
        };
        Ring::start(Arc::clone(&self.memory), &setup, inflight)
    }

    /// Guest address of the descriptor table.
    pub(super) fn table(&self) -> u64 {
        BASE
    }

    /// Guest address of a buffer of 4096 bytes.
    pub(super) fn buffer(&self, index: u64) -> u64 {
        BASE + 0x8000 + index * 0x1000
    }

    pub(super) fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.describe_in(BASE, index, address, length, flags, next);
    }

    pub(super) fn describe_in(
        &self,
        table: u64,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = Vec::from(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(table + u64::from(index) * 16, &bytes);
    }

    /// Makes the chain at `head` available.
    pub(super) fn offer(&mut self, head: u16) {
        let entry = AVAILABLE + 4 + u64::from(self.available_index % SIZE) * 2;
        self.write(entry, &head.to_le_bytes());
        self.set_available_index(self.available_index.wrapping_add(1));
    }

    pub(super) fn set_available_index(&mut self, index: u16) {
        self.available_index = index;
        self.write(AVAILABLE + 2, &index.to_le_bytes());
    }

    pub(super) fn set_available_flags(&self, flags: u16) {
        self.write(AVAILABLE, &flags.to_le_bytes());
    }

    pub(super) fn set_used_event(&self, index: u16) {
        self.write(AVAILABLE + 4 + u64::from(SIZE) * 2, &index.to_le_bytes());
    }

    /// Everything in the used ring, which must not have wrapped.
    pub(super) fn used(&self) -> Vec<(u32, u32)> {
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let index = self.read(USED + 2, 2);
        let count = u16::from_le_bytes([index[0], index[1]]);
        assert!(count <= SIZE);
        let element = |n: u16| {
            let bytes = self.read(USED + 4 + u64::from(n) * 8, 8);
            (word(&bytes[..4]), word(&bytes[4..]))
        };
        (0..count).map(element).collect()
    }

    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        let segment = self.memory.segment(GuestAddress(address), bytes.len()).unwrap();
        self.memory.slice(&segment).unwrap().copy_from(bytes);
    }

    pub(super) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let segment = self.memory.segment(GuestAddress(address), length).unwrap();
        let mut bytes = vec![0; length];
        self.memory
            .slice(&segment)
            .unwrap()
            .read_slice(&mut bytes, 0)
            .unwrap();
        bytes
    }
}
