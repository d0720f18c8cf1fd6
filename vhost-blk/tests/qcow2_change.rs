//! Snapshots, sizes and repairs of an image at rest, cut off by a crash at every point: what is left opens,
//! is sound after that, and shows the disk as it was or as it was to be.

mod support;

use std::cell::RefCell;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use support::hooked::Hooked;
use support::recorder::Recorder;
use support::{
    Random, Scratch, assert_same, check_clean, contents, create, open, open_with, patch, qemu_contents,
    qemu_img, read, text, write,
};
use vhost_blk::image::qcow2::{self, CreateOptions, Progress, Repair};
use vhost_blk::image::{BlockFile, Format, HostFile, ImageError, OpenOptions, Resolved, open_layers};

const SIZE: usize = 1 << 20;

/// Runs `change` and replays each prefix of what it wrote; `after` is the disk it makes.
fn crash_everywhere(start: &[u8], change: &dyn Fn(&dyn BlockFile) -> Result<(), ImageError>, after: &[u8]) {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    std::fs::write(&path, start).expect("writes");
    let before = qemu_contents(&path, &[]);
    let recorder = Recorder::new(start.to_vec());
    change(&recorder).expect("changes the image");
    let total = recorder.position();
    assert!(total > 4);
    for count in 0..=total {
        for seed in 0..3 {
            let mut random = Random::new(seed * 1000 + count as u64);
            std::fs::write(&path, recorder.after_host_crash(count, &mut random)).expect("writes");
            drop(open(&[(&path, Format::Qcow2)]));
            support::check_leaks_at_most(&path).unwrap_or_else(|found| panic!("after {count}: {found}"));
            let found = qemu_contents(&path, &[]);
            assert!(
                found == before || found == after,
                "after {count} of {total}: another disk"
            );
        }
    }
    std::fs::write(&path, recorder.after_process_death(total)).expect("writes");
    check_clean(&path);
    assert_same(&qemu_contents(&path, &[]), after, "in the end");
}

/// An image with a snapshot of an older disk; its bytes and both disks.
fn image_with_snapshot() -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "cluster_size=4k", &SIZE.to_string());
    let image = open(&[(&path, Format::Qcow2)]);
    write(&*image, 8192, &[1; 100 << 10]).expect("writes");
    drop(image);
    let old = qemu_contents(&path, &[]);
    qemu_img(&["snapshot", "-c", "one", text(&path)]);
    let image = open(&[(&path, Format::Qcow2)]);
    write(&*image, 64 << 10, &[2; 100 << 10]).expect("writes");
    drop(image);
    (contents(&path), old, qemu_contents(&path, &[]))
}

fn snapshots_are_taken_applied_and_deleted_whole() {
    let (start, old, now) = image_with_snapshot();
    crash_everywhere(
        &start,
        &|file| qcow2::take(file, "two", Duration::from_secs(1), &Progress::untold()),
        &now,
    );
    crash_everywhere(
        &start,
        &|file| qcow2::apply(file, "one", &Progress::untold()),
        &old,
    );
    crash_everywhere(
        &start,
        &|file| qcow2::delete(file, "one", &Progress::untold()),
        &now,
    );
}

fn disks_shrink_whole() {
    let (start, _, mut now) = image_with_snapshot();
    now.truncate(SIZE / 2);
    let recorder = Recorder::new(start.clone());
    qcow2::shrink(&recorder, SIZE as u64 / 2).expect("shrinks");
    let scratch = Scratch::new();
    let path = scratch.path("top");
    std::fs::write(&path, recorder.after_process_death(recorder.position())).expect("writes");
    assert_same(&qemu_contents(&path, &[]), &now, "the shorter disk");
}

fn repairs_count_anew() {
    let (start, _, now) = image_with_snapshot();
    let word = |at: usize| u64::from_be_bytes(start[at..at + 8].try_into().expect("eight bytes"));
    let block = word(word(48) as usize) as usize;
    let mut broken = start.clone();
    broken[block + 20..block + 60].fill(0);
    let check = |file: &dyn BlockFile, repair| qcow2::check(file, repair, &Progress::untold());
    let recorder = Recorder::new(broken.clone());
    let found = check(&recorder, Repair::No).expect("checks");
    assert!(found.corruptions > 0, "{found:?}");
    assert_eq!(recorder.position(), 0, "a check wrote");
    check(&recorder, Repair::Refcounts).expect("repairs");
    let scratch = Scratch::new();
    let path = scratch.path("top");
    for count in 0..=recorder.position() {
        let mut random = Random::new(count as u64);
        std::fs::write(&path, recorder.after_host_crash(count, &mut random)).expect("writes");
        let file = HostFile::new(support::fd(&path, true)).expect("is a file");
        check(&file, Repair::Refcounts).expect("repairs again");
        check_clean(&path);
        assert_same(&qemu_contents(&path, &[]), &now, "the repaired disk");
    }
}

