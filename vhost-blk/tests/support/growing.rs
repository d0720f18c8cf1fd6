//! A disk that grows, with a crash at each point.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhost_blk::image::qcow2::{self, Progress, Repair};
use vhost_blk::image::{BlockFile, Format, HostFile, Image, OpenOptions, open_layers};

use super::recorder::Recorder;
use super::{
    Random, Scratch, assert_same, check_clean, check_leaks_at_most, contents, create, fd, full, open,
    qemu_contents, read, text, write,
};

/// No multiple of any cluster size but the smallest.
pub const OLD: u64 = (1 << 20) + 1536;

/// Crashes of the host that are tried at each point.
fn seeds() -> u64 {
    if full() { 8 } else { 3 }
}

/// Opens the image in `file`, over a raw one in `base`.
pub fn open_recorded(file: &Arc<Recorder>, base: Option<&Path>) -> Arc<dyn Image> {
    let mut layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, file.clone())];
    layers.extend(base.map(|base| {
        let below = HostFile::new(fd(base, false)).expect("is a file");
        (Format::Raw, Arc::new(below) as Arc<dyn BlockFile>)
    }));
    open_layers(layers, None, &OpenOptions::default()).expect("opens")
}

/// An image, and what it lies on.
pub struct Disk {
    pub scratch: Scratch,
    pub top: PathBuf,
    pub base: Option<PathBuf>,
    pub options: &'static str,
    /// What it shows.
    pub bytes: Vec<u8>,
}

impl Disk {
    /// Alone, with data in places, up to its end.
    pub fn alone(options: &'static str) -> Self {
        let scratch = Scratch::new();
        let top = scratch.path("top");
        create(&top, options, &OLD.to_string());
        let mut disk = Self {
            scratch,
            top,
            base: None,
            options,
            bytes: vec![0; OLD as usize],
        };
        let image = disk.open();
        for at in [0, 300 << 10, OLD - 2048] {
            disk.write(&*image, at, 2048, 0x11);
        }
        drop(image);
        disk
    }

    /// Over an image that is longer and full.
    pub fn over_a_longer_one(options: &'static str) -> Self {
        let scratch = Scratch::new();
        let (top, base) = (scratch.path("top"), scratch.path("base"));
        std::fs::write(&base, vec![0xab; 3 << 20]).expect("writes");
        let backing = format!("{options},backing_file={},backing_fmt=raw", text(&base));
        create(&top, &backing, &OLD.to_string());
        let mut disk = Self {
            scratch,
            top,
            base: Some(base),
            options,
            bytes: vec![0xab; OLD as usize],
        };
        disk.write(&*disk.open(), 512 << 10, 512, 0x11);
        disk
    }

    pub fn open(&self) -> Arc<dyn Image> {
        let mut layers = vec![(self.top.as_path(), Format::Qcow2)];
        layers.extend(self.base.as_deref().map(|base| (base, Format::Raw)));
        open(&layers)
    }

    pub fn write(&mut self, image: &dyn Image, offset: u64, len: usize, tag: u8) {
        write(image, offset, &vec![tag; len]).unwrap_or_else(|error| panic!("{}: {error:?}", self.options));
        self.bytes[offset as usize..][..len].fill(tag);
    }

    pub fn grow(&mut self, image: &dyn Image, size: u64) {
        image
            .grow(size, None)
            .unwrap_or_else(|error| panic!("{} to {size}: {error:?}", self.options));
        assert_eq!(image.capacity(), size);
        self.bytes.resize(size as usize, 0);
    }

    /// Both we and QEMU read what is to be there.
    pub fn check(&self, what: &str) {
        let what = format!("{}: {what}", self.options);
        check_clean(&self.top);
        assert_same(&qemu_contents(&self.top, &[]), &self.bytes, &what);
        let image = self.open();
        let ours = read(&*image, 0, self.bytes.len()).expect("reads");
        assert_same(&ours, &self.bytes, &what);
    }

    /// Grows with a crash at each point; each time it is tried again.
    pub fn grow_with_crashes(&mut self, size: u64) {
        let old = self.bytes.len();
        let file = Arc::new(Recorder::new(contents(&self.top)));
        let image = open_recorded(&file, self.base.as_deref());
        image.grow(size, None).expect("grows");
        drop(image);
        self.bytes.resize(size as usize, 0);
        let total = file.position();
        for count in 0..=total {
            let what = format!("{}: {old} to {size}, after {count} of {total}", self.options);
            let crash =
                |seed: u64| file.after_host_crash(count, &mut Random::new(seed * 1000 + count as u64));
            for seed in 0..seeds() {
                self.survives(crash(seed), old, &format!("{what}, seed {seed}"));
            }
            self.survives(file.after_process_death(count), old, &what);
            std::fs::write(&self.top, crash(0)).expect("writes");
            drop(self.open());
            check_leaks_at_most(&self.top).unwrap_or_else(|found| panic!("{what}: {found}"));
        }
        std::fs::write(&self.top, file.after_process_death(total)).expect("writes");
        self.check(&format!("grown to {size}"));
    }

    /// What a crash left is sound, as long as it was or as it was to be, and can grow.
    pub fn survives(&self, bytes: Vec<u8>, old: usize, what: &str) {
        let file = Arc::new(Recorder::new(bytes));
        for _ in 0..2 {
            let found = qcow2::check(&*file, Repair::No, &Progress::untold()).expect("checks");
            assert_eq!((found.corruptions, &found.broken), (0, &None), "{what}");
            let image = open_recorded(&file, self.base.as_deref());
            let now = image.capacity() as usize;
            assert!(now == old || now == self.bytes.len(), "{what}");
            let shown = read(&*image, 0, now).expect("reads");
            assert_same(&shown, &self.bytes[..now], what);
            let grown = image.grow(self.bytes.len() as u64, None);
            grown.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        }
    }
}
