//! Images with the dirty bit: repaired before they are written to, or refused and left as they are.

use crate::support;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use crate::support::recorder::Recorder;
use crate::support::victim::Victim;
use crate::support::{
    Random, Request, Scratch, check_clean, check_leaks_at_most, contents, create, open, open_with, patch,
    qemu_contents, qemu_img, read_only, text, write,
};
use vhost_blk::image::{BlockFile, Format, ImageError, OpenOptions, open_layers};

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn dirty_images_are_repaired_before_writing() {
    for options in [
        "lazy_refcounts=on",
        "lazy_refcounts=on,cluster_size=512,refcount_bits=64",
        "lazy_refcounts=on,cluster_size=4k,refcount_bits=2",
        "lazy_refcounts=on,extended_l2=on",
    ] {
        let scratch = Scratch::new();
        let path = scratch.path("top");
        let size = 3_usize << 20;
        create(&path, options, &size.to_string());
        let mut model = vec![0; size];
        let image = open(&[(&path, Format::Qcow2)]);
        let mut random = Random::new(77);
        for step in 0..40_u8 {
            support::random_request(&mut random, size as u64, 200 << 10, step | 1).run(&*image, &mut model);
        }
        drop(image);
        qemu_img(&["snapshot", "-c", "one", text(&path)]);
        let image = open(&[(&path, Format::Qcow2)]);
        Request::Write {
            offset: 0,
            bytes: vec![9; 300 << 10],
        }
        .run(&*image, &mut model);
        drop(image);
        // The refcounts are lost, as after a power cut with lazy refcounts.
        let bytes = contents(&path);
        let features = word(&bytes, 72);
        let block = word(&bytes, word(&bytes, 48) as usize);
        patch(&path, block, &[0; 64]);
        patch(&path, 72, &(features | 1).to_be_bytes());
        let before = contents(&path);
        let image = open_with(&[(&path, Format::Qcow2)], &read_only()).expect("opens for reading");
        Request::Read {
            offset: 0,
            len: size as u64,
        }
        .run(&*image, &mut model);
        drop(image);
        assert!(contents(&path) == before, "a reader changed the image");

        let image = open(&[(&path, Format::Qcow2)]);
        assert_eq!(
            word(&contents(&path), 72),
            features,
            "{options}: the dirty bit is still set"
        );
        check_leaks_at_most(&path).unwrap_or_else(|found| panic!("{options}: {found}"));
        for step in 0..40_u8 {
            support::random_request(&mut random, size as u64, 200 << 10, step | 1).run(&*image, &mut model);
        }
        drop(image);
        check_clean(&path);
        assert_eq!(qemu_contents(&path, &[]), model);
    }
}

/// All of them lie in holes, so that the file is small.
fn a_repair_that_reads_too_much_is_refused() {
    const CLUSTER: u64 = 64 << 10;
    const TABLES: u64 = (32 << 10) + 1;
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "lazy_refcounts=on", "17T");
    let bytes = contents(&path);
    let (features, l1) = (word(&bytes, 72), word(&bytes, 40));
    let first = (bytes.len() as u64).next_multiple_of(CLUSTER);
    let entries = (0..TABLES).map(|table| (first + table * CLUSTER) | (1 << 63));
    let entries: Vec<u8> = entries.flat_map(u64::to_be_bytes).collect();
    patch(&path, l1, &entries);
    patch(&path, 72, &(features | 1).to_be_bytes());
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("opens");
    file.set_len(first + TABLES * CLUSTER).expect("grows");
    let error = open_with(&[(&path, Format::Qcow2)], &OpenOptions::default()).err();
    let words = error.expect("is refused").to_string();
    assert!(words.contains("bulkhead image check --repair"), "{words}");
    open_with(&[(&path, Format::Qcow2)], &read_only()).expect("opens for reading");
}

