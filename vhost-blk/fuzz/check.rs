//! New qcow2 images, and what must hold of one at any moment: our own reading of the specification
//! (QEMU's `docs/interop/qcow2`), which shares no code with the engine.

use arbitrary::Unstructured;
use std::collections::BTreeMap;

const DIRTY: u64 = 1;
const EXTENDED: u64 = 16;
const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// What an image is like.
pub(super) struct Shape {
    version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    extended: bool,
    lazy: bool,
    pub(super) backed: bool,
    /// What lies below it is longer.
    pub(super) longer: bool,
    /// Of the disk, in bytes.
    pub(super) size: u64,
}

impl Shape {
    pub(super) fn read(input: &mut Unstructured<'_>) -> Option<Self> {
        let [first, second, sectors] = input.arbitrary::<[u8; 3]>().ok()?;
        let version = if first & 1 == 0 { 3 } else { 2 };
        let extended = version == 3 && first & 2 != 0;
        let smallest = if extended { 14 } else { 9 };
        Some(Self {
            version,
            cluster_bits: smallest + u32::from(first >> 5 & 3),
            refcount_order: if version == 3 {
                u32::from(second & 7).min(6)
            } else {
                4
            },
            extended,
            lazy: version == 3 && first & 8 != 0,
            backed: first & 4 != 0,
            longer: first & 16 != 0,
            size: (u64::from(sectors) + 1) * 512 * (1 + u64::from(second >> 6)),
        })
    }

    /// An empty image: header, refcount table, one refcount block, L1 table.
    pub(super) fn image(&self) -> Vec<u8> {
        let cluster = 1u64 << self.cluster_bits;
        let entry = if self.extended { 16 } else { 8 };
        let l1_entries = self.size.div_ceil(cluster * (cluster / entry));
        let l1_clusters = (l1_entries * 8).div_ceil(cluster);
        let clusters = 3 + l1_clusters;
        let mut image = vec![0; (clusters * cluster) as usize];
        let incompatible = if self.extended { EXTENDED } else { 0 };
        put(&mut image, 0, &u32::from_be_bytes(*b"QFI\xfb").to_be_bytes());
        put(&mut image, 4, &self.version.to_be_bytes());
        put(&mut image, 20, &self.cluster_bits.to_be_bytes());
        put(&mut image, 24, &self.size.to_be_bytes());
        put(&mut image, 36, &(l1_entries as u32).to_be_bytes());
        put(&mut image, 40, &(3 * cluster).to_be_bytes());
        put(&mut image, 48, &cluster.to_be_bytes());
        put(&mut image, 56, &1u32.to_be_bytes());
        if self.version == 3 {
            put(&mut image, 72, &u64::to_be_bytes(incompatible));
            put(&mut image, 80, &u64::from(self.lazy).to_be_bytes());
            put(&mut image, 96, &self.refcount_order.to_be_bytes());
            put(&mut image, 100, &104u32.to_be_bytes());
        }
        if self.backed {
            // The engine is told what lies below; that it is named is all that counts.
            put(&mut image, 8, &504u64.to_be_bytes());
            put(&mut image, 16, &4u32.to_be_bytes());
            put(&mut image, 504, b"base");
        }
        put(&mut image, cluster as usize, &(2 * cluster).to_be_bytes());
        for number in 0..clusters {
            set_refcount(&mut image, (2 * cluster) as usize, self.refcount_order, number);
        }
        image
    }
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn set_refcount(image: &mut [u8], block: usize, order: u32, number: u64) {
    let bit = number as usize * (1 << order);
    match order {
        0..3 => image[block + bit / 8] |= 1 << (bit % 8),
        // Big-endian: the last byte of the entry.
        _ => image[block + bit / 8 + (1 << order) / 8 - 1] = 1,
    }
}

/// The parts of a header that the walk needs.
struct Walk<'i> {
    image: &'i [u8],
    cluster: u64,
    order: u32,
    extended: bool,
    /// References by host cluster, and whether a COPIED flag is on one of them.
    references: BTreeMap<u64, (u64, bool)>,
}