/// An entry of the refcount table that places no block: what it counted is counted anew, and reading needs none.
fn a_damaged_refcount_table_is_counted_anew() {
    let (start, _, now) = image_with_snapshot();
    let word = |at: usize| u64::from_be_bytes(start[at..at + 8].try_into().expect("eight bytes"));
    let end = start.len().next_multiple_of(4096) as u64;
    for wrong in [end, 1 << 40, word(word(48) as usize) | 512] {
        let mut broken = start.clone();
        broken[word(48) as usize..][..8].copy_from_slice(&wrong.to_be_bytes());
        let scratch = Scratch::new();
        let path = scratch.path("top");
        std::fs::write(&path, &broken).expect("writes");
        let file = HostFile::new(support::fd(&path, true)).expect("is a file");
        let found = qcow2::check(&file, Repair::No, &Progress::untold()).expect("checks");
        assert!(found.corruptions > 1 && found.broken.is_none(), "{found:?}");
        let read_only = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let image = open_with(&[(&path, Format::Qcow2)], &read_only).expect("opens for reading");
        assert_same(&read(&*image, 0, SIZE).expect("reads"), &now, "read");
        drop(image);
        assert!(contents(&path) == broken);
        let found = qcow2::check(&file, Repair::Refcounts, &Progress::untold()).expect("repairs");
        assert_eq!((found.corruptions, found.leaks), (0, 0), "{found:?}");
        assert!(found.corruptions_fixed > 1, "{found:?}");
        check_clean(&path);
        assert_same(&qemu_contents(&path, &[]), &now, "repaired");
    }
}

type Work = dyn Fn(&HostFile, &Progress<'_>);

/// Each table counts once for each walk through it.
fn long_work_tells_how_far_it_is() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "cluster_size=512", &SIZE.to_string());
    write(&*open(&[(&path, Format::Qcow2)]), 0, &[1; SIZE]).expect("writes");
    let told = |work: &Work| {
        let told = RefCell::new(Vec::new());
        let tell = |done, total| told.borrow_mut().push((done, total));
        let file = HostFile::new(support::fd(&path, true)).expect("is a file");
        work(&file, &Progress::told(&tell));
        let told = told.into_inner();
        assert!(told.is_sorted_by(|one, next| one.0 < next.0), "{told:?}");
        let last = *told.last().expect("something is told");
        assert_eq!(last.0, last.1, "{told:?}");
        (told, last.1)
    };
    // All of the disk by L2 tables with 64 entries, twice, and blocks with 256 refcounts.
    let one_walk = |before: &[u8]| 2 * 32 + (before.len() as u64).div_ceil(512).div_ceil(256);
    let before = contents(&path);
    let (_, whole) = told(&|file, progress| {
        qcow2::check(file, Repair::No, progress).expect("checks");
    });
    assert_eq!(whole, one_walk(&before));
    let word = |at: usize| u64::from_be_bytes(before[at..at + 8].try_into().expect("eight bytes"));
    patch(&path, word(word(48) as usize) + 20, &[0; 40]);
    let (steps, whole) = told(&|file, progress| {
        let found = qcow2::check(file, Repair::Refcounts, progress).expect("repairs");
        assert!(found.corruptions_fixed > 0);
    });
    let once = one_walk(&before);
    assert!(steps.contains(&(once, once)) && whole >= 3 * once, "{steps:?}");
    let changes: [&Work; 3] = [
        &|file, progress| qcow2::take(file, "one", Duration::ZERO, progress).expect("takes"),
        &|file, progress| qcow2::apply(file, "one", progress).expect("applies"),
        &|file, progress| qcow2::delete(file, "one", progress).expect("deletes"),
    ];
    for change in changes {
        let (_, whole) = told(change);
        // And a look at each run of clusters, for what may go back to the host.
        assert!((once..2 * once).contains(&whole), "{whole}");
    }
    check_clean(&path);
}

