//! The LUKS header (592 bytes, big-endian), checked.

use std::time::{Duration, Instant};

use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::SECTOR;
use super::hash::Hash;
use crate::image::{BlockFile, ImageError};

const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// A key slot that holds a key; 0x0000dead is one that does not.
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
/// Parts that a key is split into: the specification's number, which QEMU insists on too.
pub(super) const STRIPES: usize = 4000;
/// Most rounds of PBKDF2: what nobody asks for. What a host has time for is measured.
const MAX_ITERATIONS: u32 = 1 << 26;
/// Rounds that are measured at a time, some milliseconds, and how often: one may have been interrupted.
const MEASURED: (u32, u32) = (1 << 12, 4);
/// Longest header with its key material: bounds what is read; cryptsetup's and QEMU's are under 2 MiB.
const MAX_LENGTH: u64 = 16 << 20;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Fields {
    magic: [u8; 6],
    version: U16,
    cipher_name: [u8; 32],
    cipher_mode: [u8; 32],
    hash_spec: [u8; 32],
    payload_offset: U32,
    key_bytes: U32,
    mk_digest: [u8; 20],
    mk_digest_salt: [u8; 32],
    mk_digest_iter: U32,
    uuid: [u8; 40],
    key_slots: [SlotFields; 8],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SlotFields {
    active: U32,
    iterations: U32,
    salt: [u8; 32],
    key_material_offset: U32,
    stripes: U32,
}

/// A header whose every number has been checked.
pub(super) struct Header {
    pub(super) hash: Hash,
    /// 32 or 64.
    pub(super) key_len: usize,
    digest: [u8; 20],
    digest_salt: [u8; 32],
    digest_iterations: u32,
    /// The active ones.
    pub(super) slots: Vec<KeySlot>,
}

pub(super) struct KeySlot {
    pub(super) iterations: u32,
    pub(super) salt: [u8; 32],
    /// Offset from the header's start of the split key, which lies inside the header's area.
    pub(super) material: u64,
}

impl Header {
    /// Reads the header in `offset..offset + len`.
    pub(super) fn read(file: &dyn BlockFile, offset: u64, len: u64) -> Result<Self, ImageError> {
        if !(size_of::<Fields>() as u64..=MAX_LENGTH).contains(&len) {
            return Err(ImageError::refused(
                "encryption header length",
                format!("{len} is outside 592 to {MAX_LENGTH}"),
            ));
        }
        let mut bytes = [0; size_of::<Fields>()];
        file.read_at(&mut bytes, offset)
            .map_err(ImageError::io("read the encryption header"))?;
        let fields: Fields = zerocopy::transmute!(bytes);
        if fields.magic != MAGIC {
            return Err(ImageError::refused("LUKS magic", "this is no LUKS header"));
        }
        check(fields.version.get() == 1, "LUKS version", || {
            format!("{} is not supported; 1 is", fields.version)
        })?;
        check(text(&fields.cipher_name) == "aes", "LUKS cipher-name", || {
            format!("{:?} is not supported; aes is", text(&fields.cipher_name))
        })?;
        check(
            text(&fields.cipher_mode) == "xts-plain64",
            "LUKS cipher-mode",
            || format!("{:?} is not supported; xts-plain64 is", text(&fields.cipher_mode)),
        )?;
        let hash = Hash::named(&text(&fields.hash_spec)).ok_or_else(|| {
            let reason = format!("{:?} is not supported; sha256 is", text(&fields.hash_spec));
            ImageError::refused("LUKS hash-spec", reason)
        })?;
        let key_bytes = fields.key_bytes.get();
        check(matches!(key_bytes, 32 | 64), "LUKS key-bytes", || {
            format!("{key_bytes} is neither 32 nor 64")
        })?;
        check_iterations("LUKS mk-digest-iter", fields.mk_digest_iter.get())?;
        let mut slots = Vec::new();
        for slot in &fields.key_slots {
            slots.extend(key_slot(slot, u64::from(key_bytes), len)?);
        }
        Ok(Self {
            hash,
            key_len: key_bytes as usize,
            digest: fields.mk_digest,
            digest_salt: fields.mk_digest_salt,
            digest_iterations: fields.mk_digest_iter.get(),
            slots,
        })
    }

    /// How long a round of PBKDF2 takes here that makes a slot's key.
    pub(super) fn time_of_a_round(&self) -> Duration {
        let mut key = vec![0; self.key_len];
        let (rounds, times) = MEASURED;
        let measured = (0..times).map(|_| {
            let begun = Instant::now();
            self.hash.pbkdf2(&[0; 32], &self.digest_salt, rounds, &mut key);
            begun.elapsed() / rounds
        });
        measured.min().unwrap_or_default()
    }

    /// Rounds that trying a slot takes; those for the digest, which is no longer than the key, are as long at most.
    pub(super) fn rounds(&self, slot: &KeySlot) -> u32 {
        slot.iterations.saturating_add(self.digest_iterations)
    }

    /// Whether this is the key that the header has the digest of.
    pub(super) fn is_master_key(&self, key: &[u8]) -> bool {
        let mut digest = [0; 20];
        self.hash
            .pbkdf2(key, &self.digest_salt, self.digest_iterations, &mut digest);
        digest == self.digest
    }
}

fn key_slot(slot: &SlotFields, key_bytes: u64, len: u64) -> Result<Option<KeySlot>, ImageError> {
    match slot.active.get() {
        INACTIVE => return Ok(None),
        ACTIVE => {}
        other => {
            return Err(ImageError::refused(
                "LUKS key slot active",
                format!("{other:#x} says neither that it is nor that it is not"),
            ));
        }
    }
    let stripes = slot.stripes.get();
    check(stripes as usize == STRIPES, "LUKS key slot stripes", || {
        format!("{stripes} is not {STRIPES}")
    })?;
    check_iterations("LUKS key slot iterations", slot.iterations.get())?;
    let material = u64::from(slot.key_material_offset.get()) * SECTOR as u64;
    let inside = material >= size_of::<Fields>() as u64 && material + key_bytes * STRIPES as u64 <= len;
    check(inside, "LUKS key-material-offset", || {
        format!("{material:#x} lies outside the encryption header's {len} bytes")
    })?;
    Ok(Some(KeySlot {
        iterations: slot.iterations.get(),
        salt: slot.salt,
        material,
    }))
}

fn check_iterations(field: &'static str, count: u32) -> Result<(), ImageError> {
    check((1..=MAX_ITERATIONS).contains(&count), field, || {
        format!("{count} is outside 1 to {MAX_ITERATIONS}")
    })
}

fn check(holds: bool, field: &'static str, reason: impl FnOnce() -> String) -> Result<(), ImageError> {
    if holds {
        Ok(())
    } else {
        Err(ImageError::refused(field, reason()))
    }
}

/// A padded name, printable.
fn text(bytes: &[u8]) -> String {
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or(&[]);
    String::from_utf8_lossy(name).into_owned()
}
