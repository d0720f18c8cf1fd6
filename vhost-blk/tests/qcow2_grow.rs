//! A disk that grows, at rest or while it is written to: it shows zeros where it was not, a crash at any point
//! leaves it as long as it was or as it was to be, and qemu-img finds nothing wrong with it.

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::hooked::Hooked;
use support::recorder::Recorder;
use support::{
    Random, Scratch, assert_same, check_clean, check_leaks_at_most, contents, create, full, open, open_with,
    patch, qemu_contents, qemu_img, read, read_only, text, write,
};
use vhost_blk::image::qcow2::{self, Repair};
use vhost_blk::image::{BlockFile, Format, HostFile, Image, ImageError, OpenOptions, open_layers};

/// No multiple of any cluster size but the smallest.
const OLD: u64 = (1 << 20) + 1536;

/// Crashes of the host that are tried at each point.
fn seeds() -> u64 {
    if full() { 8 } else { 3 }
}

/// Opens the image in `file`, over a raw one in `base`.
fn open_recorded(file: &Arc<Recorder>, base: Option<&Path>) -> Arc<dyn Image> {
    let mut layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, file.clone())];
    layers.extend(base.map(|base| {
        let below = HostFile::new(support::fd(base, false)).expect("is a file");
        (Format::Raw, Arc::new(below) as Arc<dyn BlockFile>)
    }));
    open_layers(layers, None, &OpenOptions::default()).expect("opens")
}

/// An image, and what it lies on.
struct Disk {
    _scratch: Scratch,
    top: PathBuf,
    base: Option<PathBuf>,
    options: &'static str,
    /// What it shows.
    bytes: Vec<u8>,
}

