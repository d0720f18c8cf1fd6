//! Making the disk of a qcow2 image longer.

use std::sync::Arc;

use super::{BlockFile, Format, ImageError, OpenOptions, open_layers, qcow2};

/// Makes a disk that is `old` bytes long `size` bytes long; `layers` from top to base. What lies below it
/// may be longer than it was, and must not show behind its end: there are zeros before there is a new size.
///
/// # Errors
/// As [`qcow2::check_resizable`], or as [`open_layers`]. The size is as before then.
pub fn grow_qcow2(
    layers: Vec<(Format, Arc<dyn BlockFile>)>,
    options: &OpenOptions,
    old: u64,
    size: u64,
) -> Result<(), ImageError> {
    let Some((_, file)) = layers.first().cloned() else {
        return Err(ImageError::refused("chain", "no image was given"));
    };
    qcow2::grow_tables(&*file, size)?;
    let grown = OpenOptions {
        size: Some(size),
        ..options.clone()
    };
    let image = open_layers(layers, None, &grown)?;
    image
        .write_zeroes(old, size - old, true)
        .and_then(|()| image.close())
        .map_err(ImageError::io("clear what the disk grows by"))?;
    drop(image);
    qcow2::set_size(&*file, size)
}
