//! A disk that grows at rest: it shows zeros where it was not, a crash at any point leaves it as long as it was
//! or as it was to be, and qemu-img finds nothing wrong with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::growing::{Disk, OLD, open_recorded};
use crate::support::recorder::Recorder;
use crate::support::{
    Random, Scratch, assert_same, check_clean, check_leaks_at_most, contents, create, patch, qemu_img, read,
    text, write,
};
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

/// It has no L1 table before.
fn an_empty_disk_grows() {
    for options in ["cluster_size=512", "compat=0.10", "extended_l2=on"] {
        let scratch = Scratch::new();
        let top = scratch.path("top");
        create(&top, options, "0");
        let mut disk = Disk {
            scratch,
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

crate::suite! {
    with_qemu_img: [
        disks_grow_whole,
        a_table_that_stays_has_no_old_entries,
        what_lies_below_does_not_show_behind_the_old_end,
        a_long_table_finds_a_place,
        what_is_mapped_behind_the_end_does_not_show,
        what_nothing_covers_costs_nothing,
        an_empty_disk_grows,
        a_disk_with_snapshots_grows,
    ],
    alone: [],
}
