//! The host fails: ENOSPC and EIO reach the guest as errors, the image stays whole, and writing goes on
//! when the host has recovered.

use crate::support;
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::support::recorder::{Op, Recorder};
use crate::support::{
    Random, Request, Scratch, check_clean, check_leaks_at_most, contents, create, open, qemu_contents,
};
use vhost_blk::image::qcow2::{self, Progress, Repair};
use vhost_blk::image::{BlockFile, Format, Image, OpenOptions, open_layers};

/// A file that fails now and then when it is changed.
struct Failing {
    inner: Recorder,
    /// Changes until the next failure; 0 for none.
    left: AtomicU64,
    errno: i32,
    /// It is a block device.
    fixed: bool,
}

impl Failing {
    fn change(&self) -> io::Result<()> {
        let hit = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            == Ok(1);
        if hit {
            Err(io::Error::from_raw_os_error(self.errno))
        } else {
            Ok(())
        }
    }
}

impl BlockFile for Failing {
    fn size(&self) -> io::Result<u64> {
        self.inner.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if let Err(error) = self.change() {
            // Part of a write may arrive.
            self.inner.write_at(&buf[..buf.len() / 1024 * 512], offset)?;
            return Err(error);
        }
        self.inner.write_at(buf, offset)
    }

    fn write_durably(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.change()?;
        self.inner.write_durably(buf, offset)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change()?;
        self.inner.zero_range(offset, len)
    }

    fn grow_to(&self, len: u64) -> io::Result<()> {
        self.change()?;
        if self.fixed && len > self.size()? {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.inner.grow_to(len)
    }

    fn secure_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.grow_to(offset + len)
    }

    fn cut_to(&self, len: u64) -> io::Result<()> {
        self.inner.cut_to(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.change()?;
        self.inner.sync()
    }

    fn has_fixed_size(&self) -> bool {
        self.fixed
    }

    fn identity(&self) -> io::Result<(u64, u64)> {
        self.inner.identity()
    }
}

const SIZE: usize = 3 << 20;

/// Whatever fails while the disk grows: it is as long as it was, goes on, and grows at the next attempt.
fn growth_that_fails_is_tried_again() {
    const GROWN: u64 = 200 << 20;
    let shapes = [
        ("cluster_size=512,refcount_bits=64", false),
        ("cluster_size=512", true),
        ("cluster_size=4k,compat=0.10", false),
        ("", false),
    ];
    for (options, fixed) in shapes {
        for failure in 1.. {
            let scratch = Scratch::new();
            let path = scratch.path("top");
            create(&path, options, &(SIZE + 512).to_string());
            let mut start = contents(&path);
            if fixed {
                start.resize(8 << 20, 0);
            }
            let file = Arc::new(Failing {
                inner: Recorder::new(start),
                left: AtomicU64::new(0),
                errno: libc::EIO,
                fixed,
            });
            let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, file.clone())];
            let image = open_layers(layers, None, &OpenOptions::default()).expect("opens");
            let end = SIZE as u64;
            support::write(&*image, end, &[1; 512]).expect("writes");
            file.left.store(failure, Ordering::Relaxed);
            let failed = image.grow(GROWN, None).is_err();
            file.left.store(0, Ordering::Relaxed);
            assert!(!image.read_only());
            if failed {
                assert_eq!(image.capacity(), end + 512, "{options}: failure {failure}");
            }
            support::write(&*image, 0, &[2; 512]).expect("goes on");
            image.grow(GROWN, None).expect("grows");
            support::write(&*image, GROWN - 512, &[3; 512]).expect("writes");
            image.flush().expect("flushes");
            drop(image);
            let position = file.inner.position();
            std::fs::write(&path, file.inner.after_process_death(position)).expect("writes");
            check_leaks_at_most(&path)
                .unwrap_or_else(|found| panic!("{options}: failure {failure}: {found}"));
            let image = open(&[(&path, Format::Qcow2)]);
            for (at, tag) in [(0, 2), (end, 1), (end + 512, 0), (GROWN - 512, 3)] {
                let found = support::read(&*image, at, 512).expect("reads");
                assert_eq!(found, [tag; 512], "{options}: failure {failure}, at {at}");
            }
            if !failed {
                assert!(failure > 4, "{options}: nothing failed");
                break;
            }
        }
    }
}