/// The bit that keeps a damaged image from being written to goes when the damage has gone.
fn a_repaired_image_is_corrupt_no_more() {
    let (start, ..) = image_with_snapshot();
    let word = |at: u64| u64::from_be_bytes(start[at as usize..][..8].try_into().expect("eight bytes"));
    let block = word(word(48)) as usize;
    let table = (word(word(40)) & 0x00ff_ffff_ffff_fe00) as usize;
    let corrupt = |file: &Recorder| file.after_process_death(file.position())[79] & 2 != 0;
    for (at, repaired) in [(block + 20, true), (72, true), (table + 8 * 2 + 6, false)] {
        let mut broken = start.clone();
        broken[at] ^= 2;
        broken[79] |= 2;
        if at == 72 {
            // Nothing but the bit.
            broken[at] ^= 2;
        }
        let recorder = Recorder::new(broken);
        qcow2::check(&recorder, Repair::No, &Progress::untold()).expect("checks");
        assert!(corrupt(&recorder), "a check wrote");
        let found = qcow2::check(&recorder, Repair::Refcounts, &Progress::untold()).expect("repairs");
        assert_eq!(found.broken.is_none(), repaired, "{found:?}");
        assert_eq!(corrupt(&recorder), !repaired, "{found:?}");
        if repaired {
            let scratch = Scratch::new();
            let path = scratch.path("top");
            std::fs::write(&path, recorder.after_process_death(recorder.position())).expect("writes");
            check_clean(&path);
            write(&*open(&[(&path, Format::Qcow2)]), 0, &[1; 512]).expect("writes");
        }
    }
}

fn what_excludes_a_change_is_named_and_nothing_is_written() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    let refused = |field: &str, change: &dyn Fn(&dyn BlockFile) -> Result<(), ImageError>| {
        let recorder = Recorder::new(contents(&path));
        match change(&recorder) {
            Err(ImageError::Refused { field: found, reason }) => assert_eq!(found, field, "{reason}"),
            other => panic!("{field}: {other:?}"),
        }
        assert_eq!(recorder.position(), 0, "{field}: it wrote");
    };
    let take = |file: &dyn BlockFile| qcow2::take(file, "x", Duration::ZERO, &Progress::untold());
    create(&path, "compat=0.10", "1M");
    refused("version", &take);
    create(&path, "", "1M");
    refused("snapshot name", &|file| {
        qcow2::take(file, "", Duration::ZERO, &Progress::untold())
    });
    refused("snapshot name", &|file| {
        qcow2::take(file, &"x".repeat(256), Duration::ZERO, &Progress::untold())
    });
    refused("snapshot name", &|file| {
        qcow2::apply(file, "x", &Progress::untold())
    });
    refused("snapshot name", &|file| {
        qcow2::delete(file, "x", &Progress::untold())
    });
    refused("size", &|file| qcow2::shrink(file, 1000));
    refused("size", &|file| qcow2::shrink(file, (1 << 20) + 512));
    for (at, value, field) in [
        (79, 1, "incompatible_features"),
        (79, 2, "incompatible_features"),
        (95, 4, "autoclear_features"),
    ] {
        patch(&path, at, &[value]);
        refused(field, &take);
        refused(field, &|file| qcow2::shrink(file, 512));
        patch(&path, at, &[0]);
    }
    qemu_img(&["bitmap", "--add", text(&path), "b"]);
    refused("bitmaps extension", &take);
    let data = scratch.path("data");
    create(&path, &format!("data_file={}", text(&data)), "1M");
    refused("external data file", &take);
    let (start, ..) = image_with_snapshot();
    std::fs::write(&path, &start).expect("writes");
    // The first entry; its lengths of id and name, and these, behind 40 bytes and the extra data.
    let table = u64::from_be_bytes(start[64..72].try_into().expect("eight bytes"));
    let extra = u64::from(start[table as usize + 39]);
    patch(&path, table + 12, &[0, 20, 0, 3]);
    patch(&path, table + 40 + extra, b"18446744073709551615one");
    refused("snapshot id", &take);
    std::fs::write(&path, b"").expect("writes");
    let make = |size, cluster_bits| {
        move |file: &dyn BlockFile| {
            let options = CreateOptions {
                cluster_bits,
                ..CreateOptions::of_size(size)
            };
            qcow2::create(file, &options)
        }
    };
    refused("size", &make(1 << 50, 9));
    refused("size", &make(1000, 16));
    refused("size", &make(1 << 63, 16));
    refused("cluster_bits", &make(1 << 20, 8));
    refused("cluster_bits", &make(1 << 20, 22));
}

