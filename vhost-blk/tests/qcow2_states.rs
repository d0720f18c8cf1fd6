//! Images in special states: dirty, with bitmaps, with extensions nobody knows, full, shared by queues.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use support::recorder::Recorder;
use support::{
    Random, Request, Scratch, check_clean, check_leaks_at_most, contents, create, open, open_with, patch,
    qemu_contents, qemu_img, qemu_img_output, read, text, write,
};
use vhost_blk::image::{BlockFile, Format, OpenOptions, open_layers};

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn dirty_images_are_repaired_before_writing() {
    for options in [
        "lazy_refcounts=on",
        "lazy_refcounts=on,cluster_size=512,refcount_bits=64",
        "lazy_refcounts=on,cluster_size=4k,refcount_bits=2",
        "lazy_refcounts=on,extended_l2=on",
    ] {
        let scratch = Scratch::new();
        let path = scratch.path("top");
        let size = 3_usize << 20;
        create(&path, options, &size.to_string());
        let mut model = vec![0; size];
        let image = open(&[(&path, Format::Qcow2)]);
        let mut random = Random::new(77);
        for step in 0..40_u8 {
            support::random_request(&mut random, size as u64, 200 << 10, step | 1).run(&*image, &mut model);
        }
        drop(image);
        qemu_img(&["snapshot", "-c", "one", text(&path)]);
        let image = open(&[(&path, Format::Qcow2)]);
        Request::Write {
            offset: 0,
            bytes: vec![9; 300 << 10],
        }
        .run(&*image, &mut model);
        drop(image);
        // The refcounts are lost, as after a power cut with lazy refcounts.
        let bytes = contents(&path);
        let features = word(&bytes, 72);
        let block = word(&bytes, word(&bytes, 48) as usize);
        patch(&path, block, &[0; 64]);
        patch(&path, 72, &(features | 1).to_be_bytes());
        let read_only = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let before = contents(&path);
        let image = open_with(&[(&path, Format::Qcow2)], &read_only).expect("opens for reading");
        Request::Read {
            offset: 0,
            len: size as u64,
        }
        .run(&*image, &mut model);
        drop(image);
        assert!(contents(&path) == before, "a reader changed the image");

        let image = open(&[(&path, Format::Qcow2)]);
        assert_eq!(
            word(&contents(&path), 72),
            features,
            "{options}: the dirty bit is still set"
        );
        check_leaks_at_most(&path).unwrap_or_else(|found| panic!("{options}: {found}"));
        for step in 0..40_u8 {
            support::random_request(&mut random, size as u64, 200 << 10, step | 1).run(&*image, &mut model);
        }
        drop(image);
        check_clean(&path);
        assert_eq!(qemu_contents(&path, &[]), model);
    }
}

fn a_repair_that_is_cut_off_starts_again() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "lazy_refcounts=on,cluster_size=4k", "2M");
    let image = open(&[(&path, Format::Qcow2)]);
    write(&*image, 4096, &vec![7; 1 << 20]).expect("writes");
    drop(image);
    let expected = qemu_contents(&path, &[]);
    let block = word(&contents(&path), word(&contents(&path), 48) as usize);
    patch(&path, block, &[0; 512]);
    patch(&path, 79, &[1]);
    let recorder = Arc::new(Recorder::new(contents(&path)));
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, recorder.clone())];
    drop(open_layers(layers, None, &OpenOptions::default()).expect("repairs"));
    let mut random = Random::new(5);
    for count in 0..=recorder.position() {
        std::fs::write(&path, recorder.after_host_crash(count, &mut random)).expect("writes");
        drop(open(&[(&path, Format::Qcow2)]));
        check_clean(&path);
        assert_eq!(qemu_contents(&path, &[]), expected, "cut off after {count}");
    }
}

fn broken_dirty_images_are_left_alone() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "lazy_refcounts=on", "2M");
    let image = open(&[(&path, Format::Qcow2)]);
    write(&*image, 0, &[7; 512]).expect("writes");
    drop(image);
    let l2 = word(&contents(&path), word(&contents(&path), 40) as usize) & !(1 << 63);
    patch(&path, l2 + 8, &(1_u64 << 50).to_be_bytes());
    patch(&path, 79, &[1]);
    let before = contents(&path);
    let error = open_with(&[(&path, Format::Qcow2)], &OpenOptions::default())
        .err()
        .expect("is refused");
    assert!(error.to_string().contains("past the file's end"), "{error}");
    assert!(contents(&path) == before);
}

