//! Encrypted images (crypt_method 2): made by qemu-img, read and written by both sides, and refused
//! where the header asks for what is not offered.

use crate::support;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use crate::support::recorder::Recorder;
use crate::support::victim::refused;
use crate::support::{
    Random, Scratch, assert_same, contents, create, fd, open_with, patch, qemu_img, qemu_img_output, read,
    text, write,
};
use vhost_blk::image::{BlockFile, Format, ImageError, OpenOptions, Passphrase, open_layers};

const SIZE: usize = 3 << 20;
const SECRET: &str = "correct horse";

fn key(secret: &str) -> OpenOptions {
    let passphrase = Passphrase::read(secret.as_bytes()).expect("is a passphrase");
    OpenOptions {
        passphrase: Some(Arc::new(passphrase)),
        ..OpenOptions::default()
    }
}

/// Makes an encrypted image; false where this qemu-img lacks the cipher or hash. qemu-img spends two seconds
/// on measuring the hash: what was made once is copied.
fn create_encrypted(path: &Path, luks: &str, options: &str) -> bool {
    static MADE: Mutex<BTreeMap<String, Option<Vec<u8>>>> = Mutex::new(BTreeMap::new());
    let options = format!("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1{luks}{options}");
    let mut made = MADE.lock().expect("no test died in here");
    let image = made.entry(options).or_insert_with_key(|options| {
        let secret = format!("secret,id=s,data={SECRET}");
        let args = ["create", "-q", "-f", "qcow2", "--object", &secret, "-o", options];
        let size = SIZE.to_string();
        let output = qemu_img_output(&[&args[..], &[text(path), &size]].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        if error.contains("ash algorithm ripemd160") {
            return None;
        }
        assert!(output.status.success(), "{error}");
        Some(contents(path))
    });
    if let Some(image) = image {
        std::fs::write(path, image).expect("writes");
    }
    image.is_some()
}

fn image_options(path: &Path) -> String {
    format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", text(path))
}

/// What qemu-img reads from an encrypted image.
fn qemu_reads(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("plain");
    let secret = format!("secret,id=s,data={SECRET}");
    let source = image_options(path);
    qemu_img(&[
        "convert",
        "-U",
        "--object",
        &secret,
        "--image-opts",
        &source,
        "-O",
        "raw",
        text(&raw),
    ]);
    contents(&raw)
}

/// Runs qemu-img on the image, with its key; the exit code.
fn qemu_img_on(path: &Path, args: &[&str]) -> Option<i32> {
    let secret = format!("secret,id=s,data={SECRET}");
    let image = image_options(path);
    let all = [
        &args[..1],
        &["--object", &secret, "--image-opts"],
        &args[1..],
        &[&image],
    ]
    .concat();
    let output = qemu_img_output(&all);
    if output.status.code() == Some(1) || output.status.code() == Some(2) {
        panic!("qemu-img {all:?}: {output:?}");
    }
    output.status.code()
}

fn qemu_io(path: &Path, commands: &[&str]) -> Output {
    let mut io = Command::new("qemu-io");
    io.args(["--object", &format!("secret,id=s,data={SECRET}"), "--image-opts"]);
    for command in commands {
        io.args(["-c", command]);
    }
    io.arg(image_options(path)).output().expect("qemu-io runs")
}

#[track_caller]
fn qemu_io_agrees(path: &Path, commands: &[&str]) {
    let output = qemu_io(path, commands);
    let all = [output.stdout, output.stderr].concat();
    let all = String::from_utf8_lossy(&all);
    assert!(
        output.status.success() && !all.contains("fail"),
        "{commands:?}: {all}"
    );
}

fn both_sides_read_what_either_wrote() {
    // Few: see `create_encrypted`.
    let variants = [
        ("", ""),
        (
            ",encrypt.cipher-alg=aes-128,encrypt.hash-alg=sha1",
            ",extended_l2=on",
        ),
        (",encrypt.hash-alg=sha224", ",cluster_size=512"),
        (",encrypt.hash-alg=sha384", ",cluster_size=2M,lazy_refcounts=on"),
        (",encrypt.hash-alg=sha512", ",cluster_size=4k"),
        (",encrypt.hash-alg=ripemd160", ",compat=0.10"),
    ];
    let mut opened = 0;
    for (luks, options) in variants {
        let scratch = Scratch::new();
        let path = scratch.path("top");
        if !create_encrypted(&path, luks, options) {
            continue;
        }
        opened += 1;
        qemu_io_agrees(&path, &["write -P 7 4k 96k", "write -P 8 1M 512"]);
        let mut model = vec![0; SIZE];
        model[4 << 10..100 << 10].fill(7);
        model[1 << 20..(1 << 20) + 512].fill(8);
        let image = open_with(&[(&path, Format::Qcow2)], &key(SECRET)).expect("opens");
        assert_same(&read(&*image, 0, SIZE).expect("reads"), &model, options);
        let mut random = Random::new(3);
        for step in 0..40_u8 {
            support::random_request(&mut random, SIZE as u64, 200 << 10, step | 1).run(&*image, &mut model);
        }
        assert_same(&read(&*image, 0, SIZE).expect("reads"), &model, options);
        // A write of one sector inside a new cluster: what lies around it reads as zeros.
        image.write_zeroes(0, SIZE as u64, true).expect("zeroes");
        model.fill(0);
        write(&*image, 512 * 1023, &[5; 512]).expect("writes");
        model[512 * 1023..512 * 1024].fill(5);
        drop(image);
        assert_eq!(qemu_img_on(&path, &["check", "-U"]), Some(0));
        assert_same(&qemu_reads(&path), &model, options);
        qemu_io_agrees(
            &path,
            &[
                "read -P 5 523776 512",
                "read -P 0 524288 1M",
                "write -P 9 523776 1k",
            ],
        );
        let image = open_with(&[(&path, Format::Qcow2)], &key(SECRET)).expect("opens again");
        assert_eq!(read(&*image, 523_776, 1024).expect("reads"), [9; 1024]);
    }
    assert!(opened >= variants.len() - 1, "qemu-img lacks more than ripemd160");
}

fn every_key_slot_opens_the_image() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create_encrypted(&path, "", "");
    let first = format!("secret,id=s,data={SECRET}");
    let source = image_options(&path);
    for slot in [1, 7] {
        let added = format!("secret,id=new,data=other {slot}");
        let amend =
            format!("encrypt.state=active,encrypt.new-secret=new,encrypt.keyslot={slot},encrypt.iter-time=1");
        qemu_img(&[
            "amend",
            "--object",
            &first,
            "--object",
            &added,
            "--image-opts",
            "-o",
            &amend,
            &source,
        ]);
    }
    for secret in ["other 1", "other 7", SECRET] {
        let image = open_with(&[(&path, Format::Qcow2)], &key(secret)).expect("opens");
        write(&*image, 0, secret.as_bytes().repeat(512).as_slice()).expect("writes");
    }
}

