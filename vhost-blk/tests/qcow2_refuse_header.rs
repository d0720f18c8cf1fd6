//! What is refused when an image is opened: each with the field it names, and the file unchanged.
//! Here: features, sizes and places in the header and in the tables it points to.

mod support;

use support::victim::Victim;
use support::{contents, open_with, qemu_img, text};
use vhost_blk::image::{Format, ImageError, OpenOptions};

const CLUSTER: u64 = 64 << 10;

fn features() {
    let victim = Victim::new("");
    victim.u64(72, 1 << 40).never("incompatible_features", "bit 40");
    let mut name = vec![0; 48];
    name[1] = 40;
    name[2..12].copy_from_slice(b"flux drive");
    let victim = Victim::new("");
    // The image's own name table gives way to ours.
    let length = u64::from(victim.word(100));
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
        (bitmaps(1, 1, 64, CLUSTER), "bitmaps extension", "reserved"),
        (
            bitmaps(1, 0, 1 << 40, CLUSTER),
            "bitmap_directory_size",
            "over 64 MiB",
        ),
        (
            bitmaps(1, 0, 64, 1 << 50),
            "bitmap_directory_offset",
            "past the end",
        ),
        (bitmaps(1, 0, 64, CLUSTER), "refcount_table_offset", "overlaps"),
        (vec![0; 23], "bitmaps extension", "23 bytes long"),
    ] {
        let victim = Victim::new("");
        victim.extension(0x2385_2875, &data);
        let fields = [field, "bitmap_directory_offset"];
        let error = open_with(&[(&victim.path, Format::Qcow2)], &OpenOptions::default())
            .err()
            .expect("is refused");
        let ImageError::Refused {
            field: found,
            reason: why,
        } = &error
        else {
            panic!("{error:?}")
        };
        assert!(
            fields.contains(found) && why.contains(reason),
            "{error}: expected {field} {reason}"
        );
    }
}

fn places_of_tables() {
    let victim = Victim::new("");
    let end = contents(&victim.path).len() as u64;
    let l1 = u64::from_be_bytes(contents(&victim.path)[40..48].try_into().expect("eight bytes"));
    for (field, at, right) in [
        ("l1_table_offset", 40, l1),
        ("refcount_table_offset", 48, CLUSTER),
    ] {
        victim.u64(at, right + 512).never(field, "not aligned");
        victim.u64(at, 1 << 56).never(field, "past 2^56");
        victim
            .u64(at, end.next_multiple_of(CLUSTER))
            .never(field, "past the end");
        victim.u64(at, 0).never(field, "in the header");
        victim.u64(at, right);
    }
    victim.u64(40, CLUSTER);
    let error = open_with(&[(&victim.path, Format::Qcow2)], &OpenOptions::default())
        .err()
        .expect("is refused");
    assert!(error.to_string().contains("overlaps the table"), "{error}");
    victim
        .u64(40, l1)
        .u32(60, 1)
        .u64(64, 0)
        .never("snapshots_offset", "in the header");
    victim.u64(64, l1);
    let error = open_with(&[(&victim.path, Format::Qcow2)], &OpenOptions::default())
        .err()
        .expect("is refused");
    assert!(error.to_string().contains("overlaps the table"), "{error}");
    victim.u32(60, 0).u64(64, 0);
    victim
        .u64(CLUSTER, 2 * CLUSTER + 512)
        .never("refcount table", "not aligned");
    victim
        .u64(CLUSTER, 1 << 40)
        .never("refcount table", "past the end");
    victim
        .u64(CLUSTER, CLUSTER)
        .refused("refcount table", "overlaps the refcount_table_offset");
}

fn snapshot_tables() {
    let victim = Victim::new("");
    qemu_img(&["snapshot", "-c", "one", text(&victim.path)]);
    let table = u64::from_be_bytes(contents(&victim.path)[64..72].try_into().expect("eight bytes"));
    let l1 = u64::from_be_bytes(
        contents(&victim.path)[table as usize..][..8]
            .try_into()
            .expect("eight bytes"),
    );
    victim
        .u64(table, l1 + 512)
        .never("snapshot l1_table_offset", "not aligned");
    victim
        .u64(table, 1 << 50)
        .never("snapshot l1_table_offset", "past the end")
        .u64(table, l1);
    victim
        .u32(table + 8, u32::MAX)
        .never("snapshot l1_size", "over 32 MiB")
        .u32(table + 8, 1);
    victim.u32(table + 36, 2000).never("snapshot table", "extra data");
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
    let length = u64::from(victim.word(100));
    victim
        .u32(length, 0x1234)
        .u32(length + 4, 70_000)
        .never("header extension", "past the first cluster");
    victim
        .u32(length + 4, u32::MAX)
        .never("header extension", "past the first cluster");
}

suite! {
    with_qemu_img: [
        features,
        sizes_of_the_header,
        limits,
        places_of_tables,
        snapshot_tables,
        names_and_extensions,
    ],
    alone: [],
}
