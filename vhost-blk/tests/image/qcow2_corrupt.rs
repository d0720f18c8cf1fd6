//! What is refused while an image is in use: an error to the guest, the corrupt bit set, no more writing,
//! and everything else still read. Here: entries of the mapping, and what they lead to.

use crate::support::damaged::{CLUSTER, COPIED, Damaged, read_first, says, write_first};
use crate::support::{Scratch, contents, create, fd, open, patch, qemu_img, read, read_only, text, write};
use vhost_blk::image::{self, Format, Image};

const COMPRESSED: u64 = 1 << 62;
/// All that a guest may do to the first cluster.
const ALL: [fn(&dyn Image) -> std::io::Result<()>; 5] = [
    read_first,
    write_first,
    |image| image.discard(0, CLUSTER),
    |image| image.write_zeroes(0, CLUSTER, true),
    |image| image.write_zeroes(0, CLUSTER, false),
];

fn entries_of_l2() {
    let victim = Damaged::new("");
    let (l2, end) = (victim.l2(), contents(&victim.path).len() as u64);
    let good = victim.word(l2);
    for (entry, reason) in [
        (good | 2, "reserved bits"),
        (good | 1 << 58, "reserved bits"),
        (good + 512, "not aligned"),
        (COPIED, "host offset is zero"),
        (COPIED | end.next_multiple_of(CLUSTER), "past the file's end"),
        (COPIED | 1 << 50, "past the file's end"),
        (COMPRESSED | COPIED | CLUSTER, "compressed"),
        (COMPRESSED | 1 << 50, "outside the file"),
        (COMPRESSED | 512, "outside the file"),
    ] {
        for fails in ALL {
            victim.set(l2, entry).set(72, 0).found(fails, "L2 entry", reason);
        }
    }
}

fn entries_of_l1() {
    let victim = Damaged::new("cluster_size=4k");
    let end = contents(&victim.path).len() as u64;
    let good = victim.word(victim.l1());
    for (entry, reason) in [
        (good | 1, "reserved bits"),
        (good | 1 << 60, "reserved bits"),
        (good + 512, "not aligned"),
        (COPIED, "without an offset"),
        (COPIED | end.next_multiple_of(CLUSTER), "past the file's end"),
    ] {
        for fails in ALL {
            victim
                .set(victim.l1(), entry)
                .set(72, 0)
                .found(fails, "L1 entry", reason);
        }
    }
}

fn extended_entries() {
    let victim = Damaged::new("extended_l2=on");
    let l2 = victim.l2();
    victim
        .set(l2 + 8, 1 << 32 | 1)
        .set(72, 16)
        .found(read_first, "L2 entry", "both allocated and zero");
    victim
        .set(l2, 0)
        .set(l2 + 8, 1)
        .set(72, 16)
        .found(read_first, "L2 entry", "host offset zero");
}

/// Version 2 has no bit to set: the image is read-only for as long as it is open.
fn version_2() {
    let victim = Damaged::new("compat=0.10");
    victim.set(victim.l2(), COPIED | 1 << 50);
    for fails in [read_first, write_first] {
        let image = open(&[(&victim.path, Format::Qcow2)]);
        let before = contents(&victim.path);
        says(fails(&*image), "L2 entry", "past the file's end");
        assert!(image.read_only());
        let error = write(&*image, 4 << 20, &[9; 512]).expect_err("is read-only");
        assert!(error.to_string().contains("found corrupt"), "{error}");
        assert_eq!(read(&*image, CLUSTER, 512).expect("reads"), vec![1; 512]);
        drop(image);
        assert!(contents(&victim.path) == before, "it was written to");
    }
}

