//! The read-only formats: what qemu-img wrote is read back, alone and below a qcow2 overlay; what would
//! need another file, or is damaged, is refused or fails without a panic.

use crate::support;
use std::path::Path;

use crate::support::victim::refused;
use crate::support::{
    Random, Scratch, assert_same, contents, create, open, open_with, patch, qemu_img, qemu_img_output, read,
    read_only, text, write,
};
use vhost_blk::image::{Format, OpenOptions};

/// Format, qemu-img's name of it, and its options.
const SHAPES: &[(Format, &str, &str)] = &[
    (Format::Vmdk, "vmdk", "subformat=monolithicSparse"),
    (Format::Vmdk, "vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    (Format::Vmdk, "vmdk", "subformat=streamOptimized"),
    (Format::Vdi, "vdi", "static=off"),
    (Format::Vdi, "vdi", "static=on"),
    (Format::Vhdx, "vhdx", "subformat=dynamic"),
    (Format::Vhdx, "vhdx", "subformat=dynamic,block_size=1M"),
    (Format::Vhdx, "vhdx", "subformat=fixed"),
    (Format::Vhd, "vpc", "subformat=dynamic,force_size=on"),
    (Format::Vhd, "vpc", "subformat=fixed,force_size=on"),
    (Format::Vhd, "vpc", "subformat=dynamic"),
];

const SIZE: usize = (9 << 20) + 4096;

/// Data and holes, neither aligned to any format's blocks.
fn disk() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    for (start, len) in [
        (0, 70_000),
        (1_500_000, 1 << 20),
        (6 << 20, 3),
        (SIZE - 5000, 5000),
    ] {
        for (at, byte) in bytes[start..start + len].iter_mut().enumerate() {
            *byte = (at % 251) as u8 + 1;
        }
    }
    bytes
}

fn convert(scratch: &Scratch, format: &str, options: &str) -> std::path::PathBuf {
    let (raw, path) = (scratch.path("raw"), scratch.path("image"));
    std::fs::write(&raw, disk()).expect("writes");
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        format,
        "-o",
        options,
        text(&raw),
        text(&path),
    ]);
    path
}

fn what_qemu_img_wrote_is_read() {
    for (format, name, options) in SHAPES {
        let scratch = Scratch::new();
        let path = convert(&scratch, name, options);
        let image = open_with(&[(&path, *format)], &read_only())
            .unwrap_or_else(|error| panic!("{options}: {error:?}"));
        // Without force_size the geometry decides, and rounds up.
        let mut expected = disk();
        expected.resize(image.capacity() as usize, 0);
        assert!(
            options == &"subformat=dynamic" || expected.len() == SIZE,
            "{name} {options}: size"
        );
        let found = read(&*image, 0, expected.len()).expect("reads");
        assert_same(&found, &expected, &format!("{name} {options}"));
        let mut random = Random::new(5);
        for _ in 0..50 {
            let (offset, len) = random.range(SIZE as u64, 200 << 10);
            let found = read(&*image, offset, len as usize).expect("reads");
            assert_same(
                &found,
                &expected[offset as usize..][..len as usize],
                &format!("{name} {options}: {offset:#x}+{len:#x}"),
            );
        }
        assert!(write(&*image, 0, &[1; 512]).is_err(), "it is read-only");
        drop(image);
        refused(
            &[(&path, *format)],
            &OpenOptions::default(),
            "format",
            "can only be read",
        );
    }
}

fn they_lie_below_overlays() {
    for (format, name, options) in SHAPES {
        let scratch = Scratch::new();
        let (base, top) = (convert(&scratch, name, options), scratch.path("top"));
        let backing = format!("backing_file={},backing_fmt={name}", text(&base));
        create(&top, &backing, &SIZE.to_string());
        let image = open(&[(&top, Format::Qcow2), (&base, *format)]);
        let mut expected = disk();
        write(&*image, 1_499_648, &[9; 1024]).expect("writes");
        expected[1_499_648..][..1024].fill(9);
        assert_same(&read(&*image, 0, SIZE).expect("reads"), &expected, name);
        drop(image);
        assert_same(&support::qemu_contents(&top, &[]), &expected, "qemu-img");
    }
}

