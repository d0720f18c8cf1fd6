//! qcow2, versions 2 and 3, for reading and writing (QEMU's `docs/interop/qcow2`).
//!
//! What keeps an image whole when the process or the host dies:
//! - Host clusters are reserved in runs ahead of use (`alloc`): their refcounts are durable and their
//!   content is durably zero before the first of them is used. A crash leaks what was not used.
//! - A write to a cluster that read as zeros needs no barrier of its own: whichever of data and L2 entry
//!   reaches the disk, the cluster shows zeros or the new data. Where old data would be replaced (a
//!   backing file, a snapshot, a compressed cluster) a barrier stands between data and L2 ([`write`]).
//! - L2 entries go to the file before the write completes: no mapping lives in this process alone.
//! - Clusters are freed (refcount lowered, hole punched, reused) only after a barrier behind the L2
//!   change, and after all I/O that may still know the old place has ended (`free`); holes in an external
//!   data file are made after that barrier too (`holes`).
//! - The disk grows by its last step, the size in the header (`grow`).
//!
//! A limit: where damage has left a mapped data cluster with a refcount of 0, a reservation takes it for free
//! and clears it. Metadata is known and never taken; finding mapped data would take a scan of all L2 tables.
//! Writing in place to such a cluster is refused (`map`) while it is free, reserved or a table.
//! `qemu-img check -r` repairs it.
//!
//! One lock guards the metadata; it is never held while guest data moves.

mod alloc;
mod bitmaps;
mod cache;
mod check;
mod compressed;
mod create;
mod discard;
mod draft;
mod entry;
mod extensions;
mod free;
mod geometry;
mod grow;
mod header;
mod holes;
mod info;
mod map;
mod open;
mod progress;
mod read;
mod refcount;
mod repair;
mod snapshot;
mod structure;
mod tables;
mod write;

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vm_memory::VolatileSlice;

use super::{BlockFile, Buffers, Extent, Image, ImageError, IoGuard, Resolved, check_range};
use cache::Cache;
pub use check::{Repair, check};
pub use create::{CreateOptions, check_shrinkable, create, shrink};
use entry::Compressed;
use geometry::Geometry;
use header::Compression;
pub use info::info;
pub use progress::Progress;
use read::Piece;
use refcount::Refcounts;
pub use snapshot::{apply, delete, take};

/// What a host cluster that holds no guest data is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Header,
    Table(&'static str),
    Refblock,
    L2,
    /// Two L1 entries point to it.
    SharedL2,
    /// Reserved ahead of use; nothing is mapped there.
    Reserved,
}

/// An open qcow2 image.
pub struct Qcow2 {
    file: Arc<dyn BlockFile>,
    /// The external data file, or `file` again.
    data: Arc<dyn BlockFile>,
    geometry: Geometry,
    /// Bytes that requests may reach.
    size: AtomicU64,
    /// The disk's end as allocations see it: past `size` while the disk grows. Changes under the lock.
    limit: AtomicU64,
    growth: Mutex<grow::Growth>,
    compression: Compression,
    /// The external data file must stay a consistent raw image.
    raw_data: bool,
    backing: Option<Arc<dyn Image>>,
    read_only: bool,
    corrupt: AtomicBool,
    meta: Mutex<Meta>,
    /// An allocation in flight has ended.
    allocated: Condvar,
    /// I/O on host clusters that has not ended, by the parity of the epoch it began in.
    in_flight: [AtomicU64; 2],
    /// The compressed cluster inflated last.
    inflated: Mutex<Option<(Compressed, Arc<Vec<u8>>)>>,
}

/// What the one lock guards.
struct Meta {
    l1: Vec<u64>,
    l1_offset: u64,
    l2: Cache,
    refcounts: Refcounts,
    /// Length of the file in bytes, rounded up to clusters.
    file_end: u64,
    /// What is no place for guest data, by host cluster; filled for writable images.
    kinds: HashMap<u64, Kind>,
    reserve: alloc::Reserve,
    freed: free::Freed,
    holes: holes::Holes,
    /// Guest clusters whose allocation is in flight, or a hole in their place.
    busy: Vec<Range<u64>>,
    /// Host clusters allocated here whose unallocated subclusters are still durably zero.
    fresh: HashSet<u64>,
    epoch: u64,
    /// What must be done before the first write: header fields, bitmaps.
    unprepared: Option<bitmaps::Preparation>,
}

impl Qcow2 {
    fn lock(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn limit(&self) -> u64 {
        self.limit.load(Ordering::Acquire)
    }

    /// Guest bytes that the backing file has something to show for.
    fn covered(&self) -> u64 {
        self.backing.as_ref().map_or(0, |backing| backing.capacity())
    }

    fn is_writable(&self) -> Result<(), ImageError> {
        let corrupt = self.corrupt.load(Ordering::Relaxed);
        if self.read_only || corrupt {
            Err(ImageError::ReadOnly { corrupt })
        } else {
            Ok(())
        }
    }

    /// Begins I/O on host clusters that were just looked up, under the lock.
    fn guard(&self, meta: &Meta) -> IoGuard<'_> {
        let count = &self.in_flight[(meta.epoch & 1) as usize];
        count.fetch_add(1, Ordering::Relaxed);
        IoGuard(Some(count))
    }

