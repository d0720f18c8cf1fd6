//! What is refused while an image is in use: an error to the guest, the corrupt bit set, no more writing,
//! and everything else still read.

mod support;

use std::path::PathBuf;
use std::sync::Arc;

use support::{Scratch, contents, create, open, open_with, patch, qemu_img, read, text, write};
use vhost_blk::image::{Format, Image, OpenOptions};

const CLUSTER: u64 = 64 << 10;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// An image whose first two clusters and last one hold data.
struct Victim {
    _scratch: Scratch,
    path: PathBuf,
}

impl Victim {
    fn new(options: &str) -> Self {
        let scratch = Scratch::new();
        let path = scratch.path("top");
        create(&path, options, "8M");
        let image = open(&[(&path, Format::Qcow2)]);
        write(&*image, 0, &vec![1; 2 * CLUSTER as usize]).expect("writes");
        write(&*image, (8 << 20) - CLUSTER, &vec![3; CLUSTER as usize]).expect("writes");
        Self {
            _scratch: scratch,
            path,
        }
    }

    fn word(&self, offset: u64) -> u64 {
        let bytes = contents(&self.path);
        u64::from_be_bytes(bytes[offset as usize..][..8].try_into().expect("eight bytes"))
    }

    fn set(&self, offset: u64, value: u64) -> &Self {
        patch(&self.path, offset, &value.to_be_bytes());
        self
    }

    fn l1(&self) -> u64 {
        self.word(40)
    }

    fn l2(&self) -> u64 {
        self.word(self.l1()) & !COPIED
    }

    /// Where the refcount (16 bits) of the cluster at `offset` is.
    fn refcount_at(&self, offset: u64) -> u64 {
        self.word(self.word(48)) + offset / CLUSTER * 2
    }

    fn set_refcount(&self, offset: u64, count: u16) -> &Self {
        patch(&self.path, self.refcount_at(offset), &count.to_be_bytes());
        self
    }

    /// `fails` gives an error that says `reason`; then the image is as it must be.
    #[track_caller]
    fn found(&self, fails: impl Fn(&dyn Image) -> std::io::Result<()>, reason: &str) {
        let image = open(&[(&self.path, Format::Qcow2)]);
        self.found_in(&image, &fails, reason);
        drop(image);
        let refused = open_with(&[(&self.path, Format::Qcow2)], &OpenOptions::default())
            .err()
            .expect("is refused");
        assert!(refused.to_string().contains("corrupt bit"), "{refused}");
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let image = open_with(&[(&self.path, Format::Qcow2)], &options).expect("opens for reading");
        assert_eq!(
            read(&*image, (8 << 20) - CLUSTER, 512).expect("reads"),
            vec![3; 512]
        );
    }

