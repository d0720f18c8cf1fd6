//! What is refused when an image is opened: each with the field it names, and the file unchanged.
//! Here: formats, layers, encryption, chains, files.

use crate::support;
use std::path::Path;

use crate::support::victim::{Victim, refused};
use crate::support::{Scratch, contents, create, fd, open_with, patch, read_only, text};
use vhost_blk::image::{self, Format, ImageError, OpenOptions};

fn the_format_is_never_probed() {
    let victim = Victim::new("");
    let options = read_only();
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
    for name in ["dmg", "parallels", "cloop", "auto", ""] {
        let error = name.parse::<Format>().expect_err("is refused").to_string();
        let expected = format!("format: unknown format {name:?}; expected raw");
        assert!(error.starts_with(&expected), "{error}");
    }
    // What a raw layer holds is data, also where it looks like an image.
    let top = victim.scratch.path("overlay");
    let backing = format!("backing_file={},backing_fmt=raw", text(&victim.path));
    create(&top, &backing, "64k");
    let image = support::open(&[(&top, Format::Qcow2), (&victim.path, Format::Raw)]);
    assert_eq!(&support::read(&*image, 0, 512).expect("reads")[..4], b"QFI\xfb");
}

fn backing_files_must_be_passed_and_named() {
    for version in ["compat=0.10", "compat=1.1"] {
        let victim = Victim::new(version);
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

fn an_external_data_file_must_be_passed() {
    let victim = Victim::new("");
    let (top, data) = (victim.scratch.path("other"), victim.scratch.path("data"));
    create(&top, &format!("data_file={}", text(&data)), "1M");
    refused(
        &[(&top, Format::Qcow2)],
        &OpenOptions::default(),
        "external data file",
        "none was passed",
    );
    let data_of = |path: &Path| OpenOptions {
        data_file: Some(fd(path, true).into()),
        ..OpenOptions::default()
    };
    for (path, format, reason) in [
        (&victim.path, Format::Qcow2, "the image has none"),
        (&data, Format::Raw, "a raw image has none"),
    ] {
        let other = victim.scratch.path("other-data");
        std::fs::write(&other, vec![0; 1 << 20]).expect("writes");
        refused(&[(path, format)], &data_of(&other), "external data file", reason);
    }
    // The data file of a layer below is none of the top's.
    let overlay = victim.scratch.path("overlay");
    let backing = format!("backing_file={},backing_fmt=qcow2", text(&top));
    create(&overlay, &backing, "1M");
    let layers = [(overlay.as_path(), Format::Qcow2), (top.as_path(), Format::Qcow2)];
    for options in [OpenOptions::default(), data_of(&data)] {
        refused(&layers, &options, "external data file", "none was passed");
    }
    // A name is never looked at, whatever it says.
    let known = contents(&top)
        .windows(text(&data).len())
        .position(|part| part == text(&data).as_bytes());
    let known = known.expect("is named") as u64;
    for name in ["json:{\"filename\":\"x\"}", "nbd:unix:/x", "file:/etc/passwd"] {
        patch(&top, known, name.as_bytes());
        refused(
            &layers[1..],
            &OpenOptions::default(),
            "external data file",
            "none was passed",
        );
        let image = open_with(&layers[1..], &data_of(&data)).expect("opens");
        support::write(&*image, 0, &[6; 512]).expect("writes");
    }
    assert_eq!(&contents(&data)[..512], &[6; 512]);
}

fn encryption() {
    let victim = Victim::new("");
    victim.u32(32, 1).never("crypt_method", "AES");
    victim
        .u32(32, 2)
        .never("header extension", "without an encryption header");
    for other in [3, 77, u32::MAX] {
        let reason = format!("encryption (method {other}) is not supported");
        victim.u32(32, other).never("crypt_method", &reason);
    }
    let victim = Victim::new("");
    victim
        .extension(0x0537_be77, &[0; 16])
        .never("header extension", "without encryption");
}

fn corrupt_images_are_read_only() {
    let victim = Victim::new("");
    victim.u64(72, 2).refused("incompatible_features", "corrupt bit");
    let options = read_only();
    let image = open_with(&[(&victim.path, Format::Qcow2)], &options).expect("opens for reading");
    assert_eq!(support::read(&*image, 0, 512).expect("reads"), vec![0; 512]);
}

fn chains() {
    let victim = Victim::new("");
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
    for options in [
        read_only(),
        OpenOptions {
            data_file: Some(fd(all[15].0, false).into()),
            ..read_only()
        },
    ] {
        refused(&[all[15], all[16], all[15]], &options, "chain", "appears twice");
    }
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

fn direct_io() {
    use std::os::unix::fs::OpenOptionsExt;
    let victim = Victim::new("");
    let direct = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&victim.path);
    // Not every file system has it.
    let Ok(file) = direct else { return };
    let options = read_only();
    let error = image::open(file.into(), Format::Qcow2, Vec::new(), &options)
        .err()
        .expect("is refused");
    assert!(error.to_string().contains("O_DIRECT"), "{error}");
}

crate::suite! {
    with_qemu_img: [
        the_format_is_never_probed,
        backing_files_must_be_passed_and_named,
        an_external_data_file_must_be_passed,
        encryption,
        corrupt_images_are_read_only,
        chains,
        direct_io,
    ],
    alone: [files_that_hold_no_image],
}
