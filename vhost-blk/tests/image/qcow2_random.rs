//! Random requests against a model of the disk, on images of every shape; then qemu-img agrees with the
//! model and finds neither an error nor a leak.

use crate::support;
use std::fs;
use std::path::PathBuf;

use crate::support::{
    Random, Request, Scratch, assert_same, check_clean, create, imago_contents, open, qemu_contents,
    qemu_img, text,
};
use vhost_blk::image::{Format, OpenOptions};

/// Options of `qemu-img create`, and the size of the disk in bytes.
const SHAPES: &[(&str, u64)] = &[
    ("compat=1.1", 6 << 20),
    ("compat=0.10", 6 << 20),
    ("compat=1.1,cluster_size=512", 3 << 20),
    ("compat=0.10,cluster_size=512", 3 << 20),
    ("compat=1.1,cluster_size=512,refcount_bits=64", 3 << 20),
    ("compat=1.1,cluster_size=1k,refcount_bits=1", 3 << 20),
    ("compat=1.1,cluster_size=4k,refcount_bits=2", 4 << 20),
    ("compat=1.1,cluster_size=4k,refcount_bits=4", 4 << 20),
    ("compat=1.1,cluster_size=8k,refcount_bits=8", (4 << 20) + 512),
    ("compat=1.1,cluster_size=32k,refcount_bits=32", 6 << 20),
    ("compat=1.1,cluster_size=2M", 16 << 20),
    ("compat=1.1,lazy_refcounts=on", 6 << 20),
    ("compat=1.1,extended_l2=on", (6 << 20) + 1024),
    ("compat=1.1,extended_l2=on,cluster_size=16k", 6 << 20),
    ("compat=1.1,extended_l2=on,cluster_size=2M", 16 << 20),
];

fn run(layers: &[(&std::path::Path, Format)], model: &mut [u8], seed: u64, steps: u64) {
    let mut random = Random::new(seed);
    let image = open(layers);
    assert_eq!(image.capacity(), model.len() as u64);
    for step in 0..steps {
        let request = support::random_request(&mut random, model.len() as u64, 300 << 10, step as u8 | 1);
        request.run(&*image, model);
    }
    Request::Read {
        offset: 0,
        len: model.len() as u64,
    }
    .run(&*image, model);
    image.close().expect("closes");
    assert_same(
        &qemu_contents(layers[0].0, &[]),
        model,
        "qemu-img before the image is dropped",
    );
}

fn scenario(options: &str, size: u64, seed: u64) {
    eprintln!("{options}");
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, options, &size.to_string());
    let mut model = vec![0; size as usize];
    for round in 0..3 {
        run(&[(&path, Format::Qcow2)], &mut model, seed + round, 80);
        check_clean(&path);
        // imago has no extended L2 entries.
        if !options.contains("extended_l2") {
            let found = imago_contents(&path).unwrap_or_else(|error| panic!("imago: {error}"));
            assert_same(&found, &model, "imago");
        }
    }
}

fn plain_images_of_every_shape() {
    for (seed, (options, size)) in SHAPES.iter().enumerate() {
        scenario(options, *size, seed as u64 * 100);
    }
}

/// A backing file of random content in `format`, shorter or longer than the disk above it.
fn base(scratch: &Scratch, format: &str, size: u64) -> (PathBuf, Vec<u8>) {
    let raw = scratch.path("base.raw");
    let mut bytes: Vec<u8> = (0..size).map(|at| (at / 512 * 7 + 13) as u8).collect();
    bytes[100 << 10..500 << 10].fill(0);
    fs::write(&raw, &bytes).expect("writes");
    if format == "raw" {
        return (raw, bytes);
    }
    let path = scratch.path("base");
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
    args.extend(match format {
        "qcow2" => vec![],
        "zlib" => vec!["-c"],
        "zstd" => vec!["-c", "-o", "compression_type=zstd"],
        other => panic!("{other}"),
    });
    args.extend([text(&raw), text(&path)]);
    qemu_img(&args);
    (path, bytes)
}

