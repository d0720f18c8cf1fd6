//! A disk that grows while it is written to, one that takes long to grow, and what cannot grow.

use crate::support;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::growing::{Disk, OLD, open_recorded};
use crate::support::hooked::Hooked;
use crate::support::recorder::Recorder;
use crate::support::{
    Random, Scratch, assert_same, check_clean, contents, create, open, open_with, patch, qemu_img, read,
    read_only, text, write,
};
use vhost_blk::image::{BlockFile, Format, Image, ImageError, OpenOptions, open_layers};
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

crate::suite! {
    with_qemu_img: [
        writers_go_on_meanwhile,
        a_late_request_leaves_what_is_new,
        a_slow_write_shows_nothing_behind_the_old_end,
        a_growth_that_takes_long_goes_on_at_the_next_order,
        what_excludes_growth_is_named_and_nothing_is_written,
        damage_behind_the_end_is_found,
    ],
    alone: [],
}
