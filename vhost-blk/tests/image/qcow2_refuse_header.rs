//! What is refused when an image is opened: each with the field it names, and the file unchanged.
//! Here: features, sizes, names and extensions in the header.

use crate::support;
use crate::support::victim::Victim;
use vhost_blk::image::Format;

const CLUSTER: u64 = 64 << 10;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE: u32 = 0x4441_5441;
const ENCRYPTION: u32 = 0x0537_be77;

fn features() {
    let victim = Victim::new("");
    victim.u64(72, 1 << 40).never("incompatible_features", "bit 40");
    let mut name = vec![0; 48];
    name[1] = 40;
    name[2..12].copy_from_slice(b"flux drive");
    let victim = Victim::new("");
    // The image's own name table gives way to ours.
    let length = victim.header_length();
    victim.patch(
        length,
        &[0x6803_f857_u32.to_be_bytes(), 48_u32.to_be_bytes()].concat(),
    );
    victim.patch(length + 8, &name).patch(length + 56, &[0; 8]);
    victim
        .u64(72, 1 << 40)
        .never("incompatible_features", "\"flux drive\" (bit 40)");
    let victim = Victim::new("");
    victim.u64(72, 8).never("compression_type", "the type is zlib");
    victim
        .patch(104, &[1])
        .u64(72, 0)
        .never("compression_type", "without its feature bit");
    victim
        .patch(104, &[9])
        .u64(72, 8)
        .never("compression_type", "9 is not supported");
    victim
        .patch(104, &[0])
        .u64(72, 0)
        .u64(88, 1)
        .never("autoclear_features", "without the bitmaps extension");
    victim
        .u64(88, 2)
        .never("autoclear_features", "without an external data file");
    victim.u64(88, 0).u32(4, 4).never("version", "4 is not supported");
    victim.u32(4, 1).never("version", "1 is not supported");
}

fn sizes_of_the_header() {
    let victim = Victim::new("");
    for bits in [0, 8, 22, 63, u32::MAX] {
        victim.u32(20, bits).never("cluster_bits", "outside 9 to 21");
    }
    victim
        .u32(20, 13)
        .u64(72, 16)
        .never("cluster_bits", "extended L2");
    victim.u32(20, 16).u64(72, 0);
    victim
        .u32(96, 7)
        .never("refcount_order", "7 is over 6")
        .u32(96, 4);
    for length in [0, 72, 103, 105, 110, 65544, u32::MAX] {
        victim
            .u32(100, length)
            .never("header_length", "under 104, over a cluster or no multiple of 8");
    }
}

fn limits() {
    let victim = Victim::new("");
    let l1 = victim.word(36);
    victim.u32(36, (32 << 17) + 1).never("l1_size", "over 32 MiB");
    victim.u32(36, 0).never("l1_size", "too few");
    victim.u32(36, l1).u64(24, 1 << 40).never("l1_size", "too few");
    victim.u64(24, 1 << 63).never("size", "over 2^63-1");
    victim.u64(24, !511).never("size", "over 2^63-1");
    victim
        .u64(24, 1000)
        .never("size", "no multiple of 512")
        .u64(24, 1 << 20);
    victim.u32(56, 129).never("refcount_table_clusters", "over 8 MiB");
    victim
        .u32(56, u32::MAX)
        .never("refcount_table_clusters", "over 8 MiB");
    victim
        .u32(56, 0)
        .never("refcount_table_clusters", "no refcount table")
        .u32(56, 1);
    victim
        .u32(60, 65_537)
        .never("nb_snapshots", "over 65536")
        .u32(60, 0);
    let bitmaps = |count: u32, reserved: u32, size: u64, offset: u64| {
        let mut data = count.to_be_bytes().to_vec();
        data.extend(reserved.to_be_bytes());
        data.extend(size.to_be_bytes());
        data.extend(offset.to_be_bytes());
        data
    };
    let reserved = bitmaps(1, 1, 64, CLUSTER);
    for (data, field, reason) in [
        (
            bitmaps(65_536, 0, 64, CLUSTER),
            "bitmaps extension",
            "outside 1 to 65535",
        ),
        (
            bitmaps(0, 0, 64, CLUSTER),
            "bitmaps extension",
            "outside 1 to 65535",
        ),
        (reserved, "bitmaps extension", "reserved field is not zero"),
        (
            bitmaps(1, 0, 1 << 40, CLUSTER),
            "bitmap_directory_size",
            "over 64 MiB",
        ),
        (vec![0; 23], "bitmaps extension", "23 bytes long"),
    ] {
        let victim = Victim::new("");
        victim
            .extension(0x2385_2875, &data)
            .u64(88, 1)
            .never(field, reason);
    }
}

fn names_and_extensions() {
    let victim = Victim::new("");
    victim
        .u64(8, 512)
        .u32(16, 1024)
        .never("backing_file_size", "over 1023");
    victim
        .u64(8, CLUSTER - 10)
        .u32(16, 20)
        .never("backing_file_offset", "outside the first cluster");
    victim
        .u64(8, u64::MAX)
        .never("backing_file_offset", "outside the first cluster");
    victim
        .u64(8, 16)
        .never("backing_file_offset", "outside the first cluster");
    let victim = Victim::new("");
    victim
        .extension(0x1234, &[1; 5])
        .extension(0x1234, &[2; 5])
        .never("header extension", "appears twice");
    let victim = Victim::new("");
    for kind in 1..=257 {
        victim.extension(0x1234_0000 + kind, &[]);
    }
    victim.never("header extension", "more than 256");
    let victim = Victim::new("");
    let length = victim.header_length();
    victim
        .u32(length, 0x1234)
        .u32(length + 4, 70_000)
        .never("header extension", "past the first cluster");
    victim
        .u32(length + 4, u32::MAX)
        .never("header extension", "past the first cluster");
}

/// A version 2 header has no feature bits, and extensions all the same.
fn version_2() {
    let name = b"json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}";
    for named in [DATA_FILE, BACKING_FORMAT] {
        let victim = Victim::new("compat=0.10");
        victim.extension(named, name);
        let image = support::open(&[(&victim.path, Format::Qcow2)]);
        assert_eq!(support::read(&*image, 0, 512).expect("reads"), vec![0; 512]);
    }
    let victim = Victim::new("compat=0.10");
    victim.u32(32, 1).never("crypt_method", "AES");
    victim
        .u32(32, 2)
        .never("header extension", "without an encryption header")
        .u32(32, 0);
    victim
        .extension(ENCRYPTION, &[0; 16])
        .never("header extension", "without encryption");
    victim
        .extension(ENCRYPTION, &[0; 16])
        .never("header extension", "appears twice");
    victim
        .extension(ENCRYPTION, &[0; 15])
        .never("header extension", "15 bytes long, not 16");
    victim
        .u32(76, 70_000)
        .never("header extension", "past the first cluster");
}

crate::suite! {
    with_qemu_img: [
        features,
        sizes_of_the_header,
        limits,
        names_and_extensions,
        version_2,
    ],
    alone: [],
}
