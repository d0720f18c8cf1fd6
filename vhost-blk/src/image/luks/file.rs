//! Guest data on its way to and from the file: the wall that no plaintext passes.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{Cipher, SECTOR};
use crate::image::{BlockFile, Buffers};

/// Bytes that are encrypted, and copied, at a time.
const CHUNK: usize = 128 << 10;

/// A file whose data is encrypted. A sector's tweak is its number in the file, as QEMU has it for LUKS in
/// qcow2.
///
/// It has no descriptor to give: nothing reaches the file but through the cipher. Holes do not read as
/// zeros.
pub(in crate::image) struct CryptFile {
    file: Arc<dyn BlockFile>,
    cipher: Cipher,
}

impl CryptFile {
    pub(in crate::image) fn new(file: Arc<dyn BlockFile>, cipher: Cipher) -> Self {
        Self { file, cipher }
    }

    /// Moves `len` bytes at `offset` chunk by chunk: `step` gets a buffer, the place in the file, its
    /// sector and how far it is.
    fn chunks(
        &self,
        offset: u64,
        len: usize,
        mut step: impl FnMut(&mut [u8], u64, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        if !offset.is_multiple_of(SECTOR as u64) || !len.is_multiple_of(SECTOR) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut buffer = vec![0; len.min(CHUNK)];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(CHUNK);
            step(&mut buffer[..part], offset + done as u64, done)?;
            done += part;
        }
        Ok(())
    }

    fn read_chunk(&self, chunk: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(chunk, offset)?;
        self.cipher.decrypt(chunk, offset / SECTOR as u64);
        Ok(())
    }

    fn write_chunk(&self, chunk: &mut [u8], offset: u64) -> io::Result<()> {
        self.cipher.encrypt(chunk, offset / SECTOR as u64);
        self.file.write_at(chunk, offset)
    }
}

impl BlockFile for CryptFile {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.chunks(offset, buf.len(), |chunk, offset, done| {
            self.read_chunk(chunk, offset)?;
            buf[done..done + chunk.len()].copy_from_slice(chunk);
            Ok(())
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.chunks(offset, buf.len(), |chunk, offset, done| {
            chunk.copy_from_slice(&buf[done..done + chunk.len()]);
            self.write_chunk(chunk, offset)
        })
    }

    fn read_buffers(&self, to: Buffers<'_>, offset: u64) -> io::Result<()> {
        self.chunks(offset, to.len(), |chunk, offset, done| {
            self.read_chunk(chunk, offset)?;
            to.window(done, chunk.len()).copy_from(chunk);
            Ok(())
        })
    }

    fn write_buffers(&self, from: Buffers<'_>, offset: u64) -> io::Result<()> {
        self.chunks(offset, from.len(), |chunk, offset, done| {
            from.window(done, chunk.len()).copy_to(chunk);
            self.write_chunk(chunk, offset)
        })
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut at = offset;
        let zeros = vec![0; CHUNK];
        while at < offset + len {
            let part = (offset + len - at).min(CHUNK as u64);
            self.write_at(&zeros[..part as usize], at)?;
            at += part;
        }
        Ok(())
    }

    fn discard_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard_range(offset, len)
    }

    fn grow_to(&self, len: u64) -> io::Result<()> {
        self.file.grow_to(len)
    }

    fn secure_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.secure_range(offset, len)
    }

    fn cut_to(&self, len: u64) -> io::Result<()> {
        self.file.cut_to(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn has_fixed_size(&self) -> bool {
        self.file.has_fixed_size()
    }

    fn identity(&self) -> io::Result<(u64, u64)> {
        self.file.identity()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
