//! Inflating compressed clusters, with the output bounded by one cluster whatever the input says.

use std::io::Read;

use super::geometry::Geometry;
use super::header::Compression;
use crate::image::ImageError;

/// Inflates `packed`, which ends somewhere in its last sector, to exactly one cluster.
pub(super) fn inflate(
    packed: &[u8],
    compression: Compression,
    geometry: &Geometry,
) -> Result<Vec<u8>, ImageError> {
    let size = geometry.cluster_bytes();
    // One byte more than a cluster: a stream that fills it is too long.
    let mut plain = vec![0; size + 1];
    let len = match compression {
        Compression::Deflate => inflate_deflate(packed, &mut plain)?,
        Compression::Zstd => inflate_zstd(packed, &mut plain)?,
    };
    match len {
        len if len == size => {
            plain.truncate(size);
            Ok(plain)
        }
        len if len < size => Err(ImageError::corrupt(
            "compressed cluster",
            format!("inflates to {len} bytes, less than a cluster"),
        )),
        _ => Err(ImageError::corrupt(
            "compressed cluster",
            "inflates to more than a cluster",
        )),
    }
}

fn inflate_deflate(packed: &[u8], plain: &mut [u8]) -> Result<usize, ImageError> {
    let mut state = flate2::Decompress::new(false);
    state
        .decompress(packed, plain, flate2::FlushDecompress::Finish)
        .map_err(|error| ImageError::corrupt("compressed cluster", format!("cannot be inflated: {error}")))?;
    Ok(usize::try_from(state.total_out()).unwrap_or(usize::MAX))
}

fn inflate_zstd(packed: &[u8], plain: &mut [u8]) -> Result<usize, ImageError> {
    let broken =
        |reason: String| ImageError::corrupt("compressed cluster", format!("cannot be inflated: {reason}"));
    let mut decoder =
        ruzstd::decoding::StreamingDecoder::new(packed).map_err(|error| broken(error.to_string()))?;
    let mut len = 0;
    while len < plain.len() {
        match decoder.read(&mut plain[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) => return Err(broken(error.to_string())),
        }
    }
    Ok(len)
}