fn snapshots_and_overlays_keep_what_they_showed() {
    let scratch = Scratch::new();
    let (base, path) = (scratch.path("base"), scratch.path("top"));
    create(&base, "cluster_size=64k", &SIZE.to_string());
    let image = support::open(&[(&base, Format::Qcow2)]);
    write(&*image, 0, &[1; 300 << 10]).expect("writes");
    drop(image);
    let backing = format!(",backing_file={},backing_fmt=qcow2", text(&base));
    create_encrypted(&path, "", &backing);
    let layers = [(path.as_path(), Format::Qcow2), (base.as_path(), Format::Qcow2)];
    let image = open_with(&layers, &key(SECRET)).expect("opens");
    write(&*image, 64 << 10, &[2; 512]).expect("writes");
    drop(image);
    qemu_img_on(&path, &["snapshot", "-c", "one"]);
    let image = open_with(&layers, &key(SECRET)).expect("opens");
    write(&*image, (64 << 10) + 512, &[3; 1024]).expect("writes");
    drop(image);
    assert_eq!(qemu_img_on(&path, &["check", "-U"]), Some(0));
    let mut expected = vec![0; SIZE];
    expected[..300 << 10].fill(1);
    expected[64 << 10..][..512].fill(2);
    expected[(64 << 10) + 512..][..1024].fill(3);
    assert_same(&qemu_reads(&path), &expected, "after the snapshot");
    qemu_img_on(&path, &["snapshot", "-a", "one"]);
    expected[(64 << 10) + 512..][..1024].fill(1);
    let image = open_with(&layers, &key(SECRET)).expect("opens");
    assert_same(&read(&*image, 0, SIZE).expect("reads"), &expected, "the snapshot");
}

