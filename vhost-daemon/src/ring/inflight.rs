//! The in-flight region (vhost-user, "Inflight I/O tracking", split rings): which chains a device
//! took and did not publish, in memory that outlives this process.
//!
//! Layout of each queue's part, little-endian, parts aligned to 64 bytes:
//!
//! ```text
//!  0 features: u64   8 version: u16   10 desc_num: u16   12 last_batch_head: u16   14 used_idx: u16
//! 16 desc[desc_num]: { inflight: u8, padding: [u8; 5], next: u16, counter: u64 }
//! ```
//!
//! Each step is one aligned store, in an order such that a death between any two leaves enough to
//! tell what the guest has seen. Compiler and CPU keep the order that is seen by *another process
//! after this one's death* as long as the stores are not reordered among themselves: they are
//! Release stores, and the kernel's handling of the exit orders the rest.

use super::RingFault;
use crate::memory::Mapping;
use jailer::sandbox::SEALS;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::io;
use std::num::{NonZeroUsize, Wrapping};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::{AtomicAccess, Bytes, VolatileSlice};

/// The version of the layout, and the mark of a part that was in use.
const VERSION: u16 = 1;
const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_INDEX_AT: usize = 14;
const HEADER: usize = 16;
const ENTRY: usize = 16;
const NEXT_IN_ENTRY: usize = 6;
const COUNTER_IN_ENTRY: usize = 8;
const ALIGNMENT: usize = 64;

/// Bytes of one queue's part.
const fn part_size(queue_size: u16) -> usize {
    (HEADER + ENTRY * queue_size as usize).next_multiple_of(ALIGNMENT)
}

/// A mapped region for all queues.
#[derive(Clone, Debug)]
pub(crate) struct InflightRegion {
    mapping: Arc<Mapping>,
    queues: u16,
    queue_size: u16,
}

impl InflightRegion {
    /// Makes a zeroed region for `queues` rings of up to `queue_size` entries in a memfd that nobody
    /// can resize. Before lockdown.
    pub(crate) fn create(queues: u16, queue_size: u16) -> io::Result<(Self, OwnedFd)> {
        let size = usize::from(queues) * part_size(queue_size);
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create(c"inflight", flags)?;
        nix::unistd::ftruncate(&fd, size as i64)?;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SEALS))?;
        let length = NonZeroUsize::new(size).ok_or(io::ErrorKind::InvalidInput)?;
        let mapping = Arc::new(Mapping::new(&fd, 0, length)?);
        let region = Self {
            mapping,
            queues,
            queue_size,
        };
        Ok((region, fd))
    }

    /// Maps a region that a front end kept (SET_INFLIGHT_FD).
    ///
    /// # Errors
    /// When its size does not fit what it says, or the file is shorter than that.
    pub(crate) fn adopt(
        fd: &OwnedFd,
        offset: u64,
        size: u64,
        queues: u16,
        queue_size: u16,
    ) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let needed = usize::from(queues) * part_size(queue_size);
        let length = usize::try_from(size).ok().and_then(NonZeroUsize::new);
        let length = length.filter(|length| length.get() >= needed);
        let length = length.ok_or_else(|| invalid("in-flight region too small for its queues"))?;
        let end = offset
            .checked_add(size)
            .ok_or_else(|| invalid("in-flight region ends past 2^64"))?;
        let file_size = nix::sys::stat::fstat(fd)?.st_size;
        if u64::try_from(file_size).is_ok_and(|file_size| file_size < end) {
            return Err(invalid("in-flight region longer than its file"));
        }
        let mapping = Arc::new(Mapping::new(fd.as_fd(), offset, length)?);
        Ok(Self {
            mapping,
            queues,
            queue_size,
        })
    }

    /// The same memory for fewer queues or smaller rings.
    pub(crate) fn shaped(&self, queues: u16, queue_size: u16) -> Self {
        Self {
            mapping: Arc::clone(&self.mapping),
            queues: queues.min(self.queues),
            queue_size: queue_size.min(self.queue_size),
        }
    }

    /// Bytes in use.
    pub(crate) fn size(&self) -> usize {
        usize::from(self.queues) * part_size(self.queue_size)
    }

    /// Queues that have a part.
    pub(crate) fn queues(&self) -> u16 {
        self.queues
    }

    /// Entries of each part.
    pub(crate) fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// Forgets everything: a device reset.
    pub(crate) fn zero(&self) {
        if let Some(all) = self.mapping.slice(0, self.size()) {
            zero(&all);
        }
    }

    /// The part of one queue whose ring has `ring_size` entries.
    pub(crate) fn queue(&self, index: u16, ring_size: u16) -> Option<InflightQueue> {
        (index < self.queues && ring_size <= self.queue_size).then(|| InflightQueue {
            mapping: Arc::clone(&self.mapping),
            start: usize::from(index) * part_size(self.queue_size),
            length: part_size(self.queue_size),
            ring_size,
            desc_num: self.queue_size,
            counter: 0,
        })
    }
}