impl Disk {
    /// Alone, with data in places, up to its end.
    fn alone(options: &'static str) -> Self {
        let scratch = Scratch::new();
        let top = scratch.path("top");
        create(&top, options, &OLD.to_string());
        let mut disk = Self {
            _scratch: scratch,
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
    fn over_a_longer_one(options: &'static str) -> Self {
        let scratch = Scratch::new();
        let (top, base) = (scratch.path("top"), scratch.path("base"));
        std::fs::write(&base, vec![0xab; 3 << 20]).expect("writes");
        let backing = format!("{options},backing_file={},backing_fmt=raw", text(&base));
        create(&top, &backing, &OLD.to_string());
        let mut disk = Self {
            _scratch: scratch,
            top,
            base: Some(base),
            options,
            bytes: vec![0xab; OLD as usize],
        };
        disk.write(&*disk.open(), 512 << 10, 512, 0x11);
        disk
    }

    fn open(&self) -> Arc<dyn Image> {
        let mut layers = vec![(self.top.as_path(), Format::Qcow2)];
        layers.extend(self.base.as_deref().map(|base| (base, Format::Raw)));
        open(&layers)
    }

    fn write(&mut self, image: &dyn Image, offset: u64, len: usize, tag: u8) {
        write(image, offset, &vec![tag; len]).unwrap_or_else(|error| panic!("{}: {error:?}", self.options));
        self.bytes[offset as usize..][..len].fill(tag);
    }

    fn grow(&mut self, image: &dyn Image, size: u64) {
        image
            .grow(size, None)
            .unwrap_or_else(|error| panic!("{} to {size}: {error:?}", self.options));
        assert_eq!(image.capacity(), size);
        self.bytes.resize(size as usize, 0);
    }

    /// Both we and QEMU read what is to be there.
    fn check(&self, what: &str) {
        let what = format!("{}: {what}", self.options);
        check_clean(&self.top);
        assert_same(&qemu_contents(&self.top, &[]), &self.bytes, &what);
        let image = self.open();
        let ours = read(&*image, 0, self.bytes.len()).expect("reads");
        assert_same(&ours, &self.bytes, &what);
    }

    /// Grows with a crash at each point; each time it is tried again.
    fn grow_with_crashes(&mut self, size: u64) {
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
    fn survives(&self, bytes: Vec<u8>, old: usize, what: &str) {
        let file = Arc::new(Recorder::new(bytes));
        for _ in 0..2 {
            let found = qcow2::check(&*file, Repair::No).expect("checks");
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

/// With an L1 table that stays where it is, and one that moves.
fn disks_grow_whole() {
    for options in [
        "cluster_size=512",
        "cluster_size=512,refcount_bits=1,compat=1.1",
        "cluster_size=4k",
        "cluster_size=4k,compat=0.10",
        "",
    ] {
        let mut disk = Disk::alone(options);
        for size in [OLD + 512, 5 << 20] {
            disk.grow_with_crashes(size);
        }
    }
}

/// What was behind the entries of the L1 table is none of its entries.
fn a_table_that_stays_has_no_old_entries() {
    for (options, cluster, size) in [
        ("cluster_size=4k", 4096, 5 << 20),
        ("cluster_size=512", 512, 2 << 20),
    ] {
        let mut disk = Disk::alone(options);
        let bytes = contents(&disk.top);
        let entries = u32::from_be_bytes(bytes[36..40].try_into().expect("four bytes"));
        let table = u64::from_be_bytes(bytes[40..48].try_into().expect("eight bytes"));
        let used = entries as usize * 8;
        patch(&disk.top, table + used as u64, &vec![0x80; cluster - used]);
        disk.grow_with_crashes(size);
    }
}

/// What lies below an overlay that is shorter does not show when it grows, nor when that is cut off.
fn what_lies_below_does_not_show_behind_the_old_end() {
    for options in [
        "cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
        "compat=0.10",
    ] {
        let mut disk = Disk::over_a_longer_one(options);
        for size in [OLD + 512, 2 << 20, 8 << 20] {
            disk.grow_with_crashes(size);
        }
        let image = disk.open();
        disk.write(&*image, OLD, 512, 0x22);
        drop(image);
        disk.check("written behind its old end");
    }
}

/// A table longer than what one refcount block counts; the refcount table moves too.
fn a_long_table_finds_a_place() {
    for options in ["cluster_size=512,refcount_bits=64", "cluster_size=512"] {
        const LONG: u64 = 4 << 30;
        let disk = Disk::alone(options);
        let file = Arc::new(Recorder::new(contents(&disk.top)));
        let image = open_recorded(&file, None);
        let before = file.position();
        image.grow(LONG, None).expect("grows");
        let after = file.position();
        write(&*image, LONG - 512, &[0x33; 512]).expect("writes");
        drop(image);
        let end = file.after_process_death(file.position());
        let moved = |at: usize| contents(&disk.top)[at..at + 8] != end[at..at + 8];
        assert!(moved(40), "{options}: the L1 table");
        assert_eq!(moved(48), options.contains("64"), "{options}: the refcount table");
        for count in (before..=after).step_by(29).chain([file.position()]) {
            let bytes = file.after_host_crash(count, &mut Random::new(count as u64));
            std::fs::write(&disk.top, bytes).expect("writes");
            let image = disk.open();
            assert!([OLD, LONG].contains(&image.capacity()));
            assert_same(
                &read(&*image, 0, OLD as usize).expect("reads"),
                &disk.bytes,
                options,
            );
            image.grow(LONG, None).expect("grows again");
            write(&*image, LONG - 1024, &[0x44; 512]).expect("writes");
            drop(image);
            check_leaks_at_most(&disk.top).unwrap_or_else(|found| panic!("{options}: {found}"));
            assert!(qemu_img(&["info", text(&disk.top)]).contains("(4294967296 bytes)"));
        }
        let image = disk.open();
        assert_eq!(read(&*image, LONG - 512, 512).expect("reads"), [0x33; 512]);
        drop(image);
        check_clean(&disk.top);
    }
}

/// What is mapped behind the end, in the last cluster and past it, shows as little as what is below.
fn what_is_mapped_behind_the_end_does_not_show() {
    for options in [
        "cluster_size=512",
        "cluster_size=4k,compat=0.10",
        "",
        "extended_l2=on,cluster_size=16k",
    ] {
        let mut disk = Disk::alone(options);
        let image = disk.open();
        disk.grow(&*image, 4 << 20);
        disk.write(&*image, 0, 4 << 20, 0x55);
        drop(image);
        patch(&disk.top, 24, &OLD.to_be_bytes());
        disk.bytes.truncate(OLD as usize);
        for size in [OLD + 1024, 3 << 20, 8 << 20] {
            let image = disk.open();
            disk.grow(&*image, size);
            drop(image);
            disk.check(&format!("grown to {size}"));
        }
    }
}

/// Sectors `lane`, `lane + 4` and so on of the disk, the last ones more often, until `stop`.
fn write_lane(image: &dyn Image, lane: u64, size: u64, stop: &AtomicBool) -> Vec<(u64, u8)> {
    let mut random = Random::new(lane + 7);
    let sectors = size / 512;
    let mut written = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let from = if random.below(2) == 0 { 0 } else { sectors - 40 };
        let sector = (from + random.below(sectors - from)) / 4 * 4 + lane;
        if sector >= sectors {
            continue;
        }
        let tag = random.below(256) as u8;
        if tag == 0 {
            image.write_zeroes(sector * 512, 512, true).expect("zeroes");
        } else {
            write(image, sector * 512, &[tag; 512]).expect("writes");
        }
        written.push((sector, tag));
        if written.len() % 64 == 0 {
            image.flush().expect("flushes");
        }
    }
    written
}

fn writers_go_on_meanwhile() {
    let below =
        ["cluster_size=4k,compat=0.10", "extended_l2=on,cluster_size=16k"].map(Disk::over_a_longer_one);
    let more = ["cluster_size=512", "cluster_size=64k"].map(Disk::over_a_longer_one);
    let alone = ["cluster_size=512", "extended_l2=on,cluster_size=16k", ""].map(Disk::alone);
    for mut disk in below.into_iter().chain(more).chain(alone) {
        let image = disk.open();
        let stop = AtomicBool::new(false);
        let written: Vec<Vec<(u64, u8)>> = std::thread::scope(|scope| {
            let lanes: Vec<_> = (0..4)
                .map(|lane| {
                    let (image, stop) = (&*image, &stop);
                    scope.spawn(move || write_lane(image, lane, OLD, stop))
                })
                .collect();
            for size in [OLD + 512, OLD + 5120, 2 << 20, 5 << 20, 40 << 20] {
                std::thread::sleep(Duration::from_millis(30));
                let old = image.capacity();
                disk.grow(&*image, size);
                disk.write(&*image, old, 512, 0xee);
            }
            std::thread::sleep(Duration::from_millis(30));
            stop.store(true, Ordering::Relaxed);
            let ended = lanes.into_iter().map(|lane| lane.join().expect("writes"));
            ended.collect()
        });
        drop(image);
        for (sector, tag) in written.into_iter().flatten() {
            disk.bytes[sector as usize * 512..][..512].fill(tag);
        }
        disk.check("written to meanwhile");
    }
}

/// A request that found the disk's last cluster whole must not take what has been written behind it since.
fn a_late_request_leaves_what_is_new() {
    const END: u64 = 40 << 10;
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", &END.to_string());
    let start = contents(&path);
    for round in 0..400_u64 {
        let file = Arc::new(Recorder::new(start.clone()));
        let image = open_recorded(&file, None);
        write(&*image, 0, &[1; END as usize]).expect("writes");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        image.write_zeroes(0, END, true).expect("zeroes");
                        image.discard(0, END).expect("discards");
                    }
                });
            }
            std::thread::sleep(Duration::from_micros(round));
            image.grow(END + 4096, None).expect("grows");
            write(&*image, END, &[2; 4096]).expect("writes");
            std::thread::sleep(Duration::from_micros(200));
            stop.store(true, Ordering::Relaxed);
        });
        let found = read(&*image, END, 4096).expect("reads");
        assert_same(&found, &[2; 4096], &format!("round {round}"));
    }
}