/// A tell-tale that random ciphertext does not contain.
const MARK: &[u8; 16] = b"PLAINTEXT-MARKER";

fn no_plaintext_reaches_the_file_at_any_time() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create_encrypted(&path, "", ",cluster_size=4k");
    let recorder = Arc::new(Recorder::new(contents(&path)));
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, recorder.clone())];
    let image = open_layers(layers, None, &key(SECRET)).expect("opens");
    let marked = MARK.repeat(32 * 40);
    for offset in [0, 512, 100 << 10, 200 << 10] {
        write(&*image, offset, &marked).expect("writes");
        write(&*image, offset + 1024, &marked[..512]).expect("writes in place");
    }
    image.discard(0, 8 << 10).expect("discards");
    image.write_zeroes(110 << 10, 3 << 10, false).expect("zeroes");
    drop(image);
    let mut random = Random::new(1);
    for count in 0..=recorder.position() {
        let file = recorder.after_host_crash(count, &mut random);
        // The mark's length divides a sector's: it can only lie at multiples of its own.
        assert!(
            !file.chunks_exact(MARK.len()).any(|part| part == MARK),
            "after {count} steps the file holds what the guest wrote"
        );
    }
}

fn a_crash_shows_zeros_or_new_data_never_noise() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create_encrypted(&path, "", ",cluster_size=4k");
    let recorder = Arc::new(Recorder::new(contents(&path)));
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, recorder.clone())];
    let image = open_layers(layers, None, &key(SECRET)).expect("opens");
    for at in 0..12_u64 {
        write(&*image, at * 6144, &[0x5a; 1536]).expect("writes");
    }
    drop(image);
    for count in 0..=recorder.position() {
        let mut random = Random::new(count as u64);
        std::fs::write(&path, recorder.after_host_crash(count, &mut random)).expect("writes");
        let found = qemu_img_on(&path, &["check", "-U"]);
        assert!(matches!(found, Some(0 | 3)), "more than leaks");
        let read_only = OpenOptions {
            read_only: true,
            ..key(SECRET)
        };
        let image = open_with(&[(&path, Format::Qcow2)], &read_only).expect("opens");
        let found = read(&*image, 0, 80 << 10).expect("reads");
        let noise = found.iter().position(|byte| !matches!(byte, 0 | 0x5a));
        assert_eq!(noise, None, "after {count} steps");
    }
}

/// Neither what was behind the end nor noise: of what is new, nobody has encrypted anything.
fn an_encrypted_disk_grows_by_zeros() {
    const OLD: usize = (200 << 10) + 1536;
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create_encrypted(&path, "", ",cluster_size=4k");
    let open = || open_with(&[(&path, Format::Qcow2)], &key(SECRET)).expect("opens");
    write(&*open(), 0, &[0x5a; OLD + 8192]).expect("writes");
    patch(&path, 24, &(OLD as u64).to_be_bytes());
    let image = open();
    write(&*image, OLD as u64 - 512, &[0x5b; 512]).expect("writes");
    let mut expected = vec![0x5a; OLD];
    expected[OLD - 512..].fill(0x5b);
    for size in [OLD + 512, OLD + 4096, 5 << 20] {
        image.grow(size as u64, None).expect("grows");
        expected.resize(size, 0);
        assert_same(&read(&*image, 0, size).expect("reads"), &expected, "ours");
    }
    write(&*image, (5 << 20) - 4608, &[0x5c; 512]).expect("writes");
    expected[(5 << 20) - 4608..][..512].fill(0x5c);
    drop(image);
    assert_eq!(qemu_img_on(&path, &["check", "-U"]), Some(0));
    assert_same(&qemu_reads(&path), &expected, "QEMU's");
}

