//! The little of a qcow2 header that says what an image wants beside itself: its backing file, by name and
//! format, a passphrase, a file for its data (QEMU's docs/interop/qcow2, Header). The image is untrusted: the
//! guest may have written it.

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

/// `crypt_method`: LUKS.
pub(crate) const LUKS: u32 = 2;
/// `incompatible_features`, bit 2: the data is in another file.
const EXTERNAL_DATA: u64 = 4;

/// What a header says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Wants {
    pub(crate) backing: Option<Backing>,
    /// 0: it is not encrypted.
    pub(crate) crypt_method: u32,
    pub(crate) data_file: bool,
}

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

/// Reads a file's front.
pub(crate) fn wants(front: &[u8]) -> Result<Wants, HeaderError> {
    if !front.starts_with(MAGIC) {
        return Err(HeaderError::NoMagic);
    }
    let (header_length, features) = match u32_at(front, 4)? {
        2 => (72, 0),
        3 => (u32_at(front, 100)? as usize, u64_at(front, 72)?),
        version => return Err(HeaderError::Version(version)),
    };
    Ok(Wants {
        backing: backing(front, header_length)?,
        crypt_method: u32_at(front, 32)?,
        data_file: features & EXTERNAL_DATA != 0,
    })
}

fn backing(front: &[u8], header_length: usize) -> Result<Option<Backing>, HeaderError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of version 3 with a format and a name behind it.
    fn header(format: &[u8], name: &[u8]) -> Vec<u8> {
        let mut front = vec![0; 104];
        front[..4].copy_from_slice(MAGIC);
        front[4..8].copy_from_slice(&3_u32.to_be_bytes());
        front[100..104].copy_from_slice(&104_u32.to_be_bytes());
        front.extend(EXTENSION_BACKING_FORMAT.to_be_bytes());
        front.extend((format.len() as u32).to_be_bytes());
        front.extend(format);
        front.resize(front.len().next_multiple_of(8), 0);
        front.extend([0; 8]);
        let offset = front.len() as u64;
        front[8..16].copy_from_slice(&offset.to_be_bytes());
        front[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        front.extend(name);
        front
    }

    fn backing_of(front: &[u8]) -> Result<Option<Backing>, HeaderError> {
        wants(front).map(|wants| wants.backing)
    }

    #[test]
    fn name_and_format_are_read() {
        let wanted = Backing {
            name: "base.img".to_owned(),
            format: ImageFormat::Raw,
        };
        assert_eq!(backing_of(&header(b"raw", b"base.img")), Ok(Some(wanted)));
        assert_eq!(backing_of(&header(b"raw", b"")), Ok(None));
    }

    #[test]
    fn encryption_and_a_data_file_are_seen() {
        let mut front = header(b"raw", b"");
        let plain = wants(&front).unwrap();
        assert_eq!((plain.crypt_method, plain.data_file), (0, false));
        front[35] = 2;
        front[79] = 5;
        let both = wants(&front).unwrap();
        assert_eq!((both.crypt_method, both.data_file), (LUKS, true));
        // Version 2 has no features: something else is there.
        front[7] = 2;
        assert!(!wants(&front).unwrap().data_file);
    }

    #[test]
    fn bad_headers_are_refused() {
        let good = header(b"raw", b"base.img");
        assert_eq!(backing_of(b"QFX"), Err(HeaderError::NoMagic));
        assert_eq!(backing_of(&good[..good.len() - 1]), Err(HeaderError::Truncated));
        assert_eq!(backing_of(&good[..50]), Err(HeaderError::Truncated));
        let changed = |at: usize, bytes: &[u8]| {
            let mut front = good.clone();
            front[at..at + bytes.len()].copy_from_slice(bytes);
            backing_of(&front)
        };
        assert_eq!(changed(4, &[0, 0, 0, 4]), Err(HeaderError::Version(4)));
        assert_eq!(changed(8, &[255; 8]), Err(HeaderError::Truncated));
        assert_eq!(changed(16, &[0, 0, 4, 0]), Err(HeaderError::NameTooLong(1024)));
        assert_eq!(changed(100, &[255; 4]), Err(HeaderError::NoBackingFormat));
        assert_eq!(changed(108, &[255; 4]), Err(HeaderError::Truncated));
        assert_eq!(
            backing_of(&header(b"tar", b"base")),
            Err(HeaderError::BackingFormat("tar".to_owned()))
        );
        assert_eq!(
            backing_of(&header(b"raw", b"\xff")),
            Err(HeaderError::NameNotText)
        );
    }
}