fn a_failing_host_leaves_the_image_whole() {
    let shapes = [
        "",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4k,compat=0.10",
        "extended_l2=on,cluster_size=16k",
    ];
    for (seed, options) in (0_u64..24).zip(shapes.iter().cycle()) {
        let scratch = Scratch::new();
        let path = scratch.path("top");
        create(&path, options, &SIZE.to_string());
        let file = Arc::new(Failing {
            inner: Recorder::new(contents(&path)),
            left: AtomicU64::new(0),
            errno: if seed / 4 % 2 == 0 {
                libc::EIO
            } else {
                libc::ENOSPC
            },
            fixed: false,
        });
        let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, file.clone())];
        let image = open_layers(layers, None, &OpenOptions::default()).expect("opens");
        let mut values = vec![BTreeSet::from([0_u8]); SIZE / 512];
        let mut random = Random::new(seed + 31);
        let mut failures = 0;
        for step in 0..80_u8 {
            if random.below(4) == 0 {
                file.left.store(random.below(8) + 1, Ordering::Relaxed);
            }
            let request = support::random_request(&mut random, SIZE as u64, 100 << 10, step | 1);
            failures += u32::from(attempt(&*image, &request, &mut values).is_err());
        }
        // Where space is short, flushing may find some.
        let least = if file.errno == libc::EIO { 3 } else { 1 };
        assert!(failures >= least, "the host never failed");
        assert!(!image.read_only(), "{options}: a host's failure is no corruption");
        file.left.store(0, Ordering::Relaxed);
        attempt(
            &*image,
            &Request::Write {
                offset: 0,
                bytes: vec![77; 1 << 20],
            },
            &mut values,
        )
        .expect("writes again");
        image.flush().expect("flushes again");
        drop(image);
        std::fs::write(&path, file.inner.after_process_death(file.inner.position())).expect("writes");
        check_leaks_at_most(&path).unwrap_or_else(|found| panic!("{options} {seed}: {found}"));
        for (sector, (data, values)) in qemu_contents(&path, &[]).chunks(512).zip(&values).enumerate() {
            assert!(
                values.contains(&data[0]),
                "{options} {seed}: sector {sector} has {:#x} of {values:x?}",
                data[0]
            );
        }
    }
}

/// An open image of 64 MiB in a file that fails when it is told to; on a block device of a size.
fn failing_image(scratch: &Scratch, options: &str, device: Option<usize>) -> (Arc<Failing>, Arc<dyn Image>) {
    let path = scratch.path("top");
    create(&path, options, "64M");
    let mut bytes = contents(&path);
    bytes.resize(device.unwrap_or(bytes.len()), 0);
    let file = Arc::new(Failing {
        inner: Recorder::new(bytes),
        left: AtomicU64::new(0),
        errno: libc::EIO,
        fixed: device.is_some(),
    });
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, file.clone())];
    let image = open_layers(layers, None, &OpenOptions::default()).expect("opens");
    (file, image)
}

/// A queue tries again for as long as the host fails.
fn failed_reservations_leak_nothing() {
    for options in ["", "cluster_size=4k,refcount_bits=64"] {
        let scratch = Scratch::new();
        let (file, image) = failing_image(&scratch, options, None);
        // The refcounts, the file's length or what is there already, their flush.
        for round in 0..40 {
            file.left.store(round % 3 + 1, Ordering::Relaxed);
            support::write(&*image, 0, &[1; 512]).expect_err("fails");
        }
        for (at, failures) in [(0, 0), (1 << 20, 3)] {
            for _ in 0..failures {
                // More than is reserved: the next run is looked for in the middle of it.
                file.left.store(40, Ordering::Relaxed);
                let _ = support::write(&*image, at, &vec![2; 20 << 20]);
            }
            file.left.store(0, Ordering::Relaxed);
            support::write(&*image, at, &vec![3; 20 << 20]).expect("writes");
        }
        drop(image);
        let path = scratch.path("top");
        std::fs::write(&path, file.inner.after_process_death(file.inner.position())).expect("writes");
        check_clean(&path);
    }
}

/// The barrier stands, and the host fails the refcounts behind it, part of which may arrive: nothing is
/// freed twice, and nothing is forgotten.
fn a_flush_frees_later_what_it_cannot_free_now() {
    const LEN: usize = 6 << 20;
    for options in ["cluster_size=4k", "cluster_size=4k,refcount_bits=64"] {
        let scratch = Scratch::new();
        let (file, image) = failing_image(&scratch, options, None);
        for failure in 1..50_u8 {
            support::write(&*image, 0, &vec![failure; LEN]).expect("writes");
            image.flush().expect("flushes");
            image.discard(0, LEN as u64).expect("discards");
            // The barrier, the holes, the refcounts.
            file.left.store(failure.into(), Ordering::Relaxed);
            assert_eq!(image.flush().is_ok(), failure > 1, "{failure}");
            file.left.store(0, Ordering::Relaxed);
            image.flush().expect("flushes");
        }
        drop(image);
        let path = scratch.path("top");
        std::fs::write(&path, file.inner.after_process_death(file.inner.position())).expect("writes");
        check_clean(&path);
    }
}

