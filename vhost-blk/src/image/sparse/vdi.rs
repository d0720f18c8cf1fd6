//! VirtualBox disk images: a table of 1 MiB blocks.

use super::fields::{check_table, entry, le32, le64, read};
use super::{Blocks, Piece};
use crate::image::{BlockFile, ImageError};

const SIGNATURE: u32 = 0xbeda_107f;
const VERSION: u32 = 0x0001_0001;
const DYNAMIC: u32 = 1;
const STATIC: u32 = 2;
const BLOCK: u64 = 1 << 20;
/// Entries from here on have no block: discarded (…fe) or never written (…ff).
const NO_BLOCK: u32 = 0xffff_fffe;

pub(super) struct Vdi {
    capacity: u64,
    table: u64,
    data: u64,
}

impl Vdi {
    pub(super) fn open(file: &dyn BlockFile, file_size: u64) -> Result<Self, ImageError> {
        let header = read(file, 0, 512)?;
        let refuse = |field, reason: String| Err(ImageError::refused(field, reason));
        if le32(&header, 0x40) != SIGNATURE {
            return refuse("signature", "this is no vdi image".to_owned());
        }
        if le32(&header, 0x44) != VERSION {
            return refuse("version", format!("{:#x} is not 1.1", le32(&header, 0x44)));
        }
        let kind = le32(&header, 0x4c);
        let links = &header[0x1a8..0x1c8];
        if ![DYNAMIC, STATIC].contains(&kind) || links.iter().any(|byte| *byte != 0) {
            return refuse(
                "image type",
                "a differencing image needs its parent: merge them first".to_owned(),
            );
        }
        if u64::from(le32(&header, 0x178)) != BLOCK || le32(&header, 0x168) != 512 {
            return refuse(
                "block size",
                "only blocks of 1 MiB and sectors of 512 are known".to_owned(),
            );
        }
        let (capacity, entries) = (le64(&header, 0x170), u64::from(le32(&header, 0x180)));
        if capacity.div_ceil(BLOCK) > entries {
            return refuse(
                "blocks in image",
                format!("{entries} are too few for {capacity} bytes"),
            );
        }
        let (table, data) = (u64::from(le32(&header, 0x154)), u64::from(le32(&header, 0x158)));
        if table < 512 || data < 512 {
            return refuse("offset of the block map", "it lies in the header".to_owned());
        }
        check_table("block map", table, entries, 4, file_size)?;
        Ok(Self {
            capacity: capacity.next_multiple_of(512),
            table,
            data,
        })
    }
}

impl Blocks for Vdi {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn locate(&self, file: &dyn BlockFile, offset: u64, len: u64) -> Result<Piece, ImageError> {
        let within = offset % BLOCK;
        let len = len.min(BLOCK - within);
        let block = u32::from_le_bytes(entry(file, self.table, offset / BLOCK)?);
        Ok(match block {
            NO_BLOCK.. => Piece::Zero { len },
            block => Piece::Host {
                offset: self.data + u64::from(block) * BLOCK + within,
                len,
            },
        })
    }
}