fn bitmaps_are_marked_in_use_before_the_first_write() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "2M");
    qemu_img(&["bitmap", "--add", text(&path), "follows"]);
    qemu_img(&["bitmap", "--add", "--disable", text(&path), "rests"]);
    let before = contents(&path);
    let image = open(&[(&path, Format::Qcow2)]);
    read(&*image, 0, 512).expect("reads");
    image.flush().expect("flushes");
    assert!(contents(&path) == before, "reading changed the image");
    write(&*image, 0, &[1; 512]).expect("writes");
    drop(image);
    assert_eq!(
        word(&contents(&path), 88),
        1,
        "the bitmaps extension was given up"
    );
    let info = qemu_img(&["info", text(&path)]);
    let flags = |name: &str| {
        let all: Vec<&str> = info.split("name: ").collect();
        (0..all.len())
            .find(|at| all[*at].starts_with(name))
            .map(|at| all[at - 1].to_owned())
            .expect("is listed")
    };
    assert!(flags("follows").contains("in-use"), "{info}");
    assert!(!flags("rests").contains("in-use"), "{info}");
    check_clean(&path);
}

fn unknown_parts_of_the_header_stay() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "compression_type=zstd,cluster_size=4k", "16M");
    let length = u64::from(u32::from_be_bytes(
        contents(&path)[100..104].try_into().expect("four"),
    ));
    let extension = [
        0x1234_5678_u32.to_be_bytes(),
        5_u32.to_be_bytes(),
        *b"hell",
        *b"o\0\0\0",
    ]
    .concat();
    let rest = contents(&path)[length as usize..1024].to_vec();
    patch(&path, length, &[extension.clone(), rest].concat());
    patch(&path, 80, &(1_u64 << 33).to_be_bytes());
    patch(&path, 88, &(1_u64 << 44).to_be_bytes());
    let before = contents(&path)[..4096].to_vec();
    let image = open(&[(&path, Format::Qcow2)]);
    assert_eq!(contents(&path)[..4096], before, "opening changed the header");
    write(&*image, 0, &vec![1; 9 << 20]).expect("writes");
    drop(image);
    let after = contents(&path)[..4096].to_vec();
    assert_eq!(word(&after, 88), 0, "the unknown autoclear bit is still set");
    assert_eq!(word(&after, 80), 1 << 33, "the unknown compatible bit is gone");
    assert_eq!(after[104], 1, "the compression type is gone");
    assert_eq!(after[length as usize..][..16], extension);
    check_clean(&path);
}

fn the_refcount_table_grows() {
    // 64 table entries of 64 clusters of 512 bytes cover 2 MiB.
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "cluster_size=512,refcount_bits=64", "24M");
    let table = word(&contents(&path), 48);
    let image = open(&[(&path, Format::Qcow2)]);
    let data: Vec<u8> = (0..20_u32 << 20).map(|at| (at / 512) as u8).collect();
    write(&*image, 1 << 20, &data).expect("writes");
    drop(image);
    assert_ne!(word(&contents(&path), 48), table);
    check_clean(&path);
    assert!(qemu_contents(&path, &[])[1 << 20..][..data.len()] == data);
}

fn discards_give_space_back_and_it_is_used_again() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "64M");
    let image = open(&[(&path, Format::Qcow2)]);
    let blocks = || std::fs::metadata(&path).expect("is there").blocks() * 512;
    for round in 1..4_u8 {
        write(&*image, 0, &vec![round; 32 << 20]).expect("writes");
        image.flush().expect("flushes");
        assert!(blocks() >= 32 << 20);
        image.discard(0, 32 << 20).expect("discards");
        image.flush().expect("flushes");
        image.flush().expect("flushes");
        assert!(blocks() < 2 << 20, "{} bytes are still used", blocks());
        assert_eq!(read(&*image, 0, 512).expect("reads"), vec![0; 512]);
    }
    drop(image);
    let length = std::fs::metadata(&path).expect("is there").len();
    assert!(
        length < 80 << 20,
        "the file has grown to {length}: freed clusters were not used again"
    );
    check_clean(&path);
}

