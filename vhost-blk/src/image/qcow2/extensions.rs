//! Header extensions. Unknown ones are skipped and, as nothing here rewrites them, kept.

use crate::image::ImageError;

const END: u32 = 0;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const ENCRYPTION: u32 = 0x0537_be77;
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE: u32 = 0x4441_5441;

/// Most bitmaps: bounds what invalidating them costs.
const MAX_BITMAPS: u32 = 65_535;
/// Most extensions looked at: each takes 8 bytes, and finding one that comes twice takes a look at all.
const MAX_EXTENSIONS: usize = 256;

/// What the extensions say.
#[derive(Clone, Debug, Default)]
pub(super) struct Extensions {
    pub(super) bitmaps: Option<Bitmaps>,
    pub(super) encryption: Option<EncryptionHeader>,
    /// Type, bit and name.
    features: Vec<(u8, u8, String)>,
    /// The external data file's name: shown to people, never used.
    pub(super) data_file: Option<String>,
    /// The backing file's format: shown to people, never used.
    pub(super) backing_format: Option<String>,
}

/// The bitmaps extension.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bitmaps {
    pub(super) count: u32,
    pub(super) directory_size: u64,
    pub(super) directory_offset: u64,
}

/// The full disk encryption header pointer: where the LUKS header and its key slots lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct EncryptionHeader {
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Extensions {
    /// Name of an incompatible feature.
    pub(super) fn feature_name(&self, bit: u8) -> Option<&str> {
        self.features
            .iter()
            .find(|(kind, b, _)| *kind == 0 && *b == bit)
            .map(|(_, _, name)| name.as_str())
    }
}

/// Parses the extensions in the first cluster, from the header's end to `end` (the backing name or the
/// cluster's end).
pub(super) fn parse(first: &[u8], start: u64, end: u64) -> Result<Extensions, ImageError> {
    let refuse = |reason: String| ImageError::refused("header extension", reason);
    let area = first
        .get(..usize::try_from(end).unwrap_or(usize::MAX).min(first.len()))
        .unwrap_or(first);
    let mut rest = area
        .get(usize::try_from(start).unwrap_or(usize::MAX)..)
        .unwrap_or(&[]);
    let mut all = Extensions::default();
    let mut seen = Vec::new();
    while let Some((head, body)) = rest.split_first_chunk::<8>() {
        let kind = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let length = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if kind == END {
            break;
        }
        let Some(data) = body.get(..length) else {
            return Err(refuse(format!(
                "{kind:#x} of {length} bytes runs past the first cluster"
            )));
        };
        if seen.contains(&kind) {
            return Err(refuse(format!("{kind:#x} appears twice")));
        }
        seen.push(kind);
        if seen.len() > MAX_EXTENSIONS {
            return Err(refuse(format!("there are more than {MAX_EXTENSIONS}")));
        }
        match kind {
            FEATURE_NAMES => all.features = feature_names(data),
            BITMAPS => all.bitmaps = Some(bitmaps(data)?),
            DATA_FILE => all.data_file = Some(String::from_utf8_lossy(data).into_owned()),
            BACKING_FORMAT => all.backing_format = Some(String::from_utf8_lossy(data).into_owned()),
            ENCRYPTION => all.encryption = Some(encryption(data)?),
            _ => {}
        }
        rest = body.get(length.next_multiple_of(8)..).unwrap_or(&[]);
    }
    Ok(all)
}

fn feature_names(data: &[u8]) -> Vec<(u8, u8, String)> {
    data.chunks_exact(48)
        .take(192)
        .map(|entry| {
            let name = entry[2..].split(|byte| *byte == 0).next().unwrap_or(&[]);
            (entry[0], entry[1], String::from_utf8_lossy(name).into_owned())
        })
        .collect()
}

fn encryption(data: &[u8]) -> Result<EncryptionHeader, ImageError> {
    let Ok(data) = <&[u8; 16]>::try_from(data) else {
        return Err(ImageError::refused(
            "header extension",
            format!(
                "the encryption header pointer is {} bytes long, not 16",
                data.len()
            ),
        ));
    };
    let word = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| data[at + i]));
    Ok(EncryptionHeader {
        offset: word(0),
        length: word(8),
    })
}

fn bitmaps(data: &[u8]) -> Result<Bitmaps, ImageError> {
    let refuse = |reason: String| ImageError::refused("bitmaps extension", reason);
    let Ok(data) = <&[u8; 24]>::try_from(data) else {
        return Err(refuse(format!("{} bytes long, not 24", data.len())));
    };
    let word = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| data[at + i]));
    let count = (word(0) >> 32) as u32;
    if count == 0 || count > MAX_BITMAPS {
        return Err(refuse(format!(
            "nb_bitmaps of {count} is outside 1 to {MAX_BITMAPS}"
        )));
    }
    if word(0) as u32 != 0 {
        return Err(refuse("the reserved field is not zero".to_owned()));
    }
    Ok(Bitmaps {
        count,
        directory_size: word(8),
        directory_offset: word(16),
    })
}
