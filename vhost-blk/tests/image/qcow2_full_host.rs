//! A host without space, or a block device, which never has more: snapshots and repairs are either not begun
//! with, or leave an image that opens there.

use crate::support;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use crate::support::recorder::Recorder;
use crate::support::{
    Random, Scratch, check_clean, check_leaks_at_most, contents, create, open, patch, qemu_img, read, text,
    write,
};
use vhost_blk::image::qcow2::{self, Progress, Repair};
use vhost_blk::image::{BlockFile, Format, HostFile, ImageError, OpenOptions, open_layers};

const CLUSTER: usize = 4096;
const SIZE: usize = 1 << 20;

/// A file with space up to a length.
struct Full {
    inner: Recorder,
    room: u64,
    /// It is a block device, of that length.
    fixed: bool,
}

impl Full {
    fn new(bytes: &[u8], room: usize) -> Self {
        Self {
            inner: Recorder::new(bytes.to_vec()),
            room: room as u64,
            fixed: false,
        }
    }

    fn device(bytes: &[u8], size: usize) -> Self {
        let mut bytes = bytes.to_vec();
        bytes.resize(size, 0xee);
        Self {
            fixed: true,
            ..Self::new(&bytes, size)
        }
    }

    fn reaches(&self, end: u64) -> io::Result<()> {
        match end <= self.room {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.inner.after_process_death(self.inner.position())
    }
}

impl BlockFile for Full {
    fn size(&self) -> io::Result<u64> {
        self.inner.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.reaches(offset + buf.len() as u64)?;
        self.inner.write_at(buf, offset)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.zero_range(offset, len)
    }

    fn grow_to(&self, len: u64) -> io::Result<()> {
        self.reaches(len)?;
        self.inner.grow_to(len)
    }

    fn secure_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.grow_to(offset + len)
    }

    fn cut_to(&self, len: u64) -> io::Result<()> {
        match self.fixed {
            true => Ok(()),
            false => self.inner.cut_to(len),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn has_fixed_size(&self) -> bool {
        self.fixed
    }

    fn identity(&self) -> io::Result<(u64, u64)> {
        self.inner.identity()
    }
}

/// An image with a snapshot of an older disk, and a cluster that nobody uses.
fn image_with_snapshot() -> Vec<u8> {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "cluster_size=4k", &SIZE.to_string());
    write(&*open(&[(&path, Format::Qcow2)]), 8192, &[1; 100 << 10]).expect("writes");
    qemu_img(&["snapshot", "-c", "one", text(&path)]);
    write(&*open(&[(&path, Format::Qcow2)]), 64 << 10, &[2; 100 << 10]).expect("writes");
    let bytes = contents(&path);
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let block = word(word(48) as usize);
    let free = bytes.len().div_ceil(CLUSTER) as u64;
    patch(&path, block + free * 2, &[0, 1]);
    patch(&path, free * CLUSTER as u64, &[0x77; CLUSTER]);
    contents(&path)
}

fn is_no_space(error: &ImageError) -> bool {
    matches!(error, ImageError::Io { source, .. } if source.raw_os_error() == Some(libc::ENOSPC))
}

type Change = fn(&dyn BlockFile) -> Result<(), ImageError>;

const CHANGES: [(&str, Change); 4] = [
    ("take", |file| {
        qcow2::take(file, "two", Duration::from_secs(1), &Progress::untold())
    }),
    ("apply", |file| qcow2::apply(file, "one", &Progress::untold())),
    ("delete", |file| qcow2::delete(file, "one", &Progress::untold())),
    ("repair", |file| {
        let found = qcow2::check(file, Repair::Refcounts, &Progress::untold())?;
        assert_eq!((found.leaks_fixed, found.leaks), (1, 0));
        Ok(())
    }),
];

/// The image opens for writing where it is, and is sound after that; the disk.
fn opens(file: Full, what: &str) -> Vec<u8> {
    let file = Arc::new(file);
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, file.clone())];
    let image = open_layers(layers, None, &OpenOptions::default());
    let image = image.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let disk = read(&*image, 0, SIZE).expect("reads");
    drop(image);
    let scratch = Scratch::new();
    let path = scratch.path("top");
    std::fs::write(&path, file.bytes()).expect("writes");
    check_leaks_at_most(&path).unwrap_or_else(|found| panic!("{what}: {found}"));
    disk
}