    fn judge<T>(&self, result: Result<T, ImageError>) -> io::Result<T> {
        self.note(result).map_err(io::Error::from)
    }

    /// Notes a contradiction in the image: from now on it is read-only.
    fn note<T>(&self, result: Result<T, ImageError>) -> Result<T, ImageError> {
        if let Err(error @ ImageError::Corrupt { .. }) = &result
            && !self.read_only
            && !self.corrupt.swap(true, Ordering::Relaxed)
        {
            tracing::error!(%error, "the image turns read-only");
            if let Err(error) = self.set_corrupt_bit() {
                tracing::error!(%error, "cannot set the corrupt bit");
            }
        }
        result
    }

    /// Incompatible bit 1; version 2 has none.
    fn set_corrupt_bit(&self) -> io::Result<()> {
        if self.geometry.version < 3 {
            return Ok(());
        }
        let mut word = [0; 8];
        self.file.read_at(&mut word, header::INCOMPATIBLE_OFFSET)?;
        let features = u64::from_be_bytes(word) | header::CORRUPT;
        self.file
            .write_at(&features.to_be_bytes(), header::INCOMPATIBLE_OFFSET)?;
        self.file.sync()
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        self.is_writable()?;
        check_range(offset, len, self.size())
    }

    /// Makes everything written durable, in the order data, metadata.
    fn barrier(&self) -> Result<(), ImageError> {
        if self.geometry.external_data {
            self.data
                .sync()
                .map_err(ImageError::io("flush the external data file"))?;
        }
        self.file.sync().map_err(ImageError::io("flush the image"))
    }
}

impl Image for Qcow2 {
    fn capacity(&self) -> u64 {
        self.size()
    }

    fn grow(&self, capacity: u64, deadline: Option<Instant>) -> Result<(), ImageError> {
        self.note(self.grow_disk(capacity, deadline))
    }

    fn read_only(&self) -> bool {
        self.is_writable().is_err()
    }

    fn can_discard(&self) -> bool {
        !self.read_only && (self.geometry.version >= 3 || self.backing.is_none())
    }

    fn discard_granularity(&self) -> u64 {
        self.geometry.cluster_size()
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let to = Buffers::new(buffers);
        check_range(offset, to.len() as u64, self.size())?;
        self.judge(self.read_buffers(to, offset))
    }

    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let from = Buffers::new(buffers);
        self.check_write(offset, from.len() as u64)?;
        self.judge(self.with_room(|| self.write_buffers(from, offset)))
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.judge(self.flush_and_free())
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_write(offset, length)?;
        self.judge(self.with_room(|| self.discard_range(offset, length)))
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.check_write(offset, length)?;
        self.judge(self.with_room(|| self.zero_range(offset, length, unmap)))
    }

    fn resolve_read(&self, offset: u64, len: u64) -> io::Result<Resolved<'_>> {
        check_range(offset, len, self.size())?;
        let mut meta = self.lock();
        Ok(match self.judge(self.locate(&mut meta, offset, len))? {
            Piece::Zero { len } => Resolved::Zero { len },
            Piece::Host { offset, len } => match self.data.descriptor() {
                Some(file) => {
                    let way = self.data.way();
                    let extent = Extent {
                        file,
                        offset,
                        len,
                        way,
                    };
                    Resolved::Mapped(extent, self.guard(&meta))
                }
                None => Resolved::Elsewhere { len },
            },
            Piece::Packed { len, .. } => Resolved::Elsewhere { len },
            Piece::Below { len } => {
                drop(meta);
                match &self.backing {
                    Some(backing) => return backing.resolve_read(offset, len),
                    None => Resolved::Zero { len },
                }
            }
        })
    }

    fn resolve_write(&self, offset: u64, len: u64) -> io::Result<Resolved<'_>> {
        self.check_write(offset, len)?;
        let mut meta = self.lock();
        let found = self.judge(self.in_place(&mut meta, offset, len))?;
        let mapped = found.and_then(|(offset, len)| {
            let file = self.data.descriptor_to_write(offset, len)?;
            let way = self.data.way();
            Some(Extent {
                file,
                offset,
                len,
                way,
            })
        });
        Ok(match mapped {
            Some(extent) => Resolved::Mapped(extent, self.guard(&meta)),
            None => Resolved::Elsewhere { len },
        })
    }

    fn close(&self) -> io::Result<()> {
        if self.is_writable().is_err() {
            return Ok(());
        }
        self.judge(self.flush_and_free())?;
        self.judge(self.release_reserve())
    }

    fn describe(&self) -> String {
        format!(
            "qcow2 version {}, {} bytes in clusters of {}{}{}",
            self.geometry.version,
            self.size(),
            self.geometry.cluster_size(),
            if self.backing.is_some() {
                ", with a backing file"
            } else {
                ""
            },
            if self.read_only { ", read-only" } else { "" },
        )
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(%error, "cannot give back what the image had reserved");
        }
    }
}
