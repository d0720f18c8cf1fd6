//! What is refused when an image is opened: each with the field it names, and the file unchanged.

mod support;

use std::path::{Path, PathBuf};

use support::{Scratch, contents, create, fd, have_qemu_img, open_with, patch, qemu_img, text};
use vhost_blk::image::{self, Format, ImageError, OpenOptions};

const CLUSTER: u64 = 64 << 10;

struct Victim {
    scratch: Scratch,
    path: PathBuf,
}

impl Victim {
    /// An image with one allocated cluster, made with these options.
    fn new(options: &str) -> Option<Self> {
        if !have_qemu_img() {
            return None;
        }
        let scratch = Scratch::new();
        let path = scratch.path("top");
        create(&path, options, "1M");
        Some(Self { scratch, path })
    }

    fn patch(&self, offset: u64, bytes: &[u8]) -> &Self {
        patch(&self.path, offset, bytes);
        self
    }

    fn u32(&self, offset: u64, value: u32) -> &Self {
        self.patch(offset, &value.to_be_bytes())
    }

    fn u64(&self, offset: u64, value: u64) -> &Self {
        self.patch(offset, &value.to_be_bytes())
    }

    /// Refused for writing, with `field` and a reason that contains `reason`.
    #[track_caller]
    fn refused(&self, field: &str, reason: &str) -> &Self {
        refused(
            &[(&self.path, Format::Qcow2)],
            &OpenOptions::default(),
            field,
            reason,
        );
        self
    }

    /// Refused for reading too.
    #[track_caller]
    fn never(&self, field: &str, reason: &str) -> &Self {
        let read_only = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        refused(&[(&self.path, Format::Qcow2)], &read_only, field, reason);
        self.refused(field, reason)
    }

    /// Adds a header extension in front of the others.
    fn extension(&self, kind: u32, data: &[u8]) -> &Self {
        let header_length = u64::from(self.word(100));
        let mut bytes = [&kind.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let old = contents(&self.path)[header_length as usize..4096].to_vec();
        self.patch(header_length, &[bytes, old].concat())
    }

    fn word(&self, offset: usize) -> u32 {
        u32::from_be_bytes(
            contents(&self.path)[offset..offset + 4]
                .try_into()
                .expect("four bytes"),
        )
    }
}

#[track_caller]
fn refused(layers: &[(&Path, Format)], options: &OpenOptions, field: &str, reason: &str) {
    let before: Vec<_> = layers.iter().map(|(path, _)| contents(path)).collect();
    let error = open_with(layers, options)
        .err()
        .unwrap_or_else(|| panic!("{field} {reason}: was opened"));
    let mut inner = &error;
    while let ImageError::Backing { source, .. } = inner {
        inner = source;
    }
    match inner {
        ImageError::Refused {
            field: found,
            reason: why,
        } => {
            assert_eq!(*found, field, "{why}");
            assert!(why.contains(reason), "{field}: {why:?} does not say {reason:?}");
        }
        other => panic!("{field} {reason}: {other:?}"),
    }
    for ((path, _), before) in layers.iter().zip(before) {
        assert!(contents(path) == before, "{} was changed", path.display());
    }
}

#[test]
fn the_format_is_never_probed() {
    let Some(victim) = Victim::new("") else { return };
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let image = open_with(&[(&victim.path, Format::Raw)], &options).expect("opens as raw");
    assert_eq!(&support::read(&*image, 0, 512).expect("reads")[..4], b"QFI\xfb");
    let raw = victim.scratch.path("raw");
    std::fs::write(&raw, vec![0; 1 << 20]).expect("writes");
    refused(
        &[(&raw, Format::Qcow2)],
        &OpenOptions::default(),
        "magic",
        "not a qcow2 image",
    );
    std::fs::write(&raw, b"QFI").expect("writes");
    refused(
        &[(&raw, Format::Qcow2)],
        &OpenOptions::default(),
        "magic",
        "not a qcow2 image",
    );
    for name in ["vmdk", "vdi", "vhdx", "auto", ""] {
        assert!(
            name.parse::<Format>()
                .unwrap_err()
                .to_string()
                .contains("unknown format")
        );
    }
}

#[test]
fn backing_files_must_be_passed_and_named() {
    for version in ["compat=0.10", "compat=1.1"] {
        let Some(victim) = Victim::new(version) else {
            return;
        };
        let (below, top) = (victim.scratch.path("below"), victim.scratch.path("overlay"));
        std::fs::write(&below, vec![1; 1 << 20]).expect("writes");
        create(
            &top,
            &format!("{version},backing_file={},backing_fmt=raw", text(&below)),
            "1M",
        );
        let write = OpenOptions::default();
        refused(
            &[(&top, Format::Qcow2)],
            &write,
            "backing file",
            "names one but none was passed",
        );
        refused(
            &[(&victim.path, Format::Qcow2), (&below, Format::Raw)],
            &write,
            "backing file",
            "names none",
        );
        refused(
            &[(&below, Format::Raw), (&victim.path, Format::Qcow2)],
            &write,
            "backing file",
            "a raw image has none",
        );
        // A name is never looked at, whatever it says.
        let name = b"json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}";
        let at = u64::from_be_bytes(contents(&top)[8..16].try_into().expect("eight bytes"));
        patch(&top, at, name);
        patch(&top, 16, &(name.len() as u32).to_be_bytes());
        let image = support::open(&[(&top, Format::Qcow2), (&below, Format::Raw)]);
        assert_eq!(support::read(&*image, 0, 512).expect("reads"), vec![1; 512]);
    }
}

#[test]
fn an_external_data_file_must_be_passed() {
    let Some(victim) = Victim::new("") else { return };
    let (top, data) = (victim.scratch.path("other"), victim.scratch.path("data"));
    create(&top, &format!("data_file={}", text(&data)), "1M");
    refused(
        &[(&top, Format::Qcow2)],
        &OpenOptions::default(),
        "external data file",
        "none was passed",
    );
    let options = OpenOptions {
        data_file: Some(fd(&data, true).into()),
        ..OpenOptions::default()
    };
    refused(
        &[(&victim.path, Format::Qcow2)],
        &options,
        "external data file",
        "the image has none",
    );
}

#[test]
fn encryption() {
    let Some(victim) = Victim::new("") else { return };
    victim.u32(32, 1).never("crypt_method", "AES");
    victim.u32(32, 2).never("crypt_method", "LUKS");
    victim.u32(32, 77).never("crypt_method", "method 77");
    let luks = victim.scratch.path("luks");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=x",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        text(&luks),
        "1M",
    ]);
    refused(
        &[(&luks, Format::Qcow2)],
        &OpenOptions::default(),
        "crypt_method",
        "LUKS",
    );
    let Some(victim) = Victim::new("") else { return };
    victim
        .extension(0x0537_be77, &[0; 16])
        .never("header extension", "without encryption");
}

