//! Images with random damage in their metadata: whatever happens is an error, never a panic or a hang, and
//! a damaged image never makes its neighbour in the chain or its header change.

use crate::support;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::recorder::Recorder;
use crate::support::{Random, Request, Scratch, contents, create, full, open, patch, qemu_img, text, write};
use vhost_blk::image::{BlockFile, Format, OpenOptions, open_layers};

const SIZE: u64 = 2 << 20;

/// Images of several shapes, as bytes.
fn victims(scratch: &Scratch) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let raw = scratch.path("raw");
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 700 * 11) as u8).collect();
    std::fs::write(&raw, bytes).expect("writes");
    for (index, options) in [
        "",
        "compat=0.10,cluster_size=4k",
        "cluster_size=512,refcount_bits=1",
        "extended_l2=on,cluster_size=16k",
        "cluster_size=4k,lazy_refcounts=on",
    ]
    .iter()
    .enumerate()
    {
        let path = scratch.path(&index.to_string());
        create(&path, options, &SIZE.to_string());
        let image = open(&[(&path, Format::Qcow2)]);
        write(&*image, 64 << 10, &vec![7; 300 << 10]).expect("writes");
        write(&*image, 1 << 20, &[8; 512]).expect("writes");
        drop(image);
        if !options.contains("bits=1") {
            qemu_img(&["snapshot", "-c", "one", text(&path)]);
            let image = open(&[(&path, Format::Qcow2)]);
            write(&*image, 100 << 10, &vec![9; 100 << 10]).expect("writes");
        }
        if options.contains("lazy") {
            patch(&path, 79, &[1]);
        }
        all.push(contents(&path));
    }
    for kind in ["compression_type=zlib", "compression_type=zstd,cluster_size=4k"] {
        let path = scratch.path("packed");
        qemu_img(&[
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            kind,
            text(&raw),
            text(&path),
        ]);
        all.push(contents(&path));
    }
    all
}

fn word(bytes: &[u8], at: usize) -> usize {
    bytes.get(at..at + 8).map_or(0, |word| {
        u64::from_be_bytes(word.try_into().expect("eight")) as usize
    })
}

/// Damages a few words, most of them where metadata is.
fn damage(bytes: &mut [u8], random: &mut Random) {
    let l1 = word(bytes, 40);
    let places = [
        0,
        l1,
        word(bytes, l1) & 0xff_ffff,
        word(bytes, 48),
        word(bytes, word(bytes, 48)),
        word(bytes, 64),
    ];
    for _ in 0..=random.below(4) {
        let base = places[random.below(places.len() as u64) as usize];
        let at = match random.below(8) {
            0 => random.below(bytes.len() as u64) as usize,
            _ => base + random.below(112) as usize,
        };
        let value = random.next();
        match random.below(4) {
            0 => bytes
                .iter_mut()
                .skip(at)
                .take(1)
                .for_each(|byte| *byte ^= 1 << (value & 7)),
            1 => bytes
                .iter_mut()
                .skip(at & !7)
                .take(8)
                .zip(value.to_be_bytes())
                .for_each(|(b, v)| *b = v),
            2 => bytes
                .iter_mut()
                .skip(at & !7)
                .take(8)
                .for_each(|byte| *byte = if value & 1 == 0 { 0 } else { 0xff }),
            _ => {
                // Some other entry: a plausible pointer to the wrong place.
                let from = places[(value % places.len() as u64) as usize] & !7;
                if from + 8 <= bytes.len() && (at & !7) + 8 <= bytes.len() {
                    bytes.copy_within(from..from + 8, at & !7);
                }
            }
        }
    }
}

fn damage_never_panics() {
    let rounds = if full() { 4000 } else { 600 };
    let scratch = Scratch::new();
    let victims = victims(&scratch);
    let (mut opened, mut failed) = (0, 0);
    for seed in 0..rounds {
        let mut random = Random::new(seed + 1);
        let mut bytes = victims[random.below(victims.len() as u64) as usize].clone();
        damage(&mut bytes, &mut random);
        let magic = bytes[..4].to_vec();
        let recorder = Arc::new(Recorder::new(bytes));
        let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, recorder.clone())];
        let options = OpenOptions {
            read_only: random.below(4) == 0,
            ..OpenOptions::default()
        };
        let begin = Instant::now();
        let Ok(image) = open_layers(layers, None, &options) else {
            continue;
        };
        opened += 1;
        let size = image.capacity().clamp(512, SIZE);
        for step in 0..30_u8 {
            let result = match support::random_request(&mut random, size, 100 << 10, step) {
                Request::Write { offset, bytes } => write(&*image, offset, &bytes),
                Request::Discard { offset, len } => image.discard(offset, len),
                Request::Zero { offset, len, unmap } => image.write_zeroes(offset, len, unmap),
                Request::Flush => image.flush(),
                Request::Read { offset, len } => support::read(&*image, offset, len as usize).map(|_| ()),
            };
            failed += u32::from(result.is_err());
        }
        drop(image);
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "seed {seed} took {:?}",
            begin.elapsed()
        );
        let after = recorder.after_process_death(recorder.position());
        assert_eq!(after[..4], magic, "seed {seed}: the header was overwritten");
    }
    assert!(
        opened > rounds / 10 && failed > 10,
        "the damage did nothing: {opened} opened, {failed} failed"
    );
}

crate::suite! {
    with_qemu_img: [
        damage_never_panics,
    ],
    alone: [],
}
