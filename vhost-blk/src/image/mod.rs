//! Disk images: what the guest's disk looks like in files of the host.
//!
//! Everything is opened from descriptors that the launcher passed; no path is ever opened and no name
//! that an image contains is ever interpreted. The format is given, never probed.

mod buffers;
mod calls;
mod error;
mod file;
mod lock;
mod luks;
pub mod qcow2;
mod raw;
mod sparse;
mod syncs;

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use vm_memory::VolatileSlice;
use vm_spec::image::MAX_CHAIN;

pub use buffers::Buffers;
pub(crate) use calls::{answers_at_once, read_at_once};
pub use error::ImageError;
pub(crate) use error::{errno, no_space, says_no_space};
pub use file::{BlockFile, HostFile};
pub use lock::{lock, lock_within};
pub use luks::Passphrase;
pub use qcow2::Qcow2;
pub use raw::RawImage;
use sparse::SparseImage;

/// Bytes in a sector of virtio-blk (virtio 1.3, 5.2.4).
pub const SECTOR: u64 = 512;

/// The formats that the launcher may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The guest's bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// VMware's, in one file: monolithicSparse or streamOptimized. Read-only.
    Vmdk,
    /// VirtualBox's. Read-only.
    Vdi,
    /// Hyper-V's. Read-only.
    Vhdx,
    /// Virtual PC's, fixed or dynamic; QEMU calls it vpc. Read-only.
    Vhd,
}

impl FromStr for Format {
    type Err = ImageError;

    fn from_str(name: &str) -> Result<Self, ImageError> {
        match name {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            "vmdk" => Ok(Self::Vmdk),
            "vdi" => Ok(Self::Vdi),
            "vhdx" => Ok(Self::Vhdx),
            "vhd" | "vpc" => Ok(Self::Vhd),
            _ => Err(ImageError::refused(
                "format",
                format!("unknown format {name:?}; expected raw, qcow2, vmdk, vdi, vhdx or vhd"),
            )),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
            Self::Vhd => "vhd",
        })
    }
}

/// How data of a host file is best moved, for an I/O engine that has its descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Way {
    /// By the image's own calls.
    #[default]
    Calls,
    /// Reads first by a call that does not wait (RWF_NOWAIT), which finds what is in the page cache, and what it
    /// lacks through a ring; writes by calls.
    Attempt,
    /// Through a ring at once.
    Ring,
}

/// A range of a host file.
#[derive(Debug)]
pub struct Extent<'a> {
    /// The file to submit to.
    pub file: BorrowedFd<'a>,
    /// First byte in that file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// How to move it.
    pub way: Way,
}

/// Where the start of a guest range lies; `len` is never more than what was asked for, and never 0
/// unless that was.
#[derive(Debug)]
pub enum Resolved<'a> {
    /// In one piece in a host file. Submit it there and drop the guard when it has completed.
    Mapped(Extent<'a>, IoGuard<'a>),
    /// Reads as zeros (reads only).
    Zero {
        /// Length in bytes.
        len: u64,
    },
    /// Only [`Image::read`] or [`Image::write`] can do it: it needs an allocation, inflating or another
    /// layer.
    Elsewhere {
        /// Length in bytes.
        len: u64,
    },
}

/// Keeps the host clusters of a resolved range from being given to other data while I/O on them runs.
#[derive(Debug)]
#[must_use]
pub struct IoGuard<'a>(Option<&'a AtomicU64>);

impl<'a> IoGuard<'a> {
    /// For images whose mapping never changes.
    pub(crate) fn none() -> Self {
        Self(None)
    }
}

impl Drop for IoGuard<'_> {
    fn drop(&mut self) {
        if let Some(count) = self.0 {
            count.fetch_sub(1, Ordering::Release);
        }
    }
}

/// A disk image, shared by all queues.
///
/// The device checks every request against [`Image::capacity`] before it calls, so `offset` plus the
/// length of the buffers never exceeds the capacity (an engine refuses it all the same), and all are
/// multiples of 512. Two calls on overlapping ranges may happen in any order (virtio 1.3, 5.2.6), but
/// each leaves the metadata whole.
///
/// A write that returns `Ok` has taken effect for every later call, also after this process is killed;
/// only [`Image::flush`] makes it survive the host. The errors are [`ImageError`]s, wrapped.
pub trait Image: Send + Sync {
    /// Size of the disk in bytes; a multiple of 512. Only [`Image::grow`] changes it.
    fn capacity(&self) -> u64;

    /// Makes the disk `capacity` bytes long, which is no less than it is; the new part reads as zeros. Other
    /// calls may run meanwhile. A qcow2 image's new size is durable when this returns, a raw image's after
    /// the next [`Image::flush`].
    ///
    /// # Errors
    /// [`ImageError::Refused`] where this image cannot, or not so far, or where clearing the new part lasts
    /// past the `deadline`: the same call goes on where that one was. `Io` when the host fails. The disk is
    /// as long as before then.
    fn grow(&self, _capacity: u64, _deadline: Option<Instant>) -> Result<(), ImageError> {
        Err(ImageError::refused(
            "size",
            "images of this format can only be read",
        ))
    }

