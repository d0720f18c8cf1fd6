//! The little of a qcow2 header that says what lies behind an image: the backing file's name and
//! format (QEMU's docs/interop/qcow2, Header). The image is untrusted: the guest may have
//! written it.

use vm_spec::spec::ImageFormat;

/// As much of a file's front as is looked at.
pub(crate) const FRONT: usize = 64 << 10;
/// `QFI\xfb`.
const MAGIC: &[u8] = b"QFI\xfb";
/// Header extension: the backing file's format.
const EXTENSION_BACKING_FORMAT: u32 = 0xE279_2ACA;
/// Longest backing file name (the format's own limit).
const LONGEST_NAME: u32 = 1023;
/// Most header extensions looked at.
const MOST_EXTENSIONS: usize = 64;

/// What lies behind an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Backing {
    pub(crate) name: String,
    pub(crate) format: ImageFormat,
}

/// Why a header was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("it does not start with the qcow2 magic")]
    NoMagic,
    #[error("qcow2 version {0} is neither 2 nor 3")]
    Version(u32),
    #[error("its header is cut short")]
    Truncated,
    #[error("the backing file's name is {0} bytes long, more than {LONGEST_NAME}")]
    NameTooLong(u32),
    #[error("the backing file's name is not UTF-8")]
    NameNotText,
    #[error("it does not name its backing file's format")]
    NoBackingFormat,
    #[error("its backing file's format '{0}' is none of raw, qcow2, vmdk, vdi, vhdx and vhd")]
    BackingFormat(String),
}

fn u32_at(bytes: &[u8], offset: usize) -> Result<u32, HeaderError> {
    let field = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    field
        .map(|b| u32::from_be_bytes(*b))
        .ok_or(HeaderError::Truncated)
}

fn u64_at(bytes: &[u8], offset: usize) -> Result<u64, HeaderError> {
    let field = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    field
        .map(|b| u64::from_be_bytes(*b))
        .ok_or(HeaderError::Truncated)
}

/// Reads the backing file's name and format from a file's front.
pub(crate) fn backing(front: &[u8]) -> Result<Option<Backing>, HeaderError> {
    if !front.starts_with(MAGIC) {
        return Err(HeaderError::NoMagic);
    }
    let header_length = match u32_at(front, 4)? {
        2 => 72,
        3 => u32_at(front, 100)? as usize,
        version => return Err(HeaderError::Version(version)),
    };
    let offset = usize::try_from(u64_at(front, 8)?).map_err(|_| HeaderError::Truncated)?;
    let length = u32_at(front, 16)?;
    if offset == 0 || length == 0 {
        return Ok(None);
    }
    if length > LONGEST_NAME {
        return Err(HeaderError::NameTooLong(length));
    }
    let name = front
        .get(offset..)
        .and_then(|rest| rest.get(..length as usize))
        .ok_or(HeaderError::Truncated)?;
    let name = str::from_utf8(name).map_err(|_| HeaderError::NameNotText)?;
    let format = backing_format(front.get(..offset).unwrap_or(&[]), header_length)?;
    Ok(Some(Backing {
        name: name.to_owned(),
        format,
    }))
}

/// Walks the header extensions, which lie between the header and the backing file's name.
fn backing_format(front: &[u8], mut at: usize) -> Result<ImageFormat, HeaderError> {
    for _ in 0..MOST_EXTENSIONS {
        let Ok(kind) = u32_at(front, at) else { break };
        let length = u32_at(front, at + 4)? as usize;
        let data = front
            .get(at + 8..)
            .and_then(|rest| rest.get(..length))
            .ok_or(HeaderError::Truncated)?;
        match kind {
            0 => break,
            EXTENSION_BACKING_FORMAT => {
                let name = String::from_utf8_lossy(data);
                return ImageFormat::named(&name)
                    .ok_or_else(|| HeaderError::BackingFormat(name.chars().take(32).collect()));
            }
            _ => at += 8 + length.next_multiple_of(8),
        }
    }
    Err(HeaderError::NoBackingFormat)
}
