//! LUKS version 1 inside qcow2 (crypt_method 2): from a passphrase to the cipher of guest data.
//!
//! The header (cryptsetup's "LUKS1 On-Disk Format Specification", 2.3) is untrusted like the rest of the
//! image: what it asks for in time and memory is bounded before any of it is spent.

mod file;
mod hash;
mod header;

use std::io::Read;
use std::time::{Duration, Instant};

use aes::cipher::KeyInit;
use aes::{Aes128, Aes256};
use xts_mode::{Xts128, get_tweak_default};
use zeroize::Zeroizing;

use super::{BlockFile, ImageError};
pub(super) use file::CryptFile;
use hash::Hash;
use header::{Header, KeySlot};

/// Bytes that are encrypted under one tweak.
const SECTOR: usize = 512;
/// For all key slots of one layer that are tried: the vmm waits 30 s for the first answer of a device's process, which comes
/// after the image was opened.
const PATIENCE: Duration = Duration::from_secs(25);
/// Longest passphrase or key file in bytes; cryptsetup's limit for one that is typed.
const MAX_PASSPHRASE: usize = 512;

/// What opens an encrypted image. The bytes are forgotten when it is dropped, and never printed.
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// Takes all that `source` holds, a last newline included, as QEMU's secret objects and cryptsetup's
    /// key files do.
    ///
    /// # Errors
    /// When it cannot be read, is empty or over 512 bytes (`InvalidInput`).
    pub fn read(source: impl Read) -> std::io::Result<Self> {
        let invalid = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidInput, what.to_owned());
        // Of its final size at once: a copy left behind by growth would not be cleared.
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_PASSPHRASE + 1));
        source.take(MAX_PASSPHRASE as u64 + 1).read_to_end(&mut bytes)?;
        match bytes.len() {
            0 => Err(invalid("the passphrase is empty")),
            1..=MAX_PASSPHRASE => Ok(Self(bytes)),
            _ => Err(invalid("the passphrase is over 512 bytes long")),
        }
    }
}

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase")
    }
}

/// AES-XTS whose tweak is the sector's number, little-endian ("plain64").
pub(super) enum Cipher {
    Aes128(Box<Xts128<Aes128>>),
    Aes256(Box<Xts128<Aes256>>),
}

impl Cipher {
    /// Both halves of an XTS key: 32 or 64 bytes.
    fn new(key: &[u8]) -> Option<Self> {
        let (data, tweak) = key.split_at(key.len() / 2);
        match key.len() {
            32 => {
                let half = |key| Aes128::new_from_slice(key).ok();
                Some(Self::Aes128(Box::new(Xts128::new(half(data)?, half(tweak)?))))
            }
            64 => {
                let half = |key| Aes256::new_from_slice(key).ok();
                Some(Self::Aes256(Box::new(Xts128::new(half(data)?, half(tweak)?))))
            }
            _ => None,
        }
    }

    /// `area` is whole sectors, of which the first has number `sector`.
    fn encrypt(&self, area: &mut [u8], sector: u64) {
        match self {
            Self::Aes128(xts) => xts.encrypt_area(area, SECTOR, sector.into(), get_tweak_default),
            Self::Aes256(xts) => xts.encrypt_area(area, SECTOR, sector.into(), get_tweak_default),
        }
    }

    /// The reverse of [`Self::encrypt`].
    fn decrypt(&self, area: &mut [u8], sector: u64) {
        match self {
            Self::Aes128(xts) => xts.decrypt_area(area, SECTOR, sector.into(), get_tweak_default),
            Self::Aes256(xts) => xts.decrypt_area(area, SECTOR, sector.into(), get_tweak_default),
        }
    }
}

/// Checks the header in `offset..offset + len` of `file` without a passphrase.
///
/// # Errors
/// [`ImageError::Refused`] names the field of the header.
pub(super) fn check(file: &dyn BlockFile, offset: u64, len: u64) -> Result<(), ImageError> {
    Header::read(file, offset, len).map(|_| ())
}

/// Opens the header in `offset..offset + len` of `file`, trying each active key slot.
///
/// # Errors
/// [`ImageError::Refused`] names the field of the header, or says that no slot takes the passphrase.
pub(super) fn unlock(
    file: &dyn BlockFile,
    offset: u64,
    len: u64,
    passphrase: &Passphrase,
) -> Result<Cipher, ImageError> {
    let header = Header::read(file, offset, len)?;
    let begun = Instant::now();
    let round = header.time_of_a_round();
    for slot in &header.slots {
        let needed = begun.elapsed() + round.saturating_mul(header.rounds(slot));
        if needed > PATIENCE {
            return Err(ImageError::refused(
                "LUKS key slot iterations",
                format!(
                    "{} would be tried for {} s, and a disk may take {} s to open; give the passphrase a key \
                     slot with fewer, or erase the slots before its own",
                    slot.iterations,
                    needed.as_secs(),
                    PATIENCE.as_secs()
                ),
            ));
        }
        let key = master_key(file, offset, &header, slot, passphrase)?;
        if header.is_master_key(&key)
            && let Some(cipher) = Cipher::new(&key)
        {
            return Ok(cipher);
        }
    }
    Err(ImageError::refused(
        "passphrase",
        format!(
            "it opens none of the image's {} key slots; a newline at the end of a key file counts",
            header.slots.len()
        ),
    ))
}

/// What a key slot yields with this passphrase: the master key, or noise.
fn master_key(
    file: &dyn BlockFile,
    offset: u64,
    header: &Header,
    slot: &KeySlot,
    passphrase: &Passphrase,
) -> Result<Zeroizing<Vec<u8>>, ImageError> {
    let mut slot_key = Zeroizing::new(vec![0; header.key_len]);
    header
        .hash
        .pbkdf2(&passphrase.0, &slot.salt, slot.iterations, &mut slot_key);
    let mut split = Zeroizing::new(vec![0; header.key_len * header::STRIPES]);
    file.read_at(&mut split, offset + slot.material)
        .map_err(ImageError::io("read a key slot"))?;
    if let Some(cipher) = Cipher::new(&slot_key) {
        cipher.decrypt(&mut split, 0);
    }
    Ok(merge(&split, header.key_len, header.hash))
}

/// The anti-forensic splitter's reverse: every byte of `split` is needed for any of the key.
fn merge(split: &[u8], key_len: usize, hash: Hash) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; key_len]);
    let stripes = split.len() / key_len;
    for (index, stripe) in split.chunks_exact(key_len).enumerate() {
        key.iter_mut()
            .zip(stripe)
            .for_each(|(byte, other)| *byte ^= other);
        if index + 1 < stripes {
            hash.diffuse(&mut key);
        }
    }
    key
}