/// A write into the last cluster that was planned before the disk grew maps a place where old data lies
/// behind the old end.
fn a_slow_write_shows_nothing_behind_the_old_end() {
    for options in ["", "extended_l2=on,cluster_size=16k"] {
        let mut disk = Disk::alone(options);
        let image = disk.open();
        disk.grow(&*image, 4 << 20);
        disk.write(&*image, 1 << 20, 1 << 20, 0x55);
        // Its place is kept.
        image.write_zeroes(1 << 20, 1 << 20, false).expect("zeroes");
        drop(image);
        patch(&disk.top, 24, &OLD.to_be_bytes());
        let entered = Arc::new(AtomicBool::new(false));
        let told = entered.clone();
        let mut file = Hooked::new(Recorder::new(contents(&disk.top)));
        // This one takes a while.
        file.before_write = Box::new(move |bytes| {
            if bytes.first() == Some(&0x99) {
                told.store(true, Ordering::Release);
                std::thread::sleep(Duration::from_millis(300));
            }
        });
        let file = Arc::new(file);
        let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, file.clone())];
        let image = open_layers(layers, None, &OpenOptions::default()).expect("opens");
        std::thread::scope(|scope| {
            scope.spawn(|| write(&*image, OLD - 1536, &[0x99; 1536]).expect("writes"));
            while !entered.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            image.grow(2 << 20, None).expect("grows");
        });
        let found = read(&*image, OLD, (2 << 20) - OLD as usize).expect("reads");
        assert_same(&found, &vec![0; found.len()], options);
        assert_eq!(read(&*image, OLD - 512, 512).expect("reads"), [0x99; 512]);
    }
}