/// A change that is found out afterwards to have no refcounts would leave an image that is dirty for good.
fn what_cannot_be_counted_after_is_refused_before() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    let named = |part: &str, change: &dyn Fn(&dyn BlockFile) -> Result<(), ImageError>| {
        let recorder = Recorder::new(contents(&path));
        let error = change(&recorder).expect_err("is refused").to_string();
        assert!(error.contains(part), "{error}");
        assert_eq!(recorder.position(), 0, "{part}: it wrote");
    };
    let take = |file: &dyn BlockFile| qcow2::take(file, "x", Duration::ZERO, &Progress::untold());
    create(&path, "refcount_bits=1,cluster_size=4k", "1M");
    write(&*open(&[(&path, Format::Qcow2)]), 0, &[1; 4096]).expect("writes");
    named("refcount_order: too small for 2 references", &take);

    let (start, ..) = image_with_snapshot();
    let word = |at: u64| u64::from_be_bytes(start[at as usize..][..8].try_into().expect("eight bytes"));
    let table = word(word(40)) & 0x00ff_ffff_ffff_fe00;
    std::fs::write(&path, &start).expect("writes");
    // Not aligned to a cluster.
    patch(&path, table + 8 * 2, &(1_u64 << 63 | 0x1200).to_be_bytes());
    named("L2 entry", &take);
    named("L2 entry", &|file| {
        qcow2::delete(file, "one", &Progress::untold())
    });
}

/// As qemu-img makes them: it applies the one with the id and deletes the one with the name.
fn nobody_has_to_guess_which_snapshot_is_meant() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "1M");
    for name in ["3", "x", "y"] {
        qemu_img(&["snapshot", "-c", name, text(&path)]);
    }
    let progress = Progress::untold();
    let refused = |change: &dyn Fn(&dyn BlockFile) -> Result<(), ImageError>, words: &[&str]| {
        let recorder = Recorder::new(contents(&path));
        let error = change(&recorder).expect_err("is refused").to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        assert_eq!(recorder.position(), 0, "it wrote");
    };
    let both = [r#"named "3" with the id "1""#, r#"named "y" with the id "3""#];
    refused(&|file| qcow2::delete(file, "3", &progress), &both);
    refused(&|file| qcow2::apply(file, "3", &progress), &both);
    for taken in ["2", "x"] {
        let take = |file: &dyn BlockFile| qcow2::take(file, taken, Duration::ZERO, &progress);
        refused(&take, &["is taken", r#"named "x" with the id "2""#]);
    }
    let file = HostFile::new(support::fd(&path, true)).expect("is a file");
    qcow2::delete(&file, "1", &progress).expect("says which");
    qcow2::apply(&file, "3", &progress).expect("there is one left");
    let (_, left) = qcow2::info(&file).expect("is an image");
    let names: Vec<&str> = left.iter().map(|snapshot| &*snapshot.name).collect();
    assert_eq!(names, ["x", "y"]);
    check_clean(&path);
}

fn what_is_used_no_more_goes_back_to_the_host() {
    const PIECE: usize = 4 << 20;
    const NAME: &str = "one";
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "16M");
    let used = || std::fs::metadata(&path).expect("is there").blocks() * 512;
    let fill = |value: u8| {
        write(&*open(&[(&path, Format::Qcow2)]), 0, &vec![value; PIECE]).expect("writes");
    };
    let changed = |change: &dyn Fn(&dyn BlockFile)| {
        let before = used();
        change(&HostFile::new(support::fd(&path, true)).expect("is a file"));
        check_clean(&path);
        before.saturating_sub(used())
    };
    // Its own tables are new.
    let freed = PIECE as u64 - (1 << 20)..PIECE as u64 + (1 << 20);
    let progress = Progress::untold();
    let take = |file: &dyn BlockFile| qcow2::take(file, NAME, Duration::ZERO, &progress).expect("takes");
    fill(1);
    changed(&take);
    fill(2);
    let deleted = changed(&|file| qcow2::delete(file, NAME, &progress).expect("deletes"));
    assert!(freed.contains(&deleted), "{deleted} bytes less by deleting");
    changed(&take);
    fill(3);
    let applied = changed(&|file| qcow2::apply(file, NAME, &progress).expect("applies"));
    assert!(freed.contains(&applied), "{applied} bytes less by applying");
    let image = open(&[(&path, Format::Qcow2)]);
    assert_same(
        &read(&*image, 0, PIECE).expect("reads"),
        &vec![2; PIECE],
        "applied",
    );
    drop(image);
    // Clusters that nobody uses are counted once.
    let (first, clusters) = (400, 64);
    let bytes = contents(&path);
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    patch(
        &path,
        word(word(48) as usize) + 2 * first,
        &[0, 1].repeat(clusters),
    );
    patch(&path, first << 16, &vec![7; clusters << 16]);
    let repaired = changed(&|file| {
        let found = qcow2::check(file, Repair::Refcounts, &progress).expect("repairs");
        assert_eq!(found.leaks_fixed, clusters as u64);
    });
    assert!(freed.contains(&repaired), "{repaired} bytes less by a repair");
}

/// Kilobytes of this process that are in memory.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("reads");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .expect("is there");
    line.split_whitespace()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .expect("a number")
}