/// Cut off anywhere, the image opens in the same room; in the end nothing is wrong with it.
fn crash_everywhere(file: &Full, again: &dyn Fn(Vec<u8>) -> Full, disks: [&[u8]; 2], what: &str) {
    for count in 0..=file.inner.position() {
        let what = format!("{what}, cut off after {count}");
        let mut random = Random::new(count as u64);
        let left = file.inner.after_host_crash(count, &mut random);
        let found = opens(again(left), &what);
        assert!(disks.contains(&&found[..]), "{what}: another disk");
    }
    let scratch = Scratch::new();
    let path = scratch.path("top");
    std::fs::write(&path, file.bytes()).expect("writes");
    check_clean(&path);
}

/// Nothing is written, or it is all done.
fn a_full_host_refuses_before_anything_is_written() {
    let start = image_with_snapshot();
    let now = opens(Full::new(&start, usize::MAX), "as it was");
    for (name, change) in CHANGES {
        let mut refusals = 0;
        for room in (start.len()..).step_by(CLUSTER) {
            let file = Full::new(&start, room);
            let Err(error) = change(&file) else {
                let after = opens(Full::new(&file.bytes(), room), name);
                let again = |left: Vec<u8>| Full::new(&left, room);
                crash_everywhere(&file, &again, [&now, &after], name);
                break;
            };
            assert!(is_no_space(&error), "{name}: {error:?}");
            assert!(file.bytes() == start, "{name}: it was changed");
            refusals += 1;
        }
        // Counts find room in what they replace.
        let makes_tables = name == "take" || name == "apply";
        assert_eq!(refusals > 0, makes_tables, "{name}: {refusals} refusals");
    }
}

/// Also where but one cluster is free, which is an L1 table's and not the snapshot table's besides.
fn a_device_has_room_inside() {
    let start = image_with_snapshot();
    let disk = opens(Full::new(&start, usize::MAX), "as it was");
    for size in [start.len(), 4 << 20] {
        for (name, change) in CHANGES {
            let file = Full::device(&start, size);
            if name == "take" && size == start.len() {
                let error = change(&file).expect_err("would have to grow");
                assert!(is_no_space(&error), "{name}: {error:?}");
                assert_eq!(file.inner.position(), 0, "{name}: it was written to");
                continue;
            }
            change(&file).unwrap_or_else(|error| panic!("{name}: {error:?}"));
            let what = format!("{name} on {size} bytes");
            let again = |left: Vec<u8>| Full::device(&left, size);
            let after = opens(again(file.bytes()), &what);
            assert_eq!(after == disk, name != "apply", "{what}: another disk");
            crash_everywhere(&file, &again, [&disk, &after], &what);
        }
    }
}

/// Every cluster of it is used: the counts take the place of the old ones.
fn a_device_without_room_is_repaired_in_place() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "cluster_size=4k", &SIZE.to_string());
    write(&*open(&[(&path, Format::Qcow2)]), 0, &[1; SIZE]).expect("writes");
    let mut start = contents(&path);
    let word = |at: usize| u64::from_be_bytes(start[at..at + 8].try_into().expect("eight bytes"));
    let last = word(word(48) as usize) as usize + (start.len() / CLUSTER - 1) * 2 + 1;
    start[last] = 9;
    // The dirty bit: whoever opens it repairs it.
    start[79] |= 1;
    let size = start.len();
    let file = Full::device(&start, size);
    qcow2::check(&file, Repair::Refcounts, &Progress::untold()).expect("repairs");
    let again = |left: Vec<u8>| Full::device(&left, size);
    crash_everywhere(&file, &again, [&[1; SIZE]; 2], "repair");
}

/// Nothing that is there changes.
fn what_is_secured_has_its_space() {
    let scratch = Scratch::new();
    let path = scratch.path("file");
    std::fs::write(&path, [7; 100]).expect("writes");
    let file = HostFile::new(support::fd(&path, true)).expect("is a file");
    file.secure_range(0, 1 << 20).expect("there is space");
    let mut expected = vec![7; 100];
    expected.resize(1 << 20, 0);
    assert!(contents(&path) == expected);
    let taken = std::fs::metadata(&path).expect("is there").blocks() * 512;
    assert!(taken >= 1 << 20, "{taken} bytes");
}

crate::suite! {
    with_qemu_img: [
        a_full_host_refuses_before_anything_is_written,
        a_device_has_room_inside,
        a_device_without_room_is_repaired_in_place,
    ],
    alone: [what_is_secured_has_its_space],
}