/// Each order clears a piece at least, and the next one goes on there.
fn a_growth_that_takes_long_goes_on_at_the_next_order() {
    const SHORT: u64 = 1 << 20;
    const LONG: u64 = 300 << 20;
    let scratch = Scratch::new();
    let (top, base) = (scratch.path("top"), scratch.path("base"));
    std::fs::write(&base, [0xab; 4096]).expect("writes");
    for at in (0..LONG).step_by(8 << 20) {
        patch(&base, at, &[0xab; 4096]);
    }
    patch(&base, LONG - 512, &[0xab; 512]);
    let backing = format!("backing_file={},backing_fmt=raw", text(&base));
    create(&top, &backing, &SHORT.to_string());
    let image = open(&[(&top, Format::Qcow2), (&base, Format::Raw)]);
    let size = LONG + (1 << 30);
    let mut orders = 1;
    while let Err(error) = image.grow(size, Some(Instant::now())) {
        assert!(
            matches!(&error, ImageError::Refused { field: "size", .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains("order it again"), "{error}");
        assert_eq!(image.capacity(), SHORT);
        write(&*image, SHORT - 512, &[orders; 512]).expect("writes");
        orders += 1;
    }
    // Five pieces over the base, three tables' lengths behind it.
    assert_eq!(orders, 8);
    assert_eq!(image.capacity(), size);
    for at in (SHORT..LONG).step_by(1 << 20) {
        assert_eq!(read(&*image, at, 1 << 20).expect("reads"), vec![0; 1 << 20]);
    }
    assert_eq!(read(&*image, 0, 512).expect("reads"), [0xab; 512]);
    drop(image);
    check_clean(&top);
    let shown = qemu_img(&["map", "--output=json", text(&top)]);
    assert!(shown.contains("\"depth\": 1"), "{shown}");
}

/// Version 2 has to write zeros over what a backing file shows, and nowhere else.
fn what_nothing_covers_costs_nothing() {
    for options in ["compat=0.10", "cluster_size=64k"] {
        let mut disk = Disk::over_a_longer_one(options);
        let image = disk.open();
        let began = Instant::now();
        image.grow(16 << 40, None).expect("grows");
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        disk.bytes.resize(4 << 20, 0);
        let shown = read(&*image, 0, 4 << 20).expect("reads");
        assert_same(&shown, &disk.bytes, options);
        drop(image);
        check_clean(&disk.top);
        assert!(contents(&disk.top).len() < 8 << 20);
    }
}

#[track_caller]
fn refused(path: &Path, size: u64, field: &str) {
    let recorder = Arc::new(Recorder::new(contents(path)));
    let image = open_recorded(&recorder, None);
    let before = recorder.position();
    match image.grow(size, None) {
        Err(ImageError::Refused { field: found, reason }) => assert_eq!(found, field, "{reason}"),
        other => panic!("{field}: {other:?}"),
    }
    assert_eq!(recorder.position(), before, "{field}: it wrote");
    assert_eq!(image.capacity(), 1 << 20);
    image.grow(1 << 20, None).expect("is so long already");
    assert!(!image.read_only());
}

fn what_excludes_growth_is_named_and_nothing_is_written() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "1M");
    for size in [(1 << 20) - 512, (1 << 20) + 511, 1 << 62, 1 << 63, u64::MAX - 511] {
        refused(&path, size, "size");
    }
    create(&path, "cluster_size=512", "1M");
    refused(&path, (1 << 37) + 512, "size");
    create(&path, "", "1M");
    patch(&path, 95, &[4]);
    refused(&path, 2 << 20, "autoclear_features");
    patch(&path, 95, &[0]);
    let options = read_only();
    let image = open_with(&[(&path, Format::Qcow2)], &options).expect("opens");
    let result = image.grow(2 << 20, None);
    assert!(matches!(result, Err(ImageError::ReadOnly { .. })), "{result:?}");
    drop(image);
    qemu_img(&["bitmap", "--add", text(&path), "b"]);
    refused(&path, 2 << 20, "bitmaps extension");
    create(&path, "compat=0.10", "1M");
    qemu_img(&["snapshot", "-c", "one", text(&path)]);
    refused(&path, 2 << 20, "nb_snapshots");
    let data = scratch.path("data");
    create(&path, &format!("data_file={}", text(&data)), "1M");
    let options = OpenOptions {
        data_file: Some(Arc::new(support::fd(&data, true))),
        ..OpenOptions::default()
    };
    let image = open_with(&[(&path, Format::Qcow2)], &options).expect("opens");
    let result = image.grow(2 << 20, None);
    assert!(
        matches!(
            result,
            Err(ImageError::Refused {
                field: "external data file",
                ..
            })
        ),
        "{result:?}"
    );
}