    /// Whether every write is refused (now: it may turn so when the image is found corrupt).
    fn read_only(&self) -> bool;

    /// Whether [`Image::discard`] can give space back. False takes VIRTIO_BLK_F_DISCARD from the
    /// guest: advertising it on an image that cannot misleads some guests.
    fn can_discard(&self) -> bool;

    /// The unit in bytes that discards are best aligned to (a cluster); a multiple of 512.
    fn discard_granularity(&self) -> u64;

    /// The request size in bytes that suits the image best (`opt_io_size`, virtio 1.3, 5.2.4); a multiple
    /// of 512.
    fn optimal_io_size(&self) -> u64 {
        self.discard_granularity()
    }

    /// Fills `buffers` from `offset`.
    ///
    /// # Errors
    /// When the host cannot read, or the image's metadata does not hold together; the content of
    /// `buffers` is then undefined.
    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()>;

    /// Writes `buffers` at `offset`.
    ///
    /// # Errors
    /// When the host cannot write, or the image's metadata does not hold together; any part of the
    /// range may then have been written.
    fn write(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()>;

    /// Makes everything that completed before the call durable (data and metadata).
    ///
    /// # Errors
    /// When the host fails to write back; what was written since the last flush may be lost.
    fn flush(&self) -> io::Result<()>;

    /// Says that the guest has no use for the range: it may be given back to the host, or kept.
    ///
    /// # Errors
    /// As [`Image::write`].
    fn discard(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes the range read as zeros; `unmap` allows to give the space back.
    ///
    /// # Errors
    /// As [`Image::write`].
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()>;

    /// Where the start of a range lies, for an I/O engine that reads by itself.
    ///
    /// # Errors
    /// As [`Image::read`].
    fn resolve_read(&self, _offset: u64, len: u64) -> io::Result<Resolved<'_>> {
        Ok(Resolved::Elsewhere { len })
    }

    /// Where the start of a range lies, for an I/O engine that overwrites it in place by itself.
    ///
    /// # Errors
    /// As [`Image::write`].
    fn resolve_write(&self, _offset: u64, len: u64) -> io::Result<Resolved<'_>> {
        Ok(Resolved::Elsewhere { len })
    }

    /// Flushes, and gives back what was reserved ahead of use. Called when the device has been drained;
    /// the image stays usable.
    ///
    /// # Errors
    /// As [`Image::flush`].
    fn close(&self) -> io::Result<()> {
        if self.read_only() { Ok(()) } else { self.flush() }
    }

    /// One line for the log.
    fn describe(&self) -> String {
        format!("{} bytes", self.capacity())
    }
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Refuse every write; a dirty or corrupt image may be opened so.
    pub read_only: bool,
    /// The top's external data file (incompatible bit 2).
    pub data_file: Option<Arc<OwnedFd>>,
    /// Opens the layers that are encrypted; the top must be one of them, so that what is secret below is
    /// not written in the clear above.
    pub passphrase: Option<Arc<Passphrase>>,
    /// Most bytes of mapping tables kept in memory, for each layer.
    pub l2_cache_size: usize,
    /// How an I/O engine moves data of the host's files that is in the page cache; [`Way::Attempt`] only of those
    /// that can say that they would wait.
    pub way: Way,
    /// The host failed to write back what a predecessor wrote: no flush may succeed any more.
    pub writes_lost: bool,
    /// Holes in the host's files resolve as zeros: for who reads all of a disk. Looking for them takes system calls.
    pub tells_holes: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            data_file: None,
            passphrase: None,
            l2_cache_size: 8 << 20,
            way: Way::Calls,
            writes_lost: false,
            tells_holes: false,
        }
    }
}

/// Fails unless `offset..offset + len` lies inside the disk.
pub(crate) fn check_range(offset: u64, len: u64, capacity: u64) -> Result<(), ImageError> {
    match offset.checked_add(len) {
        Some(end) if end <= capacity => Ok(()),
        _ => Err(ImageError::OutOfRange {
            offset,
            len,
            capacity,
        }),
    }
}