    #[track_caller]
    fn found_in(
        &self,
        image: &Arc<dyn Image>,
        fails: &dyn Fn(&dyn Image) -> std::io::Result<()>,
        reason: &str,
    ) {
        assert!(!image.read_only());
        let error = fails(&**image).expect_err("is refused").to_string();
        assert!(
            error.contains("image is corrupt") && error.contains(reason),
            "{error:?} does not say {reason:?}"
        );
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

fn read_first(image: &dyn Image) -> std::io::Result<()> {
    read(image, 512, 512).map(|_| ())
}

fn write_first(image: &dyn Image) -> std::io::Result<()> {
    write(image, 512, &[5; 512])
}

fn entries_of_l2() {
    let victim = Victim::new("");
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
        for fails in [read_first, write_first] {
            victim.set(l2, entry).set(72, 0).found(fails, reason);
        }
    }
}

fn entries_of_l1() {
    let victim = Victim::new("cluster_size=4k");
    let end = contents(&victim.path).len() as u64;
    let good = victim.word(victim.l1());
    for (entry, reason) in [
        (good | 1, "reserved bits"),
        (good | 1 << 60, "reserved bits"),
        (good + 512, "not aligned"),
        (COPIED, "without an offset"),
        (COPIED | end.next_multiple_of(CLUSTER), "past the file's end"),
    ] {
        for fails in [read_first, write_first] {
            victim.set(victim.l1(), entry).set(72, 0).found(fails, reason);
        }
    }
}

fn extended_entries() {
    let victim = Victim::new("extended_l2=on");
    let l2 = victim.l2();
    victim
        .set(l2 + 8, 1 << 32 | 1)
        .set(72, 16)
        .found(read_first, "both allocated and zero");
    victim
        .set(l2, 0)
        .set(l2 + 8, 1)
        .set(72, 16)
        .found(read_first, "host offset zero");
}

fn data_over_metadata() {
    let places = |victim: &Victim| {
        let refblock = victim.word(victim.word(48));
        [
            (victim.l1(), "l1_table_offset"),
            (victim.l2(), "L2 table"),
            (victim.word(48), "refcount_table_offset"),
            (refblock, "refcount block"),
            (victim.word(64), "snapshots_offset"),
        ]
    };
    for index in 0..5 {
        let victim = Victim::new("");
        qemu_img(&["snapshot", "-c", "one", text(&victim.path)]);
        // Makes the active tables our own again.
        drop(open(&[(&victim.path, Format::Qcow2)]).write(&[(&mut [4; 512][..]).into()], CLUSTER));
        let (place, name) = places(&victim)[index];
        victim.set(victim.l2(), COPIED | place);
        let before = contents(&victim.path)[place as usize..][..512].to_vec();
        victim.found(write_first, &format!("would overwrite the {name}"));
        assert!(
            contents(&victim.path)[place as usize..][..512] == before,
            "{name} was overwritten"
        );
    }
    let victim = Victim::new("");
    victim
        .set(victim.l2(), 0)
        .set(victim.l2(), COPIED | 512)
        .found(write_first, "not aligned");
}

fn refcounts_that_lie() {
    let victim = Victim::new("");
    let (l2, host) = (victim.l2(), victim.word(victim.l2()) & !COPIED);
    for count in [0, 2, 9] {
        victim
            .set_refcount(host, count)
            .set(72, 0)
            .found(write_first, "COPIED is set but the refcount");
    }
    victim.set_refcount(host, 1).set_refcount(l2, 2).set(72, 0);
    victim.found(
        |image| write(image, 2 << 20, &[5; 512]),
        "COPIED is set but the refcount",
    );
    // Metadata that counts as free: an allocation must not fall on it.
    for place in [0, victim.word(48), victim.l1(), l2] {
        let victim = Victim::new("");
        victim.set_refcount(place, 0);
        if place == 0 {
            // The header is never looked at; nothing is allocated there.
            let image = open(&[(&victim.path, Format::Qcow2)]);
            write(&*image, 2 << 20, &vec![5; 2 << 20]).expect("writes");
            drop(image);
            assert_eq!(&contents(&victim.path)[..4], b"QFI\xfb");
            continue;
        }
        victim.found(|image| write(image, 2 << 20, &vec![5; 2 << 20]), "");
    }
    let victim = Victim::new("");
    victim.set_refcount(host, 0).set(victim.l2(), host);
    let image = open(&[(&victim.path, Format::Qcow2)]);
    image.discard(0, CLUSTER).expect("is noted");
    victim.found_in(&image, &|image| image.flush(), "less than its references");
}

fn tables_used_twice() {
    let victim = Victim::new("cluster_size=4k");
    let table = victim.word(victim.l1());
    victim.set(victim.l1() + 8, table);
    // Guest cluster 512 is the first that the second entry maps.
    victim.found(|image| write(image, 512 * 4096, &[5; 512]), "is used as");
    let victim = Victim::new("");
    let refblock = victim.word(victim.word(48));
    victim.set(victim.l1(), COPIED | refblock);
    let image = open(&[(&victim.path, Format::Qcow2)]);
    // Its refcounts are zero here, which is a good L2 entry.
    let error = write(&*image, 4 << 20, &[5; 512])
        .expect_err("is refused")
        .to_string();
    assert!(error.contains("is used as refcount block"), "{error}");
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
        let victim = Victim {
            _scratch: scratch,
            path,
        };
        let (l2, features) = (victim.l2(), victim.word(72));
        let first = victim.word(l2);
        assert_ne!(first & COMPRESSED, 0);
        let place = first & ((1 << 54) - 1);
        let good = contents(&victim.path)[place as usize..][..64].to_vec();
        patch(&victim.path, place, &[0xff; 64]);
        victim.set(72, features).found(read_first, "compressed cluster");
        victim.set(72, features).found(write_first, "compressed cluster");
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
            victim.set(72, features).found(read_first, reason);
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

suite! {
    with_qemu_img: [
        entries_of_l2,
        entries_of_l1,
        extended_entries,
        data_over_metadata,
        refcounts_that_lie,
        tables_used_twice,
        compressed_clusters,
    ],
    alone: [],
}