/// Whoever may not write sets no bit either.
fn readers_change_nothing() {
    let victim = Damaged::new("");
    victim.set(victim.l2(), COPIED | 1 << 50);
    let before = contents(&victim.path);
    let options = read_only();
    // Through a descriptor that could.
    let image = image::open(fd(&victim.path, true), Format::Qcow2, Vec::new(), &options).expect("opens");
    for _ in 0..2 {
        says(read_first(&*image), "L2 entry", "past the file's end");
        assert_eq!(read(&*image, CLUSTER, 512).expect("reads"), vec![1; 512]);
    }
    drop(image);
    assert!(contents(&victim.path) == before, "it was written to");
}

/// A layer below is only read: its damage is an error of the top's reads, and stays where it is.
fn damage_below() {
    let victim = Damaged::new("");
    victim.set(victim.l2(), COPIED | 1 << 50);
    let before = contents(&victim.path);
    let scratch = Scratch::new();
    let path = scratch.path("overlay");
    create(
        &path,
        &format!("backing_file={},backing_fmt=qcow2", text(&victim.path)),
        "8M",
    );
    let image = open(&[(&path, Format::Qcow2), (&victim.path, Format::Qcow2)]);
    let error = read_first(&*image).expect_err("is refused");
    let cause = std::error::Error::source(error.get_ref().expect("has a cause"));
    let cause = cause.expect("the layer below").to_string();
    assert!(cause.contains("L2 entry: host offset"), "{error}: {cause}");
    assert!(!image.read_only(), "the top is sound");
    write(&*image, 0, &vec![8; CLUSTER as usize]).expect("writes");
    assert_eq!(read(&*image, 0, 512).expect("reads"), vec![8; 512]);
    assert!(contents(&victim.path) == before, "it was written to");
}

fn compressed_clusters() {
    for kind in ["zlib", "zstd"] {
        let scratch = Scratch::new();
        let (raw, path) = (scratch.path("raw"), scratch.path("top"));
        let mut data: Vec<u8> = (0..8_u32 << 20).map(|at| (at / 3000 * 7) as u8).collect();
        data[(8 << 20) - CLUSTER as usize..].fill(3);
        data[4 << 20..(4 << 20) + 512].fill(0);
        std::fs::write(&raw, data).expect("writes");
        let option = format!("compression_type={kind}");
        qemu_img(&[
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            &option,
            text(&raw),
            text(&path),
        ]);
        let victim = Damaged { scratch, path };
        let (l2, features) = (victim.l2(), victim.word(72));
        let first = victim.word(l2);
        assert_ne!(first & COMPRESSED, 0);
        let place = first & ((1 << 54) - 1);
        let good = contents(&victim.path)[place as usize..][..64].to_vec();
        patch(&victim.path, place, &[0xff; 64]);
        victim
            .set(72, features)
            .found(read_first, "compressed cluster", "cannot be inflated");
        victim
            .set(72, features)
            .found(write_first, "compressed cluster", "cannot be inflated");
        patch(&victim.path, place, &good);
        for (name, size) in [("short", CLUSTER / 2), ("long", CLUSTER * 2)] {
            let Some(packed) = pack(kind, size as usize) else {
                panic!("cannot compress")
            };
            patch(&victim.path, place, &packed);
            let reason = if name == "short" {
                "less than a cluster"
            } else {
                "more than a cluster"
            };
            victim
                .set(72, features)
                .found(read_first, "compressed cluster", reason);
        }
    }
}

/// `size` zeros, compressed as qcow2 does it.
fn pack(kind: &str, size: usize) -> Option<Vec<u8>> {
    let plain = vec![0; size];
    if kind == "zlib" {
        use std::io::Write;
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(&plain).ok()?;
        return encoder.finish().ok();
    }
    Some(ruzstd::encoding::compress_to_vec(
        &plain[..],
        ruzstd::encoding::CompressionLevel::Fastest,
    ))
}

crate::suite! {
    with_qemu_img: [
        entries_of_l2,
        entries_of_l1,
        extended_entries,
        version_2,
        readers_change_nothing,
        damage_below,
        compressed_clusters,
    ],
    alone: [],
}