/// Opens the image in `top`, with the layers below it in `backing`, from top to base. Each file is locked
/// ([`lock`]) through its open file description.
///
/// # Errors
/// [`ImageError::Refused`] names what is not acceptable; no file has been changed then.
/// [`ImageError::Locked`] when somebody else uses one of the files.
pub fn open(
    top: OwnedFd,
    format: Format,
    backing: Vec<(Format, OwnedFd)>,
    options: &OpenOptions,
) -> Result<Arc<dyn Image>, ImageError> {
    let mut layers = vec![(format, locked_file(top, options)?)];
    let below_top = OpenOptions {
        read_only: true,
        way: options.way,
        tells_holes: options.tells_holes,
        ..OpenOptions::default()
    };
    for (index, (format, fd)) in backing.into_iter().enumerate() {
        let file = locked_file(fd, &below_top).map_err(|source| below(index + 1, source))?;
        layers.push((format, file));
    }
    open_layers(layers, data_file(options)?, options)
}

/// The external data file of `options`, locked as [`open`] does.
///
/// # Errors
/// [`ImageError::Locked`] when somebody else uses it; `Io` when it is no file of use.
pub fn data_file(options: &OpenOptions) -> Result<Option<Arc<dyn BlockFile>>, ImageError> {
    let data = options.data_file.as_ref().map(|fd| fd.try_clone()).transpose();
    data.map_err(ImageError::io("use the external data file"))?
        .map(|fd| locked_file(fd, options))
        .transpose()
}

fn below(depth: usize, source: ImageError) -> ImageError {
    ImageError::Backing {
        depth,
        source: Box::new(source),
    }
}

fn locked_file(fd: OwnedFd, options: &OpenOptions) -> Result<Arc<dyn BlockFile>, ImageError> {
    let file = host_file(fd, options).map_err(ImageError::io("use the image's file"))?;
    if let Some(fd) = file.descriptor() {
        lock(fd, options.read_only)?;
    }
    Ok(Arc::new(file))
}

/// A file that is written to, unless `options` say otherwise.
pub(crate) fn host_file(fd: OwnedFd, options: &OpenOptions) -> io::Result<HostFile> {
    let file = if options.writes_lost {
        HostFile::after_loss(fd)
    } else {
        HostFile::new(fd)
    };
    Ok(file?.moved_by(options.way).telling_holes(options.tells_holes))
}

/// [`open`] on files of any kind, from top to base; `data` is the top's external data file.
///
/// # Errors
/// As [`open`].
pub fn open_layers(
    layers: Vec<(Format, Arc<dyn BlockFile>)>,
    mut data: Option<Arc<dyn BlockFile>>,
    options: &OpenOptions,
) -> Result<Arc<dyn Image>, ImageError> {
    check_chain(&layers, data.as_ref())?;
    if options.passphrase.is_some()
        && let Some((format, file)) = layers.first()
        && (*format != Format::Qcow2 || !Qcow2::is_encrypted(&**file)?)
    {
        return Err(ImageError::refused(
            "passphrase",
            "one was passed but the image is not encrypted",
        ));
    }
    let mut lower: Option<Arc<dyn Image>> = None;
    for (depth, (format, file)) in layers.into_iter().enumerate().rev() {
        let options = OpenOptions {
            read_only: options.read_only || depth > 0,
            ..options.clone()
        };
        let image = open_layer(format, file, data.take_if(|_| depth == 0), lower.take(), &options);
        lower = Some(image.map_err(|source| match depth {
            0 => source,
            _ => below(depth, source),
        })?);
    }
    lower.ok_or_else(|| ImageError::refused("chain", "no image was given"))
}

fn check_chain(
    layers: &[(Format, Arc<dyn BlockFile>)],
    data: Option<&Arc<dyn BlockFile>>,
) -> Result<(), ImageError> {
    if layers.len() > MAX_CHAIN {
        return Err(ImageError::refused(
            "chain",
            format!(
                "{} layers are more than the {MAX_CHAIN} that are supported",
                layers.len()
            ),
        ));
    }
    let mut seen = Vec::new();
    for file in layers.iter().map(|(_, file)| file).chain(data) {
        let identity = file
            .identity()
            .map_err(ImageError::io("examine the image's file"))?;
        if seen.contains(&identity) {
            return Err(ImageError::refused("chain", "one file appears twice"));
        }
        seen.push(identity);
    }
    Ok(())
}

fn open_layer(
    format: Format,
    file: Arc<dyn BlockFile>,
    data: Option<Arc<dyn BlockFile>>,
    below: Option<Arc<dyn Image>>,
    options: &OpenOptions,
) -> Result<Arc<dyn Image>, ImageError> {
    match (format, below) {
        (Format::Qcow2, below) => Ok(Arc::new(Qcow2::open(file, data, below, options)?)),
        (format, _) if data.is_some() => Err(ImageError::refused(
            "external data file",
            format!("one was passed, but a {format} image has none"),
        )),
        (format, Some(_)) => Err(ImageError::refused(
            "backing file",
            format!("one was passed, but a {format} image has none"),
        )),
        (Format::Raw, None) => Ok(Arc::new(RawImage::on(file, options.read_only)?)),
        (format, None) => Ok(Arc::new(SparseImage::open(file, format, options)?)),
    }
}