fn a_repair_that_is_cut_off_starts_again() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "lazy_refcounts=on,cluster_size=4k", "2M");
    let image = open(&[(&path, Format::Qcow2)]);
    write(&*image, 4096, &vec![7; 1 << 20]).expect("writes");
    drop(image);
    let expected = qemu_contents(&path, &[]);
    let block = word(&contents(&path), word(&contents(&path), 48) as usize);
    patch(&path, block, &[0; 512]);
    patch(&path, 79, &[1]);
    let recorder = Arc::new(Recorder::new(contents(&path)));
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, recorder.clone())];
    drop(open_layers(layers, None, &OpenOptions::default()).expect("repairs"));
    let mut random = Random::new(5);
    for count in 0..=recorder.position() {
        std::fs::write(&path, recorder.after_host_crash(count, &mut random)).expect("writes");
        drop(open(&[(&path, Format::Qcow2)]));
        check_clean(&path);
        assert_eq!(qemu_contents(&path, &[]), expected, "cut off after {count}");
    }
}

fn broken_dirty_images_are_left_alone() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "lazy_refcounts=on", "2M");
    let image = open(&[(&path, Format::Qcow2)]);
    write(&*image, 0, &[7; 512]).expect("writes");
    drop(image);
    let l2 = word(&contents(&path), word(&contents(&path), 40) as usize) & !(1 << 63);
    patch(&path, l2 + 8, &(1_u64 << 50).to_be_bytes());
    patch(&path, 79, &[1]);
    let before = contents(&path);
    let error = open_with(&[(&path, Format::Qcow2)], &OpenOptions::default())
        .err()
        .expect("is refused");
    let error = error.to_string();
    assert!(
        error.starts_with("image is corrupt: L2 entry: host offset 0x4000000000000 is past the file's end"),
        "{error}"
    );
    assert!(contents(&path) == before);
}

/// What cannot be counted, or its count not be noted, is not begun with.
fn what_cannot_be_repaired_is_refused() {
    // One host cluster for two guest clusters, where a refcount has one bit.
    let shared = |victim: &Victim, entries: u64| {
        drop(write(&*open(&[(&victim.path, Format::Qcow2)]), 0, &[7; 512]));
        let l2 = victim.long(victim.long(40)) & !(1 << 63);
        let host = victim.long(l2) & !(1 << 63);
        victim.patch(l2, &host.to_be_bytes().repeat(entries as usize));
    };
    let victim = Victim::new("cluster_size=4k,refcount_bits=1");
    shared(&victim, 2);
    victim
        .patch(79, &[1])
        .refused("refcount_order", "too small for 2 references");
    let victim = Victim::new("cluster_size=2M");
    shared(&victim, 1 << 16);
    victim
        .patch(79, &[1])
        .refused("refcounts", "over 65535 references");
    let victim = Victim::new("");
    qemu_img(&["bitmap", "--add", text(&victim.path), "one"]);
    let directory = victim.long(victim.bitmap_directory());
    // The length of the name.
    victim
        .patch(directory + 18, &[0xff; 2])
        .patch(79, &[1])
        .refused("bitmap directory", "malformed");
}

/// A file of holes, with more clusters than may be counted.
fn the_work_of_a_repair_is_bounded() {
    let victim = Victim::new("cluster_size=512");
    victim.patch(79, &[1]);
    let before = contents(&victim.path);
    let file = std::fs::OpenOptions::new().write(true).open(&victim.path);
    let file = file.expect("opens");
    file.set_len(33 << 30).expect("grows");
    let space = || file.metadata().expect("is there").blocks();
    let (taken, length) = (space(), before.len());
    let error = open_with(&[(&victim.path, Format::Qcow2)], &OpenOptions::default())
        .err()
        .expect("is refused");
    let ImageError::Refused { field, reason } = &error else {
        panic!("{error:?}")
    };
    assert!(
        *field == "refcounts" && reason.contains("clusters are too many to count"),
        "{error}"
    );
    assert_eq!(space(), taken, "it was written to");
    file.set_len(length as u64).expect("shrinks");
    assert!(contents(&victim.path) == before, "it was written to");
}

crate::suite! {
    with_qemu_img: [
        dirty_images_are_repaired_before_writing,
        a_repair_that_is_cut_off_starts_again,
        broken_dirty_images_are_left_alone,
        what_cannot_be_repaired_is_refused,
        the_work_of_a_repair_is_bounded,
        a_repair_that_reads_too_much_is_refused,
    ],
    alone: [],
}
