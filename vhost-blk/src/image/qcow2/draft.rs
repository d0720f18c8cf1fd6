//! A change of the tables as it would be: written to memory, over a file that stays as it is.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::image::{BlockFile, ImageError, no_space};

/// A file with writes that it does not get. For tables and header fields: each write is kept.
pub(super) struct Draft<'a> {
    file: &'a dyn BlockFile,
    state: Mutex<State>,
}

struct State {
    size: u64,
    /// Place and bytes, in the order they were written.
    writes: Vec<(u64, Vec<u8>)>,
}

impl<'a> Draft<'a> {
    pub(super) fn over(file: &'a dyn BlockFile) -> Result<Self, ImageError> {
        let size = file
            .size()
            .map_err(ImageError::io("find the size of the image's file"))?;
        Ok(Self {
            file,
            state: Mutex::new(State {
                size,
                writes: Vec::new(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts the part of `bytes`, which lie at `from`, that `buf` at `offset` covers there.
fn lay_over(buf: &mut [u8], offset: u64, bytes: &[u8], from: u64) {
    let start = from.max(offset);
    let end = (from + bytes.len() as u64).min(offset + buf.len() as u64);
    if start < end {
        let part = &bytes[(start - from) as usize..(end - from) as usize];
        buf[(start - offset) as usize..(end - offset) as usize].copy_from_slice(part);
    }
}

impl BlockFile for Draft<'_> {
    fn size(&self) -> io::Result<u64> {
        Ok(self.lock().size)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)?;
        for (from, bytes) in &self.lock().writes {
            lay_over(buf, offset, bytes, *from);
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.grow_to(offset + buf.len() as u64)?;
        self.lock().writes.push((offset, buf.to_vec()));
        Ok(())
    }

    fn zero_range(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn grow_to(&self, len: u64) -> io::Result<()> {
        let mut state = self.lock();
        if len > state.size && self.file.has_fixed_size() {
            return Err(no_space());
        }
        state.size = state.size.max(len);
        Ok(())
    }

    fn secure_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.grow_to(offset + len)
    }

    fn cut_to(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn has_fixed_size(&self) -> bool {
        self.file.has_fixed_size()
    }

    fn identity(&self) -> io::Result<(u64, u64)> {
        self.file.identity()
    }
}
