//! Block requests (virtio 1.3, 5.2.6).

use super::{
    DEADLINE,
    ring::{Ring, Segment},
    session::Session,
};
use anyhow::{Result, ensure};
use std::collections::BTreeMap;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// VIRTIO_BLK_S_OK.
pub const STATUS_OK: u8 = 0;
/// VIRTIO_BLK_S_IOERR.
pub const STATUS_IOERR: u8 = 1;
/// VIRTIO_BLK_S_UNSUPP.
pub const STATUS_UNSUPP: u8 = 2;
/// Most data of one request.
pub const SLOT_DATA: u64 = 64 << 10;

/// Header and status before the data; the data is aligned for direct I/O.
const SLOT_HEADER: u64 = 4096;
const SLOT: u64 = SLOT_HEADER + SLOT_DATA;
/// What the status byte holds until the device writes it.
const STATUS_UNWRITTEN: u8 = 0xEE;

/// A request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BlockRequest {
    /// VIRTIO_BLK_T_IN.
    Read {
        /// First sector.
        sector: u64,
        /// Bytes.
        length: u32,
    },
    /// VIRTIO_BLK_T_OUT.
    Write {
        /// First sector.
        sector: u64,
        /// What.
        data: Vec<u8>,
    },
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_GET_ID.
    GetId,
    /// VIRTIO_BLK_T_DISCARD.
    Discard {
        /// First sector.
        sector: u64,
        /// Sectors.
        count: u32,
    },
    /// VIRTIO_BLK_T_WRITE_ZEROES; `true` in `unmap` lets it free the range.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// Sectors.
        count: u32,
        /// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP.
        unmap: bool,
    },
    /// Any type, with data that the device reads.
    Other {
        /// The type.
        kind: u32,
        /// First sector.
        sector: u64,
        /// What.
        data: Vec<u8>,
    },
}

impl BlockRequest {
    /// Type, sector, data for the device, bytes from the device.
    fn parts(&self) -> (u32, u64, Vec<u8>, u32) {
        let range = |sector: u64, count: u32, flags: u32| {
            let mut data = sector.to_le_bytes().to_vec();
            data.extend(count.to_le_bytes());
            data.extend(flags.to_le_bytes());
            data
        };
        match self {
            Self::Read { sector, length } => (0, *sector, Vec::new(), *length),
            Self::Write { sector, data } => (1, *sector, data.clone(), 0),
            Self::Flush => (4, 0, Vec::new(), 0),
            Self::GetId => (8, 0, Vec::new(), 20),
            Self::Discard { sector, count } => (11, 0, range(*sector, *count, 0), 0),
            Self::WriteZeroes { sector, count, unmap } => {
                (13, 0, range(*sector, *count, u32::from(*unmap)), 0)
            }
            Self::Other { kind, sector, data } => (*kind, *sector, data.clone(), 0),
        }
    }
}

/// A request that the device gave back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Completion {
    /// What [`BlockDriver::submit`] returned.
    pub tag: u64,
    /// The status byte.
    pub status: u8,
    /// What the device wrote before the status.
    pub data: Vec<u8>,
}

/// A block driver over a [`Session`].
#[derive(Debug)]
pub struct BlockDriver {
    /// The session.
    pub session: Session,
    slots: Vec<Vec<u64>>,
    pending: Vec<BTreeMap<u16, (u64, u64, u32)>>,
    next_tag: u64,
}

impl BlockDriver {
    /// With as many requests a queue as memory and ring allow.
    #[must_use]
    pub fn new(session: Session) -> Self {
        let start = session.data_start();
        let end = super::BASE + session.memory.size();
        let queues = session.rings.len() as u64;
        let each = ((end - start) / SLOT / queues)
            .min(session.rings.first().map_or(0, |ring| u64::from(ring.size())));
        let slots = (0..queues)
            .map(|queue| {
                (0..each)
                    .map(|slot| start + (queue * each + slot) * SLOT)
                    .collect()
            })
            .collect();
        Self {
            pending: vec![BTreeMap::new(); session.rings.len()],
            session,
            slots,
            next_tag: 1,
        }
    }

    fn ring(&mut self, queue: usize) -> &mut Ring {
        &mut self.session.rings[queue]
    }

