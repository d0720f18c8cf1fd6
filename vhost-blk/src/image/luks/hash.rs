//! The hashes that LUKS headers name, for PBKDF2 and the anti-forensic splitter.

use pbkdf2::pbkdf2_hmac;
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::digest::Digest;
use sha2::{Sha224, Sha256, Sha384, Sha512};

/// A hash function, by the header's `hash-spec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    Ripemd160,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "ripemd160" => Self::Ripemd160,
            "sha1" => Self::Sha1,
            "sha224" => Self::Sha224,
            "sha256" => Self::Sha256,
            "sha384" => Self::Sha384,
            "sha512" => Self::Sha512,
            _ => return None,
        })
    }

    /// PBKDF2 with HMAC (RFC 8018).
    pub(super) fn pbkdf2(self, password: &[u8], salt: &[u8], iterations: u32, key: &mut [u8]) {
        match self {
            Self::Ripemd160 => pbkdf2_hmac::<Ripemd160>(password, salt, iterations, key),
            Self::Sha1 => pbkdf2_hmac::<Sha1>(password, salt, iterations, key),
            Self::Sha224 => pbkdf2_hmac::<Sha224>(password, salt, iterations, key),
            Self::Sha256 => pbkdf2_hmac::<Sha256>(password, salt, iterations, key),
            Self::Sha384 => pbkdf2_hmac::<Sha384>(password, salt, iterations, key),
            Self::Sha512 => pbkdf2_hmac::<Sha512>(password, salt, iterations, key),
        }
    }

    /// The splitter's diffusion: each part as long as a digest becomes the hash of its index and itself.
    pub(super) fn diffuse(self, block: &mut [u8]) {
        match self {
            Self::Ripemd160 => diffuse::<Ripemd160>(block),
            Self::Sha1 => diffuse::<Sha1>(block),
            Self::Sha224 => diffuse::<Sha224>(block),
            Self::Sha256 => diffuse::<Sha256>(block),
            Self::Sha384 => diffuse::<Sha384>(block),
            Self::Sha512 => diffuse::<Sha512>(block),
        }
    }
}

fn diffuse<D: Digest>(block: &mut [u8]) {
    for (index, part) in (0_u32..).zip(block.chunks_mut(<D as Digest>::output_size())) {
        let digest = D::new().chain_update(index.to_be_bytes()).chain_update(&*part);
        part.copy_from_slice(&digest.finalize()[..part.len()]);
    }
}