fn overlays_over_every_base() {
    let mut seed = 7000;
    for base_format in ["raw", "qcow2", "zlib", "zstd"] {
        for options in [
            "compat=1.1",
            "compat=0.10",
            "cluster_size=4k",
            "extended_l2=on",
            "cluster_size=512",
            "cluster_size=2M",
        ] {
            for base_size in [3_u64 << 20, 7 << 20] {
                eprintln!("{options} over {base_format} of {base_size}");
                let scratch = Scratch::new();
                let (below, bytes) = base(&scratch, base_format, base_size);
                let format = if base_format == "raw" {
                    Format::Raw
                } else {
                    Format::Qcow2
                };
                let top = scratch.path("top");
                let size = 5 << 20;
                create(
                    &top,
                    &format!("{options},backing_file={},backing_fmt={format}", text(&below)),
                    &size.to_string(),
                );
                let mut model = bytes;
                model.resize(size, 0);
                seed += 10;
                run(&[(&top, Format::Qcow2), (&below, format)], &mut model, seed, 60);
                check_clean(&top);
            }
        }
    }
}

fn compressed_images_are_rewritten_in_place() {
    for (seed, kind) in [
        "compression_type=zlib",
        "compression_type=zstd",
        "cluster_size=4k",
        "cluster_size=512",
        "extended_l2=on,cluster_size=16k",
    ]
    .iter()
    .enumerate()
    {
        eprintln!("{kind}");
        let scratch = Scratch::new();
        let (raw, mut model) = base(&scratch, "raw", 5 << 20);
        let path = scratch.path("packed");
        qemu_img(&[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-c",
            "-o",
            kind,
            text(&raw),
            text(&path),
        ]);
        run(&[(&path, Format::Qcow2)], &mut model, 900 + seed as u64, 80);
        check_clean(&path);
    }
}

fn snapshots_read_the_same_after_our_writes() {
    for (seed, options) in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=2",
        "extended_l2=on",
    ]
    .iter()
    .enumerate()
    {
        eprintln!("{options}");
        let scratch = Scratch::new();
        let path = scratch.path("top");
        let size = 4 << 20;
        create(&path, options, &size.to_string());
        let mut model = vec![0; size];
        run(&[(&path, Format::Qcow2)], &mut model, 300 + seed as u64, 40);
        qemu_img(&["snapshot", "-c", "one", text(&path)]);
        let one = model.clone();
        run(&[(&path, Format::Qcow2)], &mut model, 400 + seed as u64, 40);
        qemu_img(&["snapshot", "-c", "two", text(&path)]);
        let two = model.clone();
        run(&[(&path, Format::Qcow2)], &mut model, 500 + seed as u64, 40);
        check_clean(&path);
        assert_same(
            &qemu_contents(&path, &["-l", "snapshot.name=one"]),
            &one,
            "snapshot one",
        );
        assert_same(
            &qemu_contents(&path, &["-l", "snapshot.name=two"]),
            &two,
            "snapshot two",
        );
        qemu_img(&["snapshot", "-d", "one", text(&path)]);
        run(&[(&path, Format::Qcow2)], &mut model, 600 + seed as u64, 40);
        check_clean(&path);
    }
}

fn external_data_files() {
    for (seed, raw) in ["off", "on"].iter().enumerate() {
        let scratch = Scratch::new();
        let (path, data) = (scratch.path("top"), scratch.path("data"));
        let size = 4_u64 << 20;
        create(
            &path,
            &format!("data_file={},data_file_raw={raw}", text(&data)),
            &size.to_string(),
        );
        let mut model = vec![0; size as usize];
        let mut random = Random::new(40 + seed as u64);
        let options = OpenOptions {
            data_file: Some(std::sync::Arc::new(support::fd(&data, true))),
            ..OpenOptions::default()
        };
        let image = support::open_with(&[(&path, Format::Qcow2)], &options).expect("opens");
        for step in 0..120_u64 {
            support::random_request(&mut random, size, 300 << 10, step as u8 | 1).run(&*image, &mut model);
        }
        drop(image);
        check_clean(&path);
        assert_same(&qemu_contents(&path, &[]), &model, "qemu-img");
        if *raw == "on" {
            let mut data = support::contents(&data);
            data.resize(size as usize, 0);
            assert_same(&data, &model, "the raw data file");
        }
    }
}

crate::suite! {
    with_qemu_img: [
        plain_images_of_every_shape,
        overlays_over_every_base,
        compressed_images_are_rewritten_in_place,
        snapshots_read_the_same_after_our_writes,
        external_data_files,
    ],
    alone: [],
}