fn a_large_disk_takes_the_cache_and_no_more() {
    const TABLES: u64 = 4096;
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "4T");
    let options = OpenOptions {
        l2_cache_size: 64 << 10,
        ..OpenOptions::default()
    };
    let image = support::open_with(&[(&path, Format::Qcow2)], &options).expect("opens");
    let before = resident();
    // Each in an L2 table of its own, of which 4 KiB would be kept: 16 MiB without a bound.
    for table in 0..TABLES {
        write(&*image, table << 29, &[7; 512]).expect("writes");
    }
    for table in 0..TABLES {
        assert_eq!(support::read(&*image, table << 29, 512).expect("reads"), [7; 512]);
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 6 << 10, "{grown} KiB more than before");
    drop(image);
    check_clean(&path);
}

/// Version 2 has no zero flag: what is zeros already is found piece by piece, and not looked at again.
fn clearing_what_is_clear_reads_each_table_once() {
    const CLUSTER: u64 = 512;
    const TABLE: u64 = CLUSTER / 8 * CLUSTER;
    const TABLES: u64 = 512;
    let scratch = Scratch::new();
    let path = scratch.path("top");
    let size = TABLES * TABLE;
    create(&path, "compat=0.10,cluster_size=512", &size.to_string());
    let file = Arc::new(Hooked::new(Recorder::new(contents(&path))));
    let options = OpenOptions {
        l2_cache_size: 1,
        ..OpenOptions::default()
    };
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, file.clone())];
    let image = open_layers(layers, None, &options).expect("opens");
    for table in 0..TABLES {
        write(&*image, table * TABLE, &[7; CLUSTER as usize]).expect("writes");
    }
    image.discard(0, size).expect("discards");
    image.flush().expect("flushes");
    let before = file.reads.load(Ordering::Relaxed);
    image.write_zeroes(0, size, false).expect("clears");
    let reads = file.reads.load(Ordering::Relaxed) - before;
    assert!(
        (TABLES..2 * TABLES).contains(&reads),
        "{reads} reads of {TABLES} tables"
    );
    assert_eq!(
        support::read(&*image, 0, size as usize).expect("reads"),
        vec![0; size as usize]
    );
}

/// The lock is not held as long as it takes to walk over all of a disk.
fn one_look_at_a_disk_has_a_bound() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "1T");
    let image = open(&[(&path, Format::Qcow2)]);
    let Resolved::Zero { len } = image.resolve_read(0, 1 << 40).expect("resolves") else {
        panic!("an empty disk reads as zeros");
    };
    assert!((1 << 20..1 << 30).contains(&len), "{len} bytes in one look");
}

suite! {
    with_qemu_img: [
        snapshots_are_taken_applied_and_deleted_whole,
        disks_shrink_whole,
        repairs_count_anew,
        a_damaged_refcount_table_is_counted_anew,
        long_work_tells_how_far_it_is,
        a_repaired_image_is_corrupt_no_more,
        what_excludes_a_change_is_named_and_nothing_is_written,
        what_cannot_be_counted_after_is_refused_before,
        nobody_has_to_guess_which_snapshot_is_meant,
        what_is_used_no_more_goes_back_to_the_host,
        a_large_disk_takes_the_cache_and_no_more,
        clearing_what_is_clear_reads_each_table_once,
        one_look_at_a_disk_has_a_bound,
    ],
    alone: [],
}

fn main() -> std::process::ExitCode {
    support::suite::run(tests())
}
