//! A file in memory that can run out of space.

use crate::image::BlockFile;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Where the disk is full.
const CAPACITY: u64 = 16 << 20;
/// [`MemoryFile::fail_after`] for never.
const NEVER: u32 = u32::MAX;

pub(super) struct MemoryFile {
    bytes: Mutex<Vec<u8>>,
    identity: u64,
    writes_left: AtomicU32,
    changes: AtomicU32,
}

impl MemoryFile {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            bytes: Mutex::new(bytes),
            identity: NEXT.fetch_add(1, Ordering::Relaxed),
            writes_left: AtomicU32::new(NEVER),
            changes: AtomicU32::new(0),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().expect("no panic")
    }

    /// All writes fail once `count` more are done; `None`: none does.
    pub(super) fn fail_after(&self, count: Option<u8>) {
        let count = count.map_or(NEVER, u32::from);
        self.writes_left.store(count, Ordering::Relaxed);
    }

    /// How often something was asked that may change the file.
    pub(super) fn changes(&self) -> u32 {
        self.changes.load(Ordering::Relaxed)
    }

    fn count_write(&self) -> io::Result<()> {
        self.changes.fetch_add(1, Ordering::Relaxed);
        match self.writes_left.load(Ordering::Relaxed) {
            NEVER => Ok(()),
            0 => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            left => {
                self.writes_left.store(left - 1, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    fn grown(&self, end: u64) -> io::Result<MutexGuard<'_, Vec<u8>>> {
        self.count_write()?;
        if end > CAPACITY {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let mut bytes = self.lock();
        if (bytes.len() as u64) < end {
            bytes.resize(end as usize, 0);
        }
        Ok(bytes)
    }
}

impl BlockFile for MemoryFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.lock().len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.lock();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let there = (bytes.len() - start).min(buf.len());
        buf[..there].copy_from_slice(&bytes[start..start + there]);
        buf[there..].fill(0);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        let mut bytes = self.grown(end.ok_or(io::ErrorKind::InvalidInput)?)?;
        bytes[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.count_write()?;
        let mut bytes = self.lock();
        let size = bytes.len() as u64;
        let (start, end) = (offset.min(size), offset.saturating_add(len).min(size));
        bytes[start as usize..end as usize].fill(0);
        Ok(())
    }

    fn grow_to(&self, len: u64) -> io::Result<()> {
        self.grown(len).map(drop)
    }

    fn secure_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.grow_to(offset + len)
    }

    fn cut_to(&self, len: u64) -> io::Result<()> {
        self.changes.fetch_add(1, Ordering::Relaxed);
        self.lock().truncate(usize::try_from(len).unwrap_or(usize::MAX));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn identity(&self) -> io::Result<(u64, u64)> {
        Ok((0, self.identity))
    }
}
