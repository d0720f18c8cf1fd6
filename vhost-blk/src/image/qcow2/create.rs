//! Making an empty image: header, L1 table, refcounts.

use std::collections::BTreeSet;

use super::extensions;
use super::geometry::Geometry;
use super::header::{MAGIC, MAX_BACKING_NAME};
use super::structure::Structure;
use crate::image::{BlockFile, Format, ImageError, no_space};

/// Bytes of the header, up to compression_type and its padding.
const HEADER_LENGTH: u32 = 112;

/// What to make; always version 3.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Disk size in bytes; a multiple of 512.
    pub size: u64,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Compatible bit 0.
    pub lazy_refcounts: bool,
    /// Name and format of a backing file, as whoever opens the image is to find it.
    pub backing: Option<(String, Format)>,
}

impl CreateOptions {
    /// An image with QEMU's defaults.
    #[must_use]
    pub fn of_size(size: u64) -> Self {
        Self {
            size,
            cluster_bits: 16,
            lazy_refcounts: false,
            backing: None,
        }
    }
}

/// Writes an empty image to `file`, which is empty.
///
/// # Errors
/// [`ImageError::Refused`] names the option that is not acceptable; nothing has been written then.
pub fn create(file: &dyn BlockFile, options: &CreateOptions) -> Result<(), ImageError> {
    if !(9..=21).contains(&options.cluster_bits) {
        return Err(ImageError::refused(
            "cluster_bits",
            format!("{} is outside 9 to 21", options.cluster_bits),
        ));
    }
    let geometry = Geometry {
        cluster_bits: options.cluster_bits,
        extended_l2: false,
        external_data: false,
        encrypted: false,
        refcount_order: 4,
        version: 3,
    };
    let l1_size = super::grow::check_size(&geometry, options.size)?.max(1);
    let first = first_cluster(&geometry, l1_size as u32, options)?;
    let clusters = 1 + geometry.clusters_for(l1_size * 8);
    let end = geometry.offset_of(clusters);
    file.write_at(&first, 0)
        .and_then(|()| file.grow_to(end))
        .map_err(ImageError::io("write the header"))?;
    let mut counts = vec![1; clusters as usize];
    let structure = Structure::place(&geometry, &counts, &BTreeSet::new(), u64::MAX)?;
    let structure = structure.ok_or_else(|| ImageError::io("write refcounts")(no_space()))?;
    structure.write(file, &geometry, &mut counts)?;
    // Read back by the eyes of whoever opens it.
    super::open::read_header(file).map(drop)
}

fn first_cluster(geometry: &Geometry, l1_size: u32, options: &CreateOptions) -> Result<Vec<u8>, ImageError> {
    let mut first = vec![0; HEADER_LENGTH as usize];
    let mut put = |at: usize, bytes: &[u8]| first[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_be_bytes());
    put(4, &geometry.version.to_be_bytes());
    put(20, &geometry.cluster_bits.to_be_bytes());
    put(24, &options.size.to_be_bytes());
    put(36, &l1_size.to_be_bytes());
    put(40, &geometry.cluster_size().to_be_bytes());
    put(80, &u64::from(options.lazy_refcounts).to_be_bytes());
    put(96, &geometry.refcount_order.to_be_bytes());
    put(100, &HEADER_LENGTH.to_be_bytes());
    if let Some((name, format)) = &options.backing {
        let kind = format.to_string();
        // QEMU's name for the format.
        let kind = if *format == Format::Vhd { "vpc" } else { &kind };
        first.extend(extensions::BACKING_FORMAT.to_be_bytes());
        first.extend((kind.len() as u32).to_be_bytes());
        first.extend(kind.as_bytes());
        first.resize(first.len().next_multiple_of(8) + 8, 0);
        let (offset, length) = (first.len() as u64, name.len() as u32);
        first[8..16].copy_from_slice(&offset.to_be_bytes());
        first[16..20].copy_from_slice(&length.to_be_bytes());
        first.extend(name.as_bytes());
        if length == 0 || length > MAX_BACKING_NAME || first.len() > geometry.cluster_bytes() {
            return Err(ImageError::refused(
                "backing_file_size",
                format!("a name of {length} bytes is empty, over 1023 or does not fit the first cluster"),
            ));
        }
    }
    Ok(first)
}

/// Whether [`shrink`] can do it; reads only.
///
/// # Errors
/// [`ImageError::Refused`] where the image's features exclude it, or the disk is not so long.
pub fn check_shrinkable(file: &dyn BlockFile, size: u64) -> Result<(), ImageError> {
    let (header, _) = super::open::read_header(file)?;
    header.check_resizable()?;
    super::grow::check_size(&header.geometry, size)?;
    if size > header.size {
        return Err(ImageError::refused(
            "size",
            format!("{size} bytes are more than the disk's {}", header.size),
        ));
    }
    Ok(())
}

/// Makes the disk of an image that nobody has open smaller, after what lies behind its new end was cleared.
///
/// # Errors
/// As [`check_shrinkable`]; nothing has been written then.
pub fn shrink(file: &dyn BlockFile, size: u64) -> Result<(), ImageError> {
    check_shrinkable(file, size)?;
    file.write_at(&size.to_be_bytes(), super::header::SIZE_OFFSET)
        .and_then(|()| file.sync())
        .map_err(ImageError::io("write the header"))
}