/// The last cluster is mapped to its end, and whoever makes the disk longer shows what lies there.
fn behind_the_end_of_a_disk_there_are_zeros() {
    const END: usize = (1 << 20) + 32768 + 512;
    const LONGER: usize = 2 << 20;
    for options in ["", ",extended_l2=on", ",cluster_size=2M"] {
        let scratch = Scratch::new();
        let path = scratch.path("top");
        create_encrypted(&path, "", options);
        patch(&path, 24, &(END as u64).to_be_bytes());
        let image = open_with(&[(&path, Format::Qcow2)], &key(SECRET)).expect("opens");
        let mut expected = vec![0; END];
        // At the start of the last cluster, and at its end; in an old cluster, and in place.
        for (at, value) in [(1 << 20, 1), (END - 512, 2), (END - 1024, 3), (END - 512, 4)] {
            write(&*image, at as u64, &[value; 512]).expect("writes");
            expected[at..at + 512].fill(value);
        }
        drop(image);
        assert_same(&qemu_reads(&path), &expected, options);
        let key = format!("secret,id=s,data={SECRET}");
        let source = image_options(&path);
        qemu_img(&["resize", "-q", "--object", &key, "--image-opts", &source, "2M"]);
        expected.resize(LONGER, 0);
        assert_same(&qemu_reads(&path), &expected, options);
        assert_eq!(qemu_img_on(&path, &["check", "-U"]), Some(0));
    }
}

fn the_passphrase_must_fit() {
    let scratch = Scratch::new();
    let (path, plain) = (scratch.path("top"), scratch.path("plain"));
    create_encrypted(&path, "", "");
    create(&plain, "", "1M");
    let top = [(path.as_path(), Format::Qcow2)];
    refused(
        &top,
        &OpenOptions::default(),
        "crypt_method",
        "no passphrase was passed",
    );
    refused(
        &top,
        &key("wrong"),
        "passphrase",
        "opens none of the image's 1 key slots",
    );
    refused(&top, &key("correct horse\n"), "passphrase", "a newline");
    let (plain, raw) = (
        [(plain.as_path(), Format::Qcow2)],
        [(path.as_path(), Format::Raw)],
    );
    for layers in [plain, raw] {
        refused(&layers, &key(SECRET), "passphrase", "is not encrypted");
    }
    for bad in [&b""[..], &[b'x'; 513]] {
        assert!(Passphrase::read(bad).is_err());
    }
    assert_eq!(format!("{:?}", key(SECRET).passphrase), "Some(Passphrase)");
}

/// Where the extension lies that points to the LUKS header, and that.
fn luks_header(image: &[u8]) -> (usize, u64) {
    let start = [0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16];
    let pointer = image.windows(8).position(|bytes| bytes == start);
    let pointer = pointer.expect("has the extension");
    let place = image[pointer + 8..pointer + 16].try_into();
    (pointer, u64::from_be_bytes(place.expect("eight bytes")))
}

/// More rounds than this host can do in the time that a disk may take: said before they are done.
fn what_takes_too_long_is_refused_at_once() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create_encrypted(&path, "", "");
    // Of the digest and of the first slot.
    let (_, luks) = luks_header(&contents(&path));
    for at in [164, 212] {
        patch(&path, luks + at, &(1_u32 << 26).to_be_bytes());
    }
    let begun = std::time::Instant::now();
    refused(
        &[(&path, Format::Qcow2)],
        &key(SECRET),
        "LUKS key slot iterations",
        "and a disk may take 25 s to open",
    );
    assert!(begun.elapsed() < std::time::Duration::from_secs(20));
}

