//! A recorded file that counts reads, and does something at a write, or once at the
//! end of a barrier or before it is cleared.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use vhost_blk::image::BlockFile;

use super::recorder::Recorder;

type BeforeWrite = dyn Fn(&[u8]) + Send + Sync;

pub struct Hooked {
    pub inner: Recorder,
    /// Given the bytes of each write, before it.
    pub before_write: Box<BeforeWrite>,
    /// At the end of the next barrier.
    pub after_sync: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// Before the next range is cleared.
    pub before_zero: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// Reads so far.
    pub reads: AtomicU64,
}

impl Hooked {
    pub fn new(inner: Recorder) -> Self {
        Self {
            inner,
            before_write: Box::new(|_| {}),
            after_sync: Mutex::new(None),
            before_zero: Mutex::new(None),
            reads: AtomicU64::new(0),
        }
    }
}

impl BlockFile for Hooked {
    fn size(&self) -> io::Result<u64> {
        self.inner.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        (self.before_write)(buf);
        self.inner.write_at(buf, offset)
    }

    fn write_durably(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.inner.write_durably(buf, offset)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        let hook = self.before_zero.lock().expect("nobody panicked").take();
        if let Some(hook) = hook {
            hook();
        }
        self.inner.zero_range(offset, len)
    }

    fn grow_to(&self, len: u64) -> io::Result<()> {
        self.inner.grow_to(len)
    }

    fn secure_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.grow_to(offset + len)
    }

    fn cut_to(&self, len: u64) -> io::Result<()> {
        self.inner.cut_to(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()?;
        let hook = self.after_sync.lock().expect("nobody panicked").take();
        if let Some(hook) = hook {
            hook();
        }
        Ok(())
    }

    fn identity(&self) -> io::Result<(u64, u64)> {
        self.inner.identity()
    }
}
