//! Disk images: what a guest sees as a row of bytes, whatever the files look like.
//!
//! A disk's queues share one [`Image`] and call it from several threads at once, so every method
//! takes `&self`. Two calls on overlapping ranges may happen in any order (virtio 1.3, 5.2.6: the
//! driver orders them by waiting for completions), but each must leave the metadata whole.
//!
//! Buffers are [`VolatileSlice`]s of guest memory: the guest may change them while they are read,
//! so an engine never makes a `&[u8]` of them. Moving them to and from a file without a copy is
//! [`crate::io::read_exact_at`] and [`crate::io::write_all_at`].

use std::io;
use vm_memory::VolatileSlice;

mod raw;

pub use raw::RawImage;

/// An open disk image.
///
/// The device checks every request against [`Image::capacity`] before it calls, so `offset` plus
/// the length of the buffers never exceeds the capacity, and all are multiples of 512. A method
/// that changes the image is never called on a read-only one.
///
/// A call that returns `Ok` has taken effect for every later call, also after this process is
/// killed; only [`Image::flush`] makes it survive the host.
pub trait Image: Send + Sync {
    /// Size of the virtual disk in bytes; a multiple of 512; constant.
    fn capacity(&self) -> u64;

    /// Whether the image was opened without the right to write.
    fn read_only(&self) -> bool;

    /// Whether [`Image::discard`] can give space back. False takes VIRTIO_BLK_F_DISCARD from the
    /// guest: advertising it on an image that cannot misleads some guests.
    fn can_discard(&self) -> bool;

    /// The unit in bytes that discards are best aligned to (a cluster); a multiple of 512.
    fn discard_granularity(&self) -> u64;

    /// Fills `buffers` from `offset`.
    ///
    /// # Errors
    /// When the host cannot read, or the image's metadata does not hold together.
    fn read(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<()>;

    /// Writes `buffers` at `offset`.
    ///
    /// # Errors
    /// When the host cannot write, or the image's metadata does not hold together.
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
}