/// Field, offset in the LUKS header, value, field that is named, reason.
const HOSTILE: &[(u64, &[u8], &str, &str)] = &[
    (0, b"LUNS", "LUKS magic", "no LUKS header"),
    (6, &[0, 2], "LUKS version", "2 is not supported"),
    (8, b"serpent\0", "LUKS cipher-name", "serpent"),
    (40, b"cbc-essiv:sha256\0", "LUKS cipher-mode", "cbc-essiv"),
    (72, b"md5\0", "LUKS hash-spec", "md5"),
    (108, &[0, 0, 0, 16], "LUKS key-bytes", "16 is neither"),
    (108, &[0xff; 4], "LUKS key-bytes", "neither 32 nor 64"),
    (164, &[0; 4], "LUKS mk-digest-iter", "outside 1 to"),
    (164, &[0xff; 4], "LUKS mk-digest-iter", "outside 1 to"),
    (208, &[0; 4], "LUKS key slot active", "0x0"),
    (212, &[0; 4], "LUKS key slot iterations", "outside 1 to"),
    (212, &[8, 0, 0, 0], "LUKS key slot iterations", "outside 1 to"),
    (
        248,
        &[0; 4],
        "LUKS key-material-offset",
        "outside the encryption header",
    ),
    (
        248,
        &[0xff; 4],
        "LUKS key-material-offset",
        "outside the encryption header",
    ),
    (252, &[0xff; 4], "LUKS key slot stripes", "is not 4000"),
];

fn hostile_headers_are_refused() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create_encrypted(&path, "", "");
    let top = [(path.as_path(), Format::Qcow2)];
    let before = contents(&path);
    let (pointer, luks) = luks_header(&before);
    for (at, bytes, field, reason) in HOSTILE {
        patch(&path, luks + at, bytes);
        refused(&top, &key(SECRET), field, reason);
        refused(&top, &OpenOptions::default(), field, reason);
        patch(&path, luks, &before[luks as usize..][..592]);
    }
    for (at, value, field, reason) in [
        (8, 1 << 40, "encryption header", "past the end"),
        (8, luks + 512, "encryption header", "not aligned"),
        (8, !0xffff, "encryption header", "past 2^56"),
        (8, 0, "encryption header", "in the header"),
        (16, u64::MAX, "encryption header", "past the end"),
        (16, 591, "encryption header length", "outside 592"),
    ] {
        patch(&path, pointer as u64 + at, &u64::to_be_bytes(value));
        refused(&top, &key(SECRET), field, reason);
        patch(&path, pointer as u64, &before[pointer..][..24]);
    }
    patch(&path, pointer as u64, &0x1234_u32.to_be_bytes());
    refused(
        &top,
        &key(SECRET),
        "header extension",
        "without an encryption header",
    );
    assert!(open_with(&top, &key(SECRET)).is_err());
    patch(&path, pointer as u64, &before[pointer..][..24]);
    open_with(&top, &key(SECRET)).expect("is as it was");
}

fn compressed_clusters_are_no_way_around_the_cipher() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create_encrypted(&path, "", "");
    let image = open_with(&[(&path, Format::Qcow2)], &key(SECRET)).expect("opens");
    write(&*image, 0, &[1; 512]).expect("writes");
    drop(image);
    let all = contents(&path);
    let word = |at: usize| u64::from_be_bytes(all[at..at + 8].try_into().expect("eight bytes"));
    let l2 = word(word(40) as usize) & !(1 << 63);
    patch(
        &path,
        l2,
        &((1_u64 << 62) | (word(l2 as usize) & !(1 << 63))).to_be_bytes(),
    );
    let image = open_with(&[(&path, Format::Qcow2)], &key(SECRET)).expect("opens");
    let error = read(&*image, 0, 512).expect_err("is refused");
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<ImageError>());
    assert!(
        matches!(
            inner,
            Some(ImageError::Corrupt {
                field: "L2 entry",
                ..
            })
        ),
        "{error:?}"
    );
    assert!(read(&*image, 1 << 20, 512).is_ok(), "it lives");
    drop(fd(&path, false));
}

crate::suite! {
    with_qemu_img: [
        both_sides_read_what_either_wrote,
        every_key_slot_opens_the_image,
        what_takes_too_long_is_refused_at_once,
        snapshots_and_overlays_keep_what_they_showed,
        no_plaintext_reaches_the_file_at_any_time,
        a_crash_shows_zeros_or_new_data_never_noise,
        an_encrypted_disk_grows_by_zeros,
        behind_the_end_of_a_disk_there_are_zeros,
        the_passphrase_must_fit,
        hostile_headers_are_refused,
        compressed_clusters_are_no_way_around_the_cipher,
    ],
    alone: [],
}