    /// Requests that queue `queue` holds.
    #[must_use]
    pub fn in_flight(&self, queue: usize) -> usize {
        self.pending[queue].len()
    }

    /// Puts a request into queue `queue`; [`BlockDriver::kick`] tells the device.
    ///
    /// # Errors
    /// When ring or memory are full.
    pub fn submit(&mut self, queue: usize, request: &BlockRequest) -> Result<u64> {
        let (kind, sector, data, from_device) = request.parts();
        ensure!(
            data.len() as u64 <= SLOT_DATA && u64::from(from_device) <= SLOT_DATA,
            "too much data"
        );
        ensure!(!self.slots[queue].is_empty(), "no request slot left");
        let slot = self.slots[queue][self.slots[queue].len() - 1];
        let mut header = kind.to_le_bytes().to_vec();
        header.extend(0_u32.to_le_bytes());
        header.extend(sector.to_le_bytes());
        self.session.memory.write(slot, &header)?;
        self.session.memory.write(slot + 16, &[STATUS_UNWRITTEN])?;
        self.session.memory.write(slot + SLOT_HEADER, &data)?;
        let segment = |address, length, writable| Segment {
            address,
            length,
            writable,
        };
        let mut chain = vec![segment(slot, 16, false)];
        if !data.is_empty() {
            chain.push(segment(slot + SLOT_HEADER, data.len() as u32, false));
        }
        if from_device > 0 {
            chain.push(segment(slot + SLOT_HEADER, from_device, true));
        }
        chain.push(segment(slot + 16, 1, true));
        let head = self.ring(queue).push(&chain)?;
        self.slots[queue].pop();
        let tag = self.next_tag;
        self.next_tag += 1;
        self.pending[queue].insert(head, (tag, slot, from_device));
        Ok(tag)
    }

    /// Rings the doorbell of `queue` where the device wants it.
    ///
    /// # Errors
    /// When the eventfd refuses.
    pub fn kick(&mut self, queue: usize) -> Result<()> {
        self.ring(queue).notify().map(drop)
    }

    /// Waits for the next completion on `queue`.
    ///
    /// # Errors
    /// When none comes in time, or the device breaks the ring's rules.
    pub fn complete(&mut self, queue: usize) -> Result<Completion> {
        let (head, _) = self.ring(queue).wait_used(DEADLINE)?;
        self.finish(queue, head)
    }

    fn finish(&mut self, queue: usize, head: u16) -> Result<Completion> {
        let (tag, slot, length) = self.pending[queue].remove(&head).unwrap_or_default();
        ensure!(tag != 0, "a chain that is no request came back");
        self.slots[queue].push(slot);
        let memory = &self.session.memory;
        let status = memory.read(slot + 16, 1)?[0];
        ensure!(
            status != STATUS_UNWRITTEN,
            "request {tag} came back without a status"
        );
        let data = memory.read(slot + SLOT_HEADER, length as usize)?;
        Ok(Completion { tag, status, data })
    }

    /// One request on `queue`, alone, to its end.
    ///
    /// # Errors
    /// As [`BlockDriver::submit`] and [`BlockDriver::complete`].
    pub fn run(&mut self, queue: usize, request: &BlockRequest) -> Result<Completion> {
        let tag = self.submit(queue, request)?;
        self.kick(queue)?;
        let completion = self.complete(queue)?;
        ensure!(completion.tag == tag, "another request came back");
        Ok(completion)
    }

    /// One request that must succeed; what it read.
    ///
    /// # Errors
    /// As [`BlockDriver::run`], and when its status is not OK.
    pub fn done(&mut self, queue: usize, request: &BlockRequest) -> Result<Vec<u8>> {
        let completion = self.run(queue, request)?;
        ensure!(
            completion.status == STATUS_OK,
            "status {} for {request:?}",
            completion.status
        );
        Ok(completion.data)
    }

    /// Goes on with a new back end ([`Session::resume`]): what is in flight stays so.
    ///
    /// # Errors
    /// As [`Session::resume`].
    pub fn resume(
        mut self,
        socket: std::os::unix::net::UnixStream,
        options: &super::Options,
    ) -> Result<Self> {
        self.session = self.session.resume(socket, options)?;
        Ok(self)
    }
}
