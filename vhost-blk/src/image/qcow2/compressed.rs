//! Inflating compressed clusters, with the output bounded by one cluster whatever the input says.

use std::io::Read;

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use super::geometry::Geometry;
use super::header::Compression;
use crate::image::ImageError;

/// Largest window of a zstd frame: what every decoder is to have room for (RFC 8878, 3.1.1.1.2), and four
/// times the largest cluster. The decoder keeps so much before anything comes out, and one block more.
const MAX_WINDOW: u64 = 8 << 20;

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

fn inflate_zstd(mut packed: &[u8], plain: &mut [u8]) -> Result<usize, ImageError> {
    let broken =
        |reason: String| ImageError::corrupt("compressed cluster", format!("cannot be inflated: {reason}"));
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(MAX_WINDOW);
    let mut len = 0;
    // What follows the frames, up to the sector's end, is none.
    while len + 1 < plain.len() && !packed.is_empty() {
        let mut frame = match StreamingDecoder::new_with_decoder(&mut packed, &mut decoder) {
            Ok(frame) => frame,
            Err(_) if len > 0 => break,
            Err(error) => return Err(broken(error.to_string())),
        };
        while len < plain.len() {
            match frame.read(&mut plain[len..]) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) => return Err(broken(error.to_string())),
            }
        }
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        cluster_bits: 16,
        extended_l2: false,
        external_data: false,
        encrypted: false,
        refcount_order: 4,
        version: 3,
    };

    /// Why a frame with this window descriptor (RFC 8878, 3.1.1.1.2) and these blocks is refused.
    fn refusal(window: u8, blocks: &[u8]) -> String {
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, window];
        frame.extend(blocks);
        let result = inflate(&frame, Compression::Zstd, &GEOMETRY);
        result.expect_err("is refused").to_string()
    }

    fn block(last: bool, kind: u32, size: u32, content: &[u8]) -> Vec<u8> {
        let header = u32::from(last) | kind << 1 | size << 3;
        let mut block = header.to_le_bytes()[..3].to_vec();
        block.extend(content);
        block
    }

    #[test]
    fn a_cluster_may_be_several_frames() {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let half = |byte| vec![byte; GEOMETRY.cluster_bytes() / 2];
        let pack = |bytes: &[u8]| ruzstd::encoding::compress_to_vec(bytes, level);
        let one = pack(&half(1));
        for padding in [0, 200] {
            let both = [one.clone(), pack(&half(2)), vec![0; padding]].concat();
            let plain = inflate(&both, Compression::Zstd, &GEOMETRY).expect("inflates");
            assert!(plain == [half(1), half(2)].concat());
            for (packed, reason) in [
                ([one.clone(), vec![0; padding]].concat(), "less than a cluster"),
                (
                    [&one[..], &pack(&[half(1), half(2)].concat())].concat(),
                    "more than a cluster",
                ),
            ] {
                let refusal = inflate(&packed, Compression::Zstd, &GEOMETRY).expect_err("is refused");
                assert!(refusal.to_string().contains(reason), "{refusal}");
            }
        }
    }

    /// 4 bytes make 128 KiB, and nothing comes out before the window is full.
    #[test]
    fn a_frame_has_no_large_window() {
        let blocks: Vec<u8> = (0..2048).flat_map(|_| block(false, 1, 128 << 10, &[7])).collect();
        for (window, reason) in [
            (13 << 3, "more than a cluster"),
            (13 << 3 | 1, "window_size is too big"),
            (21 << 3, "window_size is too big"),
            (31 << 3 | 7, "TooBig"),
        ] {
            let refusal = refusal(window, &blocks);
            assert!(refusal.contains(reason), "{window:#x}: {refusal}");
        }
        // One segment: its content's size takes the window's place.
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
        frame.extend((1_u32 << 31).to_le_bytes());
        frame.extend(&blocks);
        let refusal = inflate(&frame, Compression::Zstd, &GEOMETRY).expect_err("is refused");
        assert!(
            refusal.to_string().contains("window_size is too big"),
            "{refusal}"
        );
    }

    /// 2 bytes of a sequence whose codes are given once for all make 128 KiB of match.
    #[test]
    fn a_block_does_not_grow_past_its_limit() {
        let sequences: u16 = 0x7000;
        let mut content = vec![0];
        content.extend((sequences | 0x8000).to_be_bytes());
        // All three codes by RLE: no literals, the second repeated offset, the longest match.
        content.extend([0x54, 0, 0, 52]);
        content.extend(vec![0xff; usize::from(sequences) * 2]);
        content.push(1);
        let mut blocks = block(false, 0, 8, &[1; 8]);
        blocks.extend(block(true, 2, content.len() as u32, &content));
        let refusal = refusal(13 << 3, &blocks);
        assert!(refusal.contains("TooManyBytesGenerated"), "{refusal}");
    }
}