fn what_needs_another_file_is_refused() {
    let scratch = Scratch::new();
    let flat = convert(&scratch, "vmdk", "subformat=monolithicFlat");
    refused(
        &[(&flat, Format::Vmdk)],
        &read_only(),
        "descriptor",
        "named files",
    );
    let vmdk = convert(&scratch, "vmdk", "subformat=monolithicSparse");
    let raw = scratch.path("raw");
    let layers = [(vmdk.as_path(), Format::Vmdk), (raw.as_path(), Format::Raw)];
    for (text, other, field, reason) in [
        (
            &b"monolithicSparse"[..],
            &b"monolithicFlat  "[..],
            "createType",
            "all in one file",
        ),
        (b" SPARSE ", b" FLAT   ", "extents", "named files"),
        // A comment gives way to a second extent.
        (
            b"# The Disk Data",
            b"RW 1 SPARSE \"x\"",
            "extents",
            "there must be one",
        ),
    ] {
        let at = find(&vmdk, text);
        patch(&vmdk, at, other);
        refused(&layers[..1], &read_only(), field, reason);
        patch(&vmdk, at, text);
    }
    refused(&layers, &read_only(), "backing file", "a vmdk image has none");
    let at = find(&vmdk, b"parentCID=ffffffff");
    patch(&vmdk, at + 10, b"12345678");
    refused(&[(&vmdk, Format::Vmdk)], &read_only(), "parentCID", "parent");
    let vdi = convert(&scratch, "vdi", "static=off");
    patch(&vdi, 0x4c, &[4]);
    refused(&[(&vdi, Format::Vdi)], &read_only(), "image type", "differencing");
    let vhdx = convert(&scratch, "vhdx", "subformat=dynamic");
    let at = find(&vhdx, &(8_u32 << 20).to_le_bytes());
    patch(&vhdx, at + 4, &[2]);
    refused(
        &[(&vhdx, Format::Vhdx)],
        &read_only(),
        "file parameters",
        "differencing",
    );
    let vhd = convert(&scratch, "vpc", "subformat=dynamic");
    for at in [0, std::fs::metadata(&vhd).expect("exists").len() - 512] {
        // Type and checksum together, so that the checksum is right.
        let checksum = &contents(&vhd)[at as usize + 64..][..4];
        let checksum = u32::from_be_bytes(checksum.try_into().expect("four bytes"));
        patch(&vhd, at + 63, &[4]);
        patch(&vhd, at + 64, &checksum.wrapping_sub(1).to_be_bytes());
    }
    refused(&[(&vhd, Format::Vhd)], &read_only(), "disk type", "differencing");
}

/// Who wrote a vhd image says whether its field or its geometry is the disk's size.
fn the_creator_of_a_vhd_says_where_its_size_is() {
    let scratch = Scratch::new();
    let path = convert(&scratch, "vpc", "subformat=fixed");
    let footer = std::fs::metadata(&path).expect("exists").len() - 512;
    patch(&path, footer + 48, &(footer - 4096).to_be_bytes());
    let mut sizes = Vec::new();
    for creator in [
        b"win ",
        b"qem2",
        b"d2v ",
        b"tap\0",
        b"CTXS",
        b"wa\0\0",
        b"wa  ",
        b"vpc ",
        b"qemu",
        b"vs  ",
        b"vbox",
        b"pgp\0",
        b"\0\0\0\0",
    ] {
        patch(&path, footer + 28, creator);
        patch(&path, footer + 64, &[0; 4]);
        let bytes = contents(&path)[footer as usize..].to_vec();
        let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
        patch(&path, footer + 64, &(!sum).to_be_bytes());
        let image = open_with(&[(&path, Format::Vhd)], &read_only()).expect("opens");
        let info = qemu_img(&["info", "-f", "vpc", "--output=json", text(&path)]);
        let expected = format!("\"virtual-size\": {},", image.capacity());
        assert!(info.contains(&expected), "{creator:?}: {expected} not in {info}");
        sizes.push(image.capacity());
    }
    sizes.sort_unstable();
    sizes.dedup();
    assert_eq!(sizes.len(), 2, "geometry and field differ: {sizes:?}");
}

