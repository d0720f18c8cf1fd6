//! The read-only formats: vdi, vhd, vhdx and vmdk. Each knows where a block lies; reading is here.
//!
//! Tables of blocks stay in the file and are looked up as needed, so that memory does not grow with the
//! disk. Nothing that an image says is believed before it is held against the file's length.

mod fields;
mod vdi;
mod vhd;
mod vhdx;
mod vmdk;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::VolatileSlice;

use super::{
    BlockFile, Buffers, Extent, Format, Image, ImageError, IoGuard, OpenOptions, Resolved, SECTOR,
    check_range,
};

/// Where the start of a range lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece {
    /// At this offset of the file.
    Host {
        offset: u64,
        len: u64,
    },
    Zero {
        len: u64,
    },
    /// From byte `within` of a compressed block at this offset of the file.
    Packed {
        offset: u64,
        within: u64,
        len: u64,
    },
}

/// What a format knows: where blocks are.
trait Blocks: Send + Sync {
    /// Size of the disk in bytes.
    fn capacity(&self) -> u64;

    /// Where the start of a range (not empty, inside the disk) lies; at least one byte of it.
    fn locate(&self, file: &dyn BlockFile, offset: u64, len: u64) -> Result<Piece, ImageError>;

    /// The content of a compressed block.
    fn inflate(&self, _file: &dyn BlockFile, _offset: u64) -> Result<Vec<u8>, ImageError> {
        Err(ImageError::corrupt(
            "block",
            "this format has no compressed blocks",
        ))
    }
}

/// The compressed block that was inflated last: its offset and its content.
type Inflated = Mutex<Option<(u64, Arc<Vec<u8>>)>>;

/// An image in one of the read-only formats.
pub(super) struct SparseImage {
    file: Arc<dyn BlockFile>,
    blocks: Box<dyn Blocks>,
    file_size: u64,
    format: Format,
    inflated: Inflated,
}

impl SparseImage {
    /// Opens `file` as `format`.
    ///
    /// # Errors
    /// [`ImageError::Refused`] names what is not acceptable; opening for writing is.
    pub(super) fn open(
        file: Arc<dyn BlockFile>,
        format: Format,
        options: &OpenOptions,
    ) -> Result<Self, ImageError> {
        if !options.read_only {
            return Err(ImageError::refused(
                "format",
                format!("{format} images can only be read: open it read-only, or put a qcow2 overlay on it"),
            ));
        }
        let file_size = file
            .size()
            .map_err(ImageError::io("find the size of the image's file"))?;
        let blocks: Box<dyn Blocks> = match format {
            Format::Vdi => Box::new(vdi::Vdi::open(&*file, file_size)?),
            Format::Vhd => Box::new(vhd::Vhd::open(&*file, file_size)?),
            Format::Vhdx => Box::new(vhdx::Vhdx::open(&*file, file_size)?),
            Format::Vmdk => Box::new(vmdk::Vmdk::open(&*file, file_size)?),
            Format::Raw | Format::Qcow2 => {
                return Err(ImageError::refused("format", "it has an engine of its own"));
            }
        };
        let capacity = blocks.capacity();
        if capacity == 0 || !capacity.is_multiple_of(SECTOR) || i64::try_from(capacity).is_err() {
            return Err(ImageError::refused(
                "disk size",
                format!("{capacity} bytes is not a positive multiple of {SECTOR} below 2^63"),
            ));
        }
        Ok(Self {
            file,
            blocks,
            file_size,
            format,
            inflated: Mutex::new(None),
        })
    }

    fn locate(&self, offset: u64, len: u64) -> Result<Piece, ImageError> {
        let piece = self.blocks.locate(&*self.file, offset, len)?;
        if let Piece::Host { offset, len } = piece
            && offset.checked_add(len).is_none_or(|end| end > self.file_size)
        {
            return Err(ImageError::corrupt(
                "block table",
                format!(
                    "a block at {offset:#x} is past the file's end at {:#x}",
                    self.file_size
                ),
            ));
        }
        Ok(piece)
    }

    fn read_buffers(&self, to: Buffers<'_>, offset: u64) -> Result<(), ImageError> {
        let mut done = 0;
        while done < to.len() {
            let left = to.window(done, usize::MAX);
            let piece = self.locate(offset + done as u64, left.len() as u64)?;
            let window = left.window(0, piece.len() as usize);
            match piece {
                Piece::Zero { .. } => window.fill_zero(),
                Piece::Host { offset, .. } => self
                    .file
                    .read_buffers(window, offset)
                    .map_err(ImageError::io("read guest data"))?,
                Piece::Packed { offset, within, .. } => {
                    let plain = self.inflate(offset)?;
                    let part = usize::try_from(within).ok().and_then(|from| plain.get(from..));
                    let part = part.filter(|part| part.len() >= window.len()).ok_or_else(|| {
                        ImageError::corrupt("compressed block", "it inflates to less than its range")
                    })?;
                    window.copy_from(part);
                }
            }
            done += window.len();
        }
        Ok(())
    }

    fn inflate(&self, offset: u64) -> Result<Arc<Vec<u8>>, ImageError> {
        let mut last = self.inflated.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, plain)) = &*last
            && *known == offset
        {
            return Ok(Arc::clone(plain));
        }
        let plain = Arc::new(self.blocks.inflate(&*self.file, offset)?);
        *last = Some((offset, Arc::clone(&plain)));
        Ok(plain)
    }
}

impl Piece {
    fn len(&self) -> u64 {
        match *self {
            Self::Host { len, .. } | Self::Zero { len } | Self::Packed { len, .. } => len,
        }
    }
}

fn read_only() -> io::Error {
    ImageError::ReadOnly { corrupt: false }.into()
}

impl Image for SparseImage {
    fn capacity(&self) -> u64 {
        self.blocks.capacity()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn can_discard(&self) -> bool {
        false
    }

    fn discard_granularity(&self) -> u64 {
        SECTOR
    }

    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let to = Buffers::new(buffers);
        check_range(offset, to.len() as u64, self.capacity())?;
        Ok(self.read_buffers(to, offset)?)
    }

    fn write(&self, _buffers: &[VolatileSlice<'_>], _offset: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _offset: u64, _length: u64, _unmap: bool) -> io::Result<()> {
        Err(read_only())
    }

    fn resolve_read(&self, offset: u64, len: u64) -> io::Result<Resolved<'_>> {
        check_range(offset, len, self.capacity())?;
        Ok(match (self.locate(offset, len)?, self.file.descriptor()) {
            (Piece::Zero { len }, _) => Resolved::Zero { len },
            (Piece::Host { offset, len }, Some(file)) => {
                let way = self.file.way();
                let extent = Extent {
                    file,
                    offset,
                    len,
                    way,
                };
                Resolved::Mapped(extent, IoGuard::none())
            }
            (piece, _) => Resolved::Elsewhere { len: piece.len() },
        })
    }

    fn describe(&self) -> String {
        format!("{}, {} bytes, read-only", self.format, self.capacity())
    }
}
