//! Making the disk of a qcow2 image longer.

use std::os::fd::OwnedFd;

use super::{Format, HostFile, ImageError, OpenOptions, open, qcow2};

/// Makes a disk that is `old` bytes long `size` bytes long. What lies below it may be longer than it was,
/// and must not show behind its end: there are zeros before there is a new size.
///
/// # Errors
/// As [`qcow2::check_resizable`], or as [`open`]. The size is as before then.
pub fn grow_qcow2(
    top: OwnedFd,
    backing: Vec<(Format, OwnedFd)>,
    options: &OpenOptions,
    old: u64,
    size: u64,
) -> Result<(), ImageError> {
    let use_file = ImageError::io("use the image's file");
    let file = top.try_clone().and_then(HostFile::new).map_err(use_file)?;
    qcow2::grow_tables(&file, size)?;
    let grown = OpenOptions {
        size: Some(size),
        ..options.clone()
    };
    let image = open(top, Format::Qcow2, backing, &grown)?;
    image
        .write_zeroes(old, size - old, true)
        .and_then(|()| image.close())
        .map_err(ImageError::io("clear what the disk grows by"))?;
    drop(image);
    qcow2::set_size(&file, size)
}