/// Space that only our own flush gives back is given back before a request fails for it.
fn dropped_clusters_make_room() {
    let scratch = Scratch::new();
    let (_, image) = failing_image(&scratch, "", Some(8 << 20));
    let mebibyte = |value| vec![value; 1 << 20];
    let full = (0..64).find(|at| support::write(&*image, at << 20, &mebibyte(1)).is_err());
    let full = full.expect("the device is smaller than the disk");
    assert!(full > 4);
    image.flush().expect("flushes");
    let no_space = support::write(&*image, full << 20, &mebibyte(2)).expect_err("is full");
    assert!(no_space.to_string().contains("find free clusters"), "{no_space}");
    image.discard(0, 2 << 20).expect("discards");
    support::write(&*image, full << 20, &mebibyte(3)).expect("there is room");
    let found = support::read(&*image, full << 20, 1 << 20).expect("reads");
    assert!(found == mebibyte(3));
}

/// Runs a request that may fail, and notes what each sector may hold then.
fn attempt(image: &dyn Image, request: &Request, values: &mut [BTreeSet<u8>]) -> io::Result<()> {
    let (offset, len, value, result) = match request {
        Request::Write { offset, bytes } => (
            *offset,
            bytes.len() as u64,
            bytes[0],
            support::write(image, *offset, bytes),
        ),
        Request::Discard { offset, len } => (*offset, *len, 0, image.discard(*offset, *len)),
        Request::Zero { offset, len, unmap } => (*offset, *len, 0, image.write_zeroes(*offset, *len, *unmap)),
        Request::Flush => return image.flush(),
        Request::Read { offset, len } => return support::read(image, *offset, *len as usize).map(|_| ()),
    };
    for sector in &mut values[offset as usize / 512..(offset + len) as usize / 512] {
        if result.is_ok() && !matches!(request, Request::Discard { .. }) {
            sector.clear();
        }
        sector.insert(value);
    }
    result
}

/// The file of `start` after these operations, all but one.
fn without(start: &[u8], log: &[Op], lost: usize) -> Recorder {
    let file = Recorder::new(start.to_vec());
    for (index, op) in log.iter().enumerate() {
        let done = match op {
            _ if index == lost => Ok(()),
            Op::Write { offset, bytes } | Op::Durable { offset, bytes } => file.write_at(bytes, *offset),
            Op::Zero { offset, len } => file.zero_range(*offset, *len),
            Op::Length(len) => file.grow_to(*len).and_then(|()| file.cut_to(*len)),
            Op::Barrier => Ok(()),
        };
        done.expect("is in memory");
    }
    file
}

/// Growth fails in the middle of the refcount blocks of its table, and a crash of the host takes one entry of a
/// table that no barrier covers: what was written since has its refcounts.
fn growth_that_failed_leaves_nothing_uncounted() {
    const GROWN: u64 = 160 << 30;
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "cluster_size=2k", &SIZE.to_string());
    // Few enough that what is reserved after it ends in the second block.
    support::write(&*open(&[(&path, Format::Qcow2)]), 0, &vec![1; 768 << 10]).expect("writes");
    let start = contents(&path);
    for failure in 1.. {
        let file = Arc::new(Failing {
            inner: Recorder::new(start.clone()),
            left: AtomicU64::new(failure),
            errno: libc::EIO,
            fixed: false,
        });
        let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, file.clone())];
        let image = open_layers(layers, None, &OpenOptions::default()).expect("opens");
        let failed = image.grow(GROWN, None).is_err();
        file.left.store(0, Ordering::Relaxed);
        support::write(&*image, 1 << 20, &vec![2; 1800 << 10]).expect("goes on");
        let log = file.inner.log();
        drop(image);
        let mut synced = 0;
        for end in 0..=log.len() {
            if !matches!(log.get(end), None | Some(Op::Barrier)) {
                continue;
            }
            for lost in synced..end {
                if !matches!(&log[lost], Op::Write { bytes, .. } if bytes.len() == 8) {
                    continue;
                }
                let left = without(&start, &log[..end], lost);
                let found = qcow2::check(&left, Repair::No, &Progress::untold()).expect("checks");
                let found = (found.corruptions, found.broken);
                assert_eq!(found, (0, None), "failure {failure}, lost {:?}", log[lost]);
            }
            synced = end + 1;
        }
        if !failed {
            assert!(failure > 4, "nothing failed");
            break;
        }
    }
}

crate::suite! {
    with_qemu_img: [
        a_failing_host_leaves_the_image_whole,
        growth_that_fails_is_tried_again,
        growth_that_failed_leaves_nothing_uncounted,
        failed_reservations_leak_nothing,
        a_flush_frees_later_what_it_cannot_free_now,
        dropped_clusters_make_room,
    ],
    alone: [],
}
