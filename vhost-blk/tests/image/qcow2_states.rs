//! Images in special states: with bitmaps, with extensions nobody knows, full, shared by queues.

use crate::support;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{
    Random, Request, Scratch, check_clean, contents, create, open, patch, qemu_contents, qemu_img,
    qemu_img_output, read, text, write,
};
use vhost_blk::image::qcow2::{self, Progress, Repair};
use vhost_blk::image::{Format, HostFile};

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
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

/// A writer that knows no bitmaps clears their autoclear bit and leaves the extension: what it says is old.
fn bitmaps_left_behind_are_none() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "2M");
    write(&*open(&[(&path, Format::Qcow2)]), 0, &[1; 512]).expect("writes");
    qemu_img(&["bitmap", "--add", text(&path), "old"]);
    let before = contents(&path);
    let extension = [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24];
    let directory = before.windows(8).position(|bytes| bytes == extension);
    let directory = directory.expect("has the extension") as u64 + 24;
    let l2 = word(&before, word(&before, 40) as usize) & !(1 << 63);
    let data = word(&before, l2 as usize) & !(1 << 63);
    patch(&path, 88, &[0; 8]);
    for place in [data, 1 << 40, 1 << 60, 77] {
        patch(&path, directory, &place.to_be_bytes());
        let image = open(&[(&path, Format::Qcow2)]);
        write(&*image, 0, &[2; 512]).expect("writes");
        assert!(!image.read_only());
        drop(image);
        // What they had is nobody's.
        support::check_leaks_at_most(&path).unwrap_or_else(|found| panic!("{place:#x}: {found}"));
    }
    let file = HostFile::new(support::fd(&path, true)).expect("is a file");
    let found = qcow2::check(&file, Repair::Refcounts, &Progress::untold()).expect("repairs");
    assert!(found.leaks_fixed > 0, "{found:?}");
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

/// Metadata stays where it is: what is written again goes to the same place.
fn rewriting_takes_no_space() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "cluster_size=4k", "8M");
    let image = open(&[(&path, Format::Qcow2)]);
    let round = |value| {
        write(&*image, 64 << 10, &vec![value; 1 << 20]).expect("writes");
        image.write_zeroes(4 << 20, 64 << 10, false).expect("zeroes");
        image.flush().expect("flushes");
        contents(&path).len()
    };
    let first = round(0);
    for value in 1..50 {
        assert_eq!(round(value), first, "round {value}");
    }
}

/// Version 2 has no way to discard what hides a backing file.
fn discard_is_offered_where_it_is_possible() {
    let scratch = Scratch::new();
    let base = scratch.path("base");
    std::fs::write(&base, vec![1; 1 << 20]).expect("writes");
    let backing = format!("backing_file={},backing_fmt=raw", text(&base));
    for (options, layers, possible) in [
        ("compat=0.10", 1, true),
        ("compat=1.1", 1, true),
        ("compat=0.10", 2, false),
        ("compat=1.1", 2, true),
    ] {
        let path = scratch.path("top");
        let options = match layers {
            2 => format!("{options},{backing}"),
            _ => options.to_owned(),
        };
        create(&path, &options, "1M");
        let all = [(path.as_path(), Format::Qcow2), (base.as_path(), Format::Raw)];
        let image = open(&all[..layers]);
        assert_eq!(image.can_discard(), possible, "{options}");
        write(&*image, 0, &vec![9; 64 << 10]).expect("writes");
        image.discard(0, 64 << 10).expect("is done or ignored");
        let shown = if possible { 0 } else { 9 };
        assert_eq!(
            read(&*image, 0, 512).expect("reads"),
            vec![shown; 512],
            "{options}"
        );
    }
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

crate::suite! {
    with_qemu_img: [
        bitmaps_are_marked_in_use_before_the_first_write,
        bitmaps_left_behind_are_none,
        unknown_parts_of_the_header_stay,
        the_refcount_table_grows,
        rewriting_takes_no_space,
        discard_is_offered_where_it_is_possible,
        discards_give_space_back_and_it_is_used_again,
        queues_share_an_image,
        resolving_leads_to_the_data,
    ],
    alone: [],
}