fn queues_share_an_image() {
    for (options, with_base) in [
        ("cluster_size=64k", true),
        ("cluster_size=4k", false),
        ("extended_l2=on", true),
    ] {
        let scratch = Scratch::new();
        let (path, below) = (scratch.path("top"), scratch.path("below"));
        let size = 8_u64 << 20;
        std::fs::write(&below, vec![0xee; size as usize]).expect("writes");
        let backing = if with_base {
            format!(",backing_file={},backing_fmt=raw", text(&below))
        } else {
            String::new()
        };
        create(&path, &format!("{options}{backing}"), &size.to_string());
        let mut layers = vec![(path.as_path(), Format::Qcow2)];
        if with_base {
            layers.push((&below, Format::Raw));
        }
        let image = open(&layers);
        let stop = AtomicBool::new(false);
        // Four queues own every fourth sector each, so that they meet in every cluster.
        let mut model = vec![if with_base { 0xee } else { 0 }; size as usize];
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let queues: Vec<_> = (0..4_u64)
                .map(|queue| {
                    let (image, mut mine) = (Arc::clone(&image), model.clone());
                    scope.spawn(move || {
                        let mut random = Random::new(queue + 1);
                        for step in 0..800_u64 {
                            let offset = (random.below(size / 2048) * 4 + queue) * 512;
                            match random.below(10) {
                                0 => image.flush().expect("flushes"),
                                1 => {
                                    image.write_zeroes(offset, 512, true).expect("zeroes");
                                    mine[offset as usize..][..512].fill(0);
                                }
                                2..4 => {
                                    let found = read(&*image, offset, 512).expect("reads");
                                    assert_eq!(
                                        found,
                                        mine[offset as usize..][..512],
                                        "queue {queue} at {offset:#x}"
                                    );
                                }
                                _ => {
                                    let bytes = vec![step as u8; 512];
                                    write(&*image, offset, &bytes).expect("writes");
                                    mine[offset as usize..][..512].copy_from_slice(&bytes);
                                }
                            }
                        }
                        mine
                    })
                })
                .collect();
            let flusher = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    image.flush().expect("flushes");
                }
            });
            let models = queues
                .into_iter()
                .map(|queue| queue.join().expect("a queue ends well"))
                .collect();
            stop.store(true, Ordering::Relaxed);
            flusher.join().expect("the flusher ends well");
            models
        });
        for (sector, bytes) in model.chunks_mut(512).enumerate() {
            bytes.copy_from_slice(&models[sector % 4][sector * 512..][..512]);
        }
        Request::Read { offset: 0, len: size }.run(&*image, &mut model);
        drop(image);
        check_clean(&path);
        assert!(qemu_contents(&path, &[]) == model);
    }
}

fn resolving_leads_to_the_data() {
    use std::os::unix::fs::FileExt;
    use vhost_blk::image::Resolved;
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "4M");
    let image = open(&[(&path, Format::Qcow2)]);
    assert!(matches!(
        image.resolve_read(0, 4096),
        Ok(Resolved::Zero { len: 4096 })
    ));
    assert!(matches!(
        image.resolve_write(0, 4096),
        Ok(Resolved::Elsewhere { .. })
    ));
    write(&*image, 0, &vec![5; 200 << 10]).expect("writes");
    let Ok(Resolved::Mapped(extent, guard)) = image.resolve_write(4096, 100 << 10) else {
        panic!("is mapped")
    };
    assert_eq!(extent.len, 100 << 10);
    std::fs::File::from(extent.file.try_clone_to_owned().expect("duplicates"))
        .write_all_at(&[6; 4096], extent.offset)
        .expect("writes");
    // Until the guard goes, the cluster is not given to anybody else.
    image.discard(0, 4 << 20).expect("discards");
    for _ in 0..4 {
        image.flush().expect("flushes");
    }
    let offset = extent.offset as usize;
    assert_eq!(contents(&path)[offset..][..4096], [6; 4096]);
    drop(guard);
    for _ in 0..4 {
        image.flush().expect("flushes");
    }
    assert_eq!(
        contents(&path).get(offset..offset + 4096).unwrap_or(&[0; 4096]),
        [0; 4096]
    );
    drop(image);
    check_clean(&path);
    assert!(
        qemu_img_output(&["compare", text(&path), text(&path)])
            .status
            .success()
    );
}

suite! {
    with_qemu_img: [
        dirty_images_are_repaired_before_writing,
        a_repair_that_is_cut_off_starts_again,
        broken_dirty_images_are_left_alone,
        bitmaps_are_marked_in_use_before_the_first_write,
        unknown_parts_of_the_header_stay,
        the_refcount_table_grows,
        discards_give_space_back_and_it_is_used_again,
        queues_share_an_image,
        resolving_leads_to_the_data,
    ],
    alone: [],
}