fn find(path: &Path, what: &[u8]) -> u64 {
    let bytes = contents(path);
    let at = bytes.windows(what.len()).position(|part| part == what);
    at.expect("is there") as u64
}

fn no_format_is_taken_for_another() {
    let scratch = Scratch::new();
    let path = scratch.path("noise");
    let mut random = Random::new(11);
    let noise: Vec<u8> = (0..1 << 20).map(|_| random.next() as u8).collect();
    std::fs::write(&path, noise).expect("writes");
    for (format, field, reason) in [
        (Format::Vmdk, "magic", "no vmdk image"),
        (Format::Vdi, "signature", "no vdi image"),
        (Format::Vhdx, "signature", "no vhdx image"),
        (Format::Vhd, "footer", "no vhd image"),
    ] {
        refused(&[(&path, format)], &read_only(), field, reason);
    }
}

fn damage_never_panics() {
    for (format, name, options) in SHAPES {
        let scratch = Scratch::new();
        let path = convert(&scratch, name, options);
        let sound = contents(&path);
        let metadata = sound.len().min(4 << 20) as u64;
        let mut random = Random::new(17);
        for _ in 0..20 {
            std::fs::write(&path, &sound).expect("writes");
            for _ in 0..random.below(4) + 1 {
                let place = if random.below(2) == 0 {
                    random.below(1024)
                } else {
                    random.below(metadata)
                };
                patch(&path, place, &random.next().to_le_bytes());
            }
            if random.below(4) == 0 {
                let file = std::fs::OpenOptions::new()
                    .write(true)
                    .open(&path)
                    .expect("opens");
                file.set_len(random.below(sound.len() as u64)).expect("cuts");
            }
            let Ok(image) = open_with(&[(&path, *format)], &read_only()) else {
                continue;
            };
            for _ in 0..8 {
                let (offset, len) = random.range(image.capacity(), 100 << 10);
                // Data or an error, as it comes; a panic fails the test.
                let _ = read(&*image, offset, len as usize);
            }
        }
    }
}

/// What each state of a block means is what QEMU takes it for, or an error on both sides.
fn states_of_vhdx_blocks_read_as_for_qemu() {
    const BLOCK: usize = 1 << 20;
    let scratch = Scratch::new();
    let path = convert(&scratch, "vhdx", "subformat=dynamic,block_size=1M");
    let raw = scratch.path("plain");
    let region = find(
        &path,
        b"\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08",
    ) + 16;
    let table = contents(&path)[region as usize..][..8]
        .try_into()
        .map(u64::from_le_bytes);
    let table = table.expect("eight bytes");
    let first = contents(&path)[table as usize];
    assert_eq!(first & 7, 6, "the first block is there");
    let mut readable = Vec::new();
    for state in 0..8 {
        patch(&path, table, &[first & !7 | state]);
        let image = open_with(&[(&path, Format::Vhdx)], &read_only()).expect("opens");
        let ours = read(&*image, 0, BLOCK);
        let qemus = qemu_img_output(&["convert", "-f", "vhdx", "-O", "raw", text(&path), text(&raw)]);
        assert_eq!(ours.is_ok(), qemus.status.success(), "state {state}: {ours:?}");
        if let Ok(ours) = ours {
            assert_same(&ours, &contents(&raw)[..BLOCK], &format!("state {state}"));
            readable.push(state);
        }
    }
    assert_eq!(readable, [0, 1, 2, 3, 5, 6]);
}

crate::suite! {
    with_qemu_img: [
        what_qemu_img_wrote_is_read,
        they_lie_below_overlays,
        what_needs_another_file_is_refused,
        damage_never_panics,
        the_creator_of_a_vhd_says_where_its_size_is,
        states_of_vhdx_blocks_read_as_for_qemu,
    ],
    alone: [no_format_is_taken_for_another],
}
