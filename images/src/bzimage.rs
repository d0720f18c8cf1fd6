//! The uncompressed ELF kernel inside a bzImage (Linux x86 boot protocol 2.08 and up).
//!
//! The setup header says where the compressed payload lies in the protected-mode code; the
//! payload's own magic says how it is compressed.

use std::io::{Read, Write};

/// Most bytes that a kernel may unpack to.
const MAX_KERNEL: u64 = 1 << 30;
/// "HdrS" at 0x202 marks a setup header.
const HEADER_MAGIC: (usize, &[u8]) = (0x202, b"HdrS");
const ELF_MAGIC: &[u8] = b"\x7fELF";
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];

/// Why no ELF came out of a bzImage.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// No setup header, or one older than 2.08.
    #[error("no bzImage: the setup header is missing or older than boot protocol 2.08")]
    NoHeader,
    /// The header's payload lies outside the file.
    #[error("the payload ({offset:#x}, {length} bytes) lies outside the file")]
    Outside {
        /// First byte in the file.
        offset: usize,
        /// Length in bytes.
        length: usize,
    },
    /// A compression that Debian's kernels do not use.
    #[error("unknown compression of the payload (it starts with {0:02x?})")]
    Compression([u8; 4]),
    /// The decompressor's error.
    #[error("the payload does not decompress")]
    Corrupt(#[source] std::io::Error),
    /// Something came out, but no ELF.
    #[error("the decompressed payload is no ELF file")]
    NotElf,
}

/// Decompresses the ELF kernel from a whole bzImage.
///
/// # Errors
/// Any [`PayloadError`].
pub fn uncompressed_kernel(image: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let payload = payload(image)?;
    let mut kernel = Vec::with_capacity(payload.len().saturating_mul(4));
    match payload {
        [0xfd, b'7', b'z', b'X', ..] => drain(xz2::read::XzDecoder::new(payload), &mut kernel)?,
        _ if payload.starts_with(GZIP_MAGIC) => drain(flate2::read::GzDecoder::new(payload), &mut kernel)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(payload)
                .map_err(|error| PayloadError::Corrupt(std::io::Error::other(error.to_string())))?;
            drain(decoder, &mut kernel)?;
        }
        [0x02, 0x21, 0x4c, 0x18, ..] => legacy_lz4(&payload[4..], &mut kernel)?,
        [a, b, c, d, ..] => return Err(PayloadError::Compression([*a, *b, *c, *d])),
        _ => return Err(PayloadError::NotElf),
    }
    if kernel.starts_with(ELF_MAGIC) {
        Ok(kernel)
    } else {
        Err(PayloadError::NotElf)
    }
}

/// The compressed payload without the four bytes of length that the build appends; a gzip stream ends
/// with its length already, so nothing is appended.
fn payload(image: &[u8]) -> Result<&[u8], PayloadError> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?));
    let (at, magic) = HEADER_MAGIC;
    let version = image
        .get(0x206..0x208)
        .map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    if image.get(at..at + 4) != Some(magic) || version < 0x208 {
        return Err(PayloadError::NoHeader);
    }
    // A setup_sects of 0 means 4 (boot protocol, "setup_sects").
    let sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let offset = word(0x248).ok_or(PayloadError::NoHeader)? as usize + (sectors + 1) * 512;
    let length = word(0x24c).ok_or(PayloadError::NoHeader)? as usize;
    let end = offset.saturating_add(length);
    let payload = image
        .get(offset..end)
        .ok_or(PayloadError::Outside { offset, length })?;
    if payload.starts_with(GZIP_MAGIC) {
        return Ok(payload);
    }
    Ok(payload
        .split_last_chunk::<4>()
        .map_or(payload, |(stream, _)| stream))
}

fn drain(decoder: impl Read, kernel: &mut Vec<u8>) -> Result<(), PayloadError> {
    decoder
        .take(MAX_KERNEL)
        .read_to_end(kernel)
        .map(drop)
        .map_err(PayloadError::Corrupt)
}

/// The legacy frame of lz4: blocks of at most 8 MiB, each after its compressed length.
fn legacy_lz4(mut blocks: &[u8], kernel: &mut Vec<u8>) -> Result<(), PayloadError> {
    const BLOCK: usize = 8 << 20;
    let corrupt = |what: &str| PayloadError::Corrupt(std::io::Error::other(what.to_owned()));
    while let Some((length, rest)) = blocks.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let block = rest.get(..length).ok_or_else(|| corrupt("truncated lz4 block"))?;
        let data = lz4_flex::block::decompress(block, BLOCK).map_err(|error| corrupt(&error.to_string()))?;
        if kernel.len() + data.len() > MAX_KERNEL as usize {
            return Err(corrupt("too large"));
        }
        kernel.write_all(&data).map_err(PayloadError::Corrupt)?;
        blocks = &rest[length..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &[u8] = b"\x7fELF and then many zeroes \0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

    /// A bzImage with one setup sector around a compressed payload, as it lies there.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image
    }

    #[test]
    fn unpacks_each_compression() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(KERNEL).unwrap();
        let mut xz = xz2::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(KERNEL).unwrap();
        let zstd = ruzstd::encoding::compress_to_vec(KERNEL, ruzstd::encoding::CompressionLevel::Fastest);
        let block = lz4_flex::block::compress(KERNEL);
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        lz4.extend((block.len() as u32).to_le_bytes());
        lz4.extend(block);
        let gzip = gzip.finish().unwrap();
        assert_eq!(uncompressed_kernel(&image(&gzip)).unwrap(), KERNEL);
        for mut payload in [xz.finish().unwrap(), zstd, lz4] {
            // The build's, see arch/x86/boot/compressed/Makefile.
            payload.extend((KERNEL.len() as u32).to_le_bytes());
            assert_eq!(uncompressed_kernel(&image(&payload)).unwrap(), KERNEL);
        }
    }

    #[test]
    fn names_what_is_wrong() {
        assert!(matches!(uncompressed_kernel(b"MZ"), Err(PayloadError::NoHeader)));
        assert!(matches!(
            uncompressed_kernel(&image(b"????size")),
            Err(PayloadError::Compression(_))
        ));
        let mut short = image(b"????size");
        short.truncate(0x417);
        assert!(matches!(
            uncompressed_kernel(&short),
            Err(PayloadError::Outside { .. })
        ));
        assert!(matches!(
            uncompressed_kernel(&image(&[0x1f, 0x8b, 8, 0])),
            Err(PayloadError::Corrupt(_))
        ));
    }
}