/// Every reference is inside the file and counted, COPIED means one; unless `leaks`, nothing else is
/// counted. An image that says that its refcounts are stale is not held to them.
pub(super) fn check(image: &[u8], leaks: bool) {
    let version = word(image, 4);
    let features = if version == 3 { long(image, 72) } else { 0 };
    let order = if version == 3 { word(image, 96) } else { 4 };
    let mut walk = Walk {
        image,
        cluster: 1 << word(image, 20),
        order,
        extended: features & EXTENDED != 0,
        references: BTreeMap::new(),
    };
    walk.refer(0, false);
    let table = (long(image, 48), u64::from(word(image, 56)));
    for index in 0..table.1 {
        walk.refer(table.0 + index * walk.cluster, false);
    }
    let blocks = walk.refcount_blocks(table);
    walk.tables(long(image, 40), word(image, 36).into());
    if features & DIRTY == 0 {
        walk.judge(&blocks, leaks);
    }
}

impl Walk<'_> {
    fn refer(&mut self, offset: u64, copied: bool) {
        assert!(offset.is_multiple_of(self.cluster), "{offset:#x} is not aligned");
        assert!(
            offset < self.image.len() as u64,
            "{offset:#x} lies past the file's end"
        );
        let entry = self.references.entry(offset / self.cluster).or_default();
        *entry = (entry.0 + 1, entry.1 | copied);
    }

    fn refcount_blocks(&mut self, (table, clusters): (u64, u64)) -> Vec<u64> {
        let entries = clusters * self.cluster / 8;
        let blocks: Vec<u64> = (0..entries)
            .map(|index| long(self.image, table + index * 8))
            .collect();
        for block in blocks.iter().filter(|block| **block != 0) {
            self.refer(*block, false);
        }
        blocks
    }

    fn tables(&mut self, l1: u64, entries: u64) {
        for index in 0..(entries * 8).div_ceil(self.cluster) {
            self.refer(l1 + index * self.cluster, false);
        }
        for index in 0..entries {
            let entry = long(self.image, l1 + index * 8);
            if entry & OFFSET != 0 {
                assert_eq!(
                    entry & !(OFFSET | COPIED),
                    0,
                    "reserved bits in L1 entry {entry:#x}"
                );
                self.refer(entry & OFFSET, entry & COPIED != 0);
                self.l2(entry & OFFSET);
            }
        }
    }

    fn l2(&mut self, table: u64) {
        let size = if self.extended { 16 } else { 8 };
        for at in (table..table + self.cluster).step_by(size) {
            let entry = long(self.image, at);
            assert_eq!(entry & COMPRESSED, 0, "a compressed cluster that nobody wrote");
            if entry & OFFSET != 0 {
                // A last cluster may be shorter in the file than it is.
                self.refer(entry & OFFSET, entry & COPIED != 0);
            }
        }
    }

    fn refcount(&self, blocks: &[u64], number: u64) -> u64 {
        let bits = 1u64 << self.order;
        let per_block = self.cluster * 8 / bits;
        let block = blocks.get((number / per_block) as usize).copied().unwrap_or(0);
        if block == 0 {
            return 0;
        }
        let bit = number % per_block * bits;
        let at = (block + bit / 8) as usize;
        match self.order {
            0..3 => u64::from(self.image[at] >> (bit % 8)) & ((1 << bits) - 1),
            _ => self.image[at..at + bits as usize / 8]
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte)),
        }
    }

    fn judge(&self, blocks: &[u64], leaks: bool) {
        for (number, (references, copied)) in &self.references {
            let counted = self.refcount(blocks, *number);
            let at = number * self.cluster;
            assert!(
                counted >= *references,
                "{at:#x}: {references} references, {counted} counted"
            );
            assert!(
                !copied || counted == 1,
                "{at:#x} is COPIED and counted {counted} times"
            );
            assert!(leaks || counted == *references, "{at:#x} is counted too often");
        }
        if !leaks {
            for number in 0..(self.image.len() as u64).div_ceil(self.cluster) {
                let known = self.references.contains_key(&number);
                assert!(
                    known || self.refcount(blocks, number) == 0,
                    "cluster {number} leaks"
                );
            }
        }
    }
}

fn word(image: &[u8], at: usize) -> u32 {
    image[at..at + 4]
        .iter()
        .fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn long(image: &[u8], at: impl TryInto<usize>) -> u64 {
    let at = at.try_into().unwrap_or(usize::MAX - 8);
    let bytes = image.get(at..at + 8).expect("a table lies inside the file");
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