fn zero(slice: &VolatileSlice<'_>) {
    const BLOCK: [u8; 4096] = [0; 4096];
    for offset in (0..slice.len()).step_by(BLOCK.len()) {
        let left = (slice.len() - offset).min(BLOCK.len());
        if let Ok(part) = slice.subslice(offset, left) {
            part.copy_from(&BLOCK[..left]);
        }
    }
}

/// One queue's part of the region.
#[derive(Debug)]
pub(crate) struct InflightQueue {
    mapping: Arc<Mapping>,
    start: usize,
    length: usize,
    ring_size: u16,
    desc_num: u16,
    /// The next value of an entry's counter.
    counter: u64,
}

/// The part was found in the mapping, which does not change: cannot be.
const LOST: RingFault = RingFault::Inflight("it is not mapped");

impl InflightQueue {
    /// Step 1, when a chain is taken: its number, then the mark.
    pub(super) fn take(&mut self, head: u16) -> Result<(), RingFault> {
        let entry = self.entry(head)?;
        self.store(entry + COUNTER_IN_ENTRY, self.counter)?;
        self.counter += 1;
        self.store(entry, 1u8)
    }

    /// Step 2, before a batch is published: the chain joins the list of the batch.
    pub(super) fn link(&mut self, head: u16) -> Result<(), RingFault> {
        let entry = self.entry(head)?;
        let last: u16 = self.load(LAST_BATCH_HEAD_AT)?;
        self.store(entry + NEXT_IN_ENTRY, last)?;
        self.store(LAST_BATCH_HEAD_AT, head)
    }

    /// Step 3, when the used index tells the driver: the chain is no longer in flight.
    pub(super) fn clear(&mut self, head: u16) -> Result<(), RingFault> {
        let entry = self.entry(head)?;
        self.store(entry, 0u8)
    }

    /// Step 4: the batch is over.
    pub(super) fn set_used_index(&mut self, used_index: u16) -> Result<(), RingFault> {
        self.store(USED_INDEX_AT, used_index)
    }

    /// Takes over from a predecessor. `None`: the part is new. Otherwise the heads to execute again,
    /// oldest first; what the driver was told of is not among them.
    ///
    /// The used index in the ring differs from the region's if the predecessor died between steps
    /// 2 and 4 with the ring's index already written; the difference is the size of the batch whose
    /// marks may be stale.
    pub(super) fn recover(&mut self, ring_used_index: u16) -> Result<Option<Vec<u16>>, RingFault> {
        let version: u16 = self.load(VERSION_AT)?;
        if version == 0 {
            // A predecessor that was not dead yet may have marked a chain after the part was emptied.
            zero(&self.part()?);
            self.store(DESC_NUM_AT, self.desc_num)?;
            self.store(USED_INDEX_AT, ring_used_index)?;
            self.store(VERSION_AT, VERSION)?;
            return Ok(None);
        }
        let desc_num: u16 = self.load(DESC_NUM_AT)?;
        if version != VERSION || desc_num != self.desc_num {
            return Err(RingFault::Inflight("it has another version or size"));
        }
        self.finish_last_batch(ring_used_index)?;
        let mut pending = Vec::new();
        for head in 0..self.ring_size {
            let entry = self.entry(head)?;
            if self.load::<u8>(entry)? != 0 {
                pending.push((self.load::<u64>(entry + COUNTER_IN_ENTRY)?, head));
            }
        }
        pending.sort_unstable();
        let last = pending.last().map_or(0, |(counter, _)| *counter);
        self.counter = last
            .checked_add(1)
            .ok_or(RingFault::Inflight("its counter overflows"))?;
        Ok(Some(pending.into_iter().map(|(_, head)| head).collect()))
    }

    fn finish_last_batch(&mut self, ring_used_index: u16) -> Result<(), RingFault> {
        let region_used_index: u16 = self.load(USED_INDEX_AT)?;
        let batch = (Wrapping(ring_used_index) - Wrapping(region_used_index)).0;
        if batch > self.ring_size {
            return Err(RingFault::Inflight("its used index is not near the ring's"));
        }
        let mut head: u16 = self.load(LAST_BATCH_HEAD_AT)?;
        for _ in 0..batch {
            let entry = self.entry(head)?;
            self.store(entry, 0u8)?;
            head = self.load(entry + NEXT_IN_ENTRY)?;
        }
        self.set_used_index(ring_used_index)
    }

    fn entry(&self, head: u16) -> Result<usize, RingFault> {
        let inside = head < self.ring_size;
        inside
            .then_some(HEADER + usize::from(head) * ENTRY)
            .ok_or(RingFault::Inflight("it names a head outside the ring"))
    }

    fn part(&self) -> Result<VolatileSlice<'_>, RingFault> {
        self.mapping.slice(self.start, self.length).ok_or(LOST)
    }

    fn load<T: AtomicAccess>(&self, offset: usize) -> Result<T, RingFault> {
        self.part()?.load(offset, Ordering::Acquire).map_err(|_| LOST)
    }

    fn store<T: AtomicAccess>(&self, offset: usize, value: T) -> Result<(), RingFault> {
        #[cfg(test)]
        super::tests::crash::point()?;
        self.part()?
            .store(value, offset, Ordering::Release)
            .map_err(|_| LOST)
    }
}
