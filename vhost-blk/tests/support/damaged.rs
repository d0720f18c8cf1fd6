//! An image that a test damages and then uses, and how that must end.

use std::path::PathBuf;
use std::sync::Arc;

use vhost_blk::image::{Format, Image, OpenOptions};

use super::{Scratch, contents, create, open, open_with, patch, read, read_only, write};

pub const CLUSTER: u64 = 64 << 10;
pub const COPIED: u64 = 1 << 63;

/// An image whose first two clusters and last one hold data.
pub struct Damaged {
    pub scratch: Scratch,
    pub path: PathBuf,
}

impl Damaged {
    pub fn new(options: &str) -> Self {
        let scratch = Scratch::new();
        let path = scratch.path("top");
        create(&path, options, "8M");
        let image = open(&[(&path, Format::Qcow2)]);
        write(&*image, 0, &vec![1; 2 * CLUSTER as usize]).expect("writes");
        write(&*image, (8 << 20) - CLUSTER, &vec![3; CLUSTER as usize]).expect("writes");
        Self { scratch, path }
    }

    pub fn word(&self, offset: u64) -> u64 {
        let bytes = contents(&self.path);
        u64::from_be_bytes(bytes[offset as usize..][..8].try_into().expect("eight bytes"))
    }

    pub fn set(&self, offset: u64, value: u64) -> &Self {
        patch(&self.path, offset, &value.to_be_bytes());
        self
    }

    pub fn l1(&self) -> u64 {
        self.word(40)
    }

    pub fn l2(&self) -> u64 {
        self.word(self.l1()) & !COPIED
    }

    /// What the header places, and the one refcount block: each is not to be touched.
    pub fn tables(&self) -> [(u64, &'static str); 3] {
        [
            (self.l1(), "l1_table_offset"),
            (self.word(48), "refcount_table_offset"),
            (self.word(self.word(48)), "refcount block"),
        ]
    }

    pub fn cluster(&self, place: u64) -> Vec<u8> {
        contents(&self.path)[place as usize..]
            .iter()
            .copied()
            .take(CLUSTER as usize)
            .collect()
    }

    /// Where the refcount (16 bits) of the cluster at `offset` is.
    pub fn refcount_at(&self, offset: u64) -> u64 {
        self.word(self.word(48)) + offset / CLUSTER * 2
    }

    pub fn refcount(&self, offset: u64) -> u16 {
        let at = self.refcount_at(offset) as usize;
        let bytes = contents(&self.path)[at..at + 2].try_into();
        u16::from_be_bytes(bytes.expect("two bytes"))
    }

    pub fn set_refcount(&self, offset: u64, count: u16) -> &Self {
        patch(&self.path, self.refcount_at(offset), &count.to_be_bytes());
        self
    }

    /// `fails` gives an error that names `field` and says `reason`; then the image is as it must be.
    #[track_caller]
    pub fn found(&self, fails: impl Fn(&dyn Image) -> std::io::Result<()>, field: &str, reason: &str) {
        let image = open(&[(&self.path, Format::Qcow2)]);
        self.found_in(&image, &fails, field, reason);
        drop(image);
        let refused = open_with(&[(&self.path, Format::Qcow2)], &OpenOptions::default())
            .err()
            .expect("is refused");
        assert!(refused.to_string().contains("corrupt bit"), "{refused}");
        let options = read_only();
        let image = open_with(&[(&self.path, Format::Qcow2)], &options).expect("opens for reading");
        assert_eq!(
            read(&*image, (8 << 20) - CLUSTER, 512).expect("reads"),
            vec![3; 512]
        );
    }

    #[track_caller]
    pub fn found_in(
        &self,
        image: &Arc<dyn Image>,
        fails: &dyn Fn(&dyn Image) -> std::io::Result<()>,
        field: &str,
        reason: &str,
    ) {
        assert!(!image.read_only());
        says(fails(&**image), field, reason);
        assert_ne!(contents(&self.path)[79] & 2, 0, "the corrupt bit is not set");
        assert!(image.read_only());
        let before = contents(&self.path);
        let error = write(&**image, 4 << 20, &[9; 512])
            .expect_err("is read-only")
            .to_string();
        assert!(error.contains("found corrupt"), "{error}");
        assert!(image.discard(0, CLUSTER).is_err() && image.write_zeroes(0, CLUSTER, true).is_err());
        image.flush().expect("a flush does no harm");
        assert_eq!(read(&**image, 4 << 20, 512).expect("reads"), vec![0; 512]);
        assert!(contents(&self.path) == before, "it was still written to");
    }
}

/// The image is found corrupt, in `field` and for `reason`.
#[track_caller]
pub fn says(result: std::io::Result<()>, field: &str, reason: &str) {
    let error = result.expect_err("is refused").to_string();
    assert!(
        error.starts_with(&format!("image is corrupt: {field}: ")) && error.contains(reason),
        "{error:?} does not name {field:?} and say {reason:?}"
    );
}

pub fn read_first(image: &dyn Image) -> std::io::Result<()> {
    read(image, 512, 512).map(|_| ())
}

pub fn write_first(image: &dyn Image) -> std::io::Result<()> {
    write(image, 512, &[5; 512])
}