#[test]
fn features() {
    let Some(victim) = Victim::new("") else { return };
    victim.u64(72, 1 << 40).never("incompatible_features", "bit 40");
    let mut name = vec![0; 48];
    name[1] = 40;
    name[2..12].copy_from_slice(b"flux drive");
    let Some(victim) = Victim::new("") else { return };
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
    let Some(victim) = Victim::new("") else { return };
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

#[test]
fn corrupt_images_are_read_only() {
    let Some(victim) = Victim::new("") else { return };
    victim.u64(72, 2).refused("incompatible_features", "corrupt bit");
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let image = open_with(&[(&victim.path, Format::Qcow2)], &options).expect("opens for reading");
    assert_eq!(support::read(&*image, 0, 512).expect("reads"), vec![0; 512]);
}

#[test]
fn sizes_of_the_header() {
    let Some(victim) = Victim::new("") else { return };
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

#[test]
fn limits() {
    let Some(victim) = Victim::new("") else { return };
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
        let Some(victim) = Victim::new("") else { return };
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

#[test]
fn places_of_tables() {
    let Some(victim) = Victim::new("") else { return };
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

#[test]
fn snapshot_tables() {
    let Some(victim) = Victim::new("") else { return };
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

#[test]
fn names_and_extensions() {
    let Some(victim) = Victim::new("") else { return };
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
    let Some(victim) = Victim::new("") else { return };
    victim
        .extension(0x1234, &[1; 5])
        .extension(0x1234, &[2; 5])
        .never("header extension", "appears twice");
    let Some(victim) = Victim::new("") else { return };
    let length = u64::from(victim.word(100));
    victim
        .u32(length, 0x1234)
        .u32(length + 4, 70_000)
        .never("header extension", "past the first cluster");
    victim
        .u32(length + 4, u32::MAX)
        .never("header extension", "past the first cluster");
}

#[test]
fn chains() {
    let Some(victim) = Victim::new("") else { return };
    let mut layers = vec![(victim.scratch.path("0"), Format::Raw)];
    std::fs::write(&layers[0].0, vec![7; 1 << 20]).expect("writes");
    for depth in 1..17 {
        let path = victim.scratch.path(&depth.to_string());
        let (below, format) = &layers[0];
        create(
            &path,
            &format!("backing_file={},backing_fmt={format}", text(below)),
            "1M",
        );
        layers.insert(0, (path, Format::Qcow2));
    }
    let all: Vec<_> = layers
        .iter()
        .map(|(path, format)| (path.as_path(), *format))
        .collect();
    refused(
        &all,
        &OpenOptions::default(),
        "chain",
        "17 layers are more than the 16",
    );
    patch(all[0].0, 0, b"QFI\xfb");
    let image = support::open(&all[1..]);
    assert_eq!(support::read(&*image, 4096, 512).expect("reads"), vec![7; 512]);
    drop(image);
    let link = victim.scratch.path("link");
    std::fs::hard_link(all[15].0, &link).expect("links");
    refused(
        &[all[14], all[15], (&link, Format::Qcow2)],
        &OpenOptions::default(),
        "chain",
        "appears twice",
    );
    let broken = victim.scratch.path("broken");
    std::fs::copy(all[15].0, &broken).expect("copies");
    patch(&broken, 32, &2_u32.to_be_bytes());
    let error = open_with(
        &[all[14], (&broken, Format::Qcow2), all[16]],
        &OpenOptions::default(),
    )
    .err()
    .expect("refused");
    assert!(matches!(error, ImageError::Backing { depth: 1, .. }), "{error:?}");
}

#[test]
fn files_that_hold_no_image() {
    let (read, _write) = std::os::unix::net::UnixStream::pair().expect("makes a socket pair");
    let error = image::open(read.into(), Format::Raw, Vec::new(), &OpenOptions::default())
        .err()
        .expect("is refused");
    assert!(matches!(error, ImageError::Io { .. }), "{error:?}");
    let scratch = Scratch::new();
    let path = scratch.path("odd");
    std::fs::write(&path, [1; 700]).expect("writes");
    refused(
        &[(&path, Format::Raw)],
        &OpenOptions::default(),
        "size",
        "not a positive multiple of 512",
    );
}