/// It has no L1 table before.
fn an_empty_disk_grows() {
    for options in ["cluster_size=512", "compat=0.10", "extended_l2=on"] {
        let scratch = Scratch::new();
        let top = scratch.path("top");
        create(&top, options, "0");
        let mut disk = Disk {
            _scratch: scratch,
            top,
            base: None,
            options,
            bytes: Vec::new(),
        };
        disk.grow_with_crashes(1 << 20);
        disk.write(&*disk.open(), (1 << 20) - 512, 512, 0x77);
        disk.check("no longer empty");
    }
}

/// A snapshot keeps its own, shorter disk.
fn a_disk_with_snapshots_grows() {
    let mut disk = Disk::alone("cluster_size=4k");
    qemu_img(&["snapshot", "-c", "one", text(&disk.top)]);
    let before = disk.bytes.clone();
    disk.grow_with_crashes(3 << 20);
    let image = disk.open();
    disk.write(&*image, OLD - 1024, 4096, 0x66);
    drop(image);
    disk.check("written across its old end");
    qemu_img(&["snapshot", "-a", "one", text(&disk.top)]);
    disk.bytes = before;
    disk.check("as it was");
}

/// What contradicts itself behind the end is found when the disk grows over it.
fn damage_behind_the_end_is_found() {
    let disk = Disk::alone("");
    let table = u64::from_be_bytes(contents(&disk.top)[40..48].try_into().expect("eight bytes"));
    let image = disk.open();
    image.grow(2 << 30, None).expect("grows");
    drop(image);
    patch(&disk.top, 24, &OLD.to_be_bytes());
    patch(&disk.top, table + 8, &(1_u64 << 63 | 0x1200).to_be_bytes());
    let image = disk.open();
    let result = image.grow(2 << 30, None);
    assert!(
        matches!(
            result,
            Err(ImageError::Corrupt {
                field: "L1 entry",
                ..
            })
        ),
        "{result:?}"
    );
    assert!(image.read_only());
    assert_eq!(image.capacity(), OLD);
}

suite! {
    with_qemu_img: [
        disks_grow_whole,
        a_table_that_stays_has_no_old_entries,
        what_nothing_covers_costs_nothing,
        what_lies_below_does_not_show_behind_the_old_end,
        a_long_table_finds_a_place,
        what_is_mapped_behind_the_end_does_not_show,
        writers_go_on_meanwhile,
        a_late_request_leaves_what_is_new,
        a_slow_write_shows_nothing_behind_the_old_end,
        a_growth_that_takes_long_goes_on_at_the_next_order,
        what_excludes_growth_is_named_and_nothing_is_written,
        an_empty_disk_grows,
        a_disk_with_snapshots_grows,
        damage_behind_the_end_is_found,
    ],
    alone: [],
}
