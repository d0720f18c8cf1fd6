//! A cluster that the mapping dropped is neither cleared nor reused before a barrier has made the drop
//! durable, nor while I/O that began before the drop still runs.

mod support;

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use support::hooked::Hooked;
use support::recorder::{Op, Recorder};
use support::{Scratch, check_clean, contents, create, open, write};
use vhost_blk::image::{BlockFile, Format, OpenOptions, Resolved, open_layers};

const CLUSTER: u64 = 64 << 10;

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().expect("eight bytes"))
}

/// Host offset of guest cluster 0.
fn host_of_first(bytes: &[u8]) -> u64 {
    let offset = |raw: u64| raw & 0x00ff_ffff_ffff_fe00;
    offset(word(bytes, offset(word(bytes, word(bytes, 40)))))
}

fn touches(op: &Op, cluster: u64) -> bool {
    let (offset, len) = match op {
        Op::Write { offset, bytes } | Op::Durable { offset, bytes } => (*offset, bytes.len() as u64),
        Op::Zero { offset, len } => (*offset, *len),
        Op::Length(_) | Op::Barrier => return false,
    };
    offset < cluster + CLUSTER && cluster < offset + len
}

fn a_barrier_stands_between_drop_and_reuse() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "64M");
    let recorder = Arc::new(Recorder::new(contents(&path)));
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, recorder.clone())];
    let image = open_layers(layers, None, &OpenOptions::default()).expect("opens");
    write(&*image, 0, &vec![1; CLUSTER as usize]).expect("writes");
    image.flush().expect("flushes");
    let host = host_of_first(&recorder.after_process_death(recorder.position()));
    let refcount = |bytes: &[u8]| {
        let block = word(bytes, word(bytes, 48));
        let at = (block + host / CLUSTER * 2) as usize;
        u16::from_be_bytes([bytes[at], bytes[at + 1]])
    };
    image.discard(0, CLUSTER).expect("discards");
    let dropped = recorder.position();
    let flushed = |log: &[Op]| log[dropped..].iter().position(|op| matches!(op, Op::Barrier));
    // More than was reserved ahead: free clusters are looked for, but none of it needs old data gone.
    for cluster in 1..4_u64 {
        write(&*image, cluster * CLUSTER, &vec![2; CLUSTER as usize]).expect("writes");
    }
    assert_eq!(flushed(&recorder.log()), None, "nothing asked for a barrier yet");
    let now = recorder.after_process_death(recorder.position());
    assert_eq!(refcount(&now), 1, "it was freed before a barrier");
    image.flush().expect("flushes");
    for cluster in 4..600_u64 {
        write(&*image, cluster * CLUSTER, &vec![3; CLUSTER as usize]).expect("writes");
    }
    let log = recorder.log();
    let barrier = flushed(&log).expect("a flush makes one") + dropped;
    let first = log[dropped..].iter().position(|op| touches(op, host));
    let first = first.expect("the cluster is cleared for its next use") + dropped;
    assert!(
        barrier < first,
        "touched by operation {first}, before the barrier {barrier}"
    );
    drop(image);
    std::fs::write(&path, recorder.after_process_death(recorder.position())).expect("writes");
    check_clean(&path);
}

fn io_in_flight_keeps_its_cluster() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "64M");
    let image = open(&[(&path, Format::Qcow2)]);
    write(&*image, 0, &vec![1; CLUSTER as usize]).expect("writes");
    image.flush().expect("flushes");
    let Resolved::Mapped(extent, guard) = image.resolve_read(0, CLUSTER).expect("resolves") else {
        panic!("an allocated cluster lies in the file");
    };
    let file = std::fs::File::open(&path).expect("opens");
    let on_disk = || {
        let mut bytes = vec![0; CLUSTER as usize];
        file.read_exact_at(&mut bytes, extent.offset).expect("reads");
        bytes
    };
    image.discard(0, CLUSTER).expect("discards");
    for round in 1..40_u64 {
        image.flush().expect("flushes");
        let new = vec![2; CLUSTER as usize * 16];
        write(&*image, round * CLUSTER * 16, &new).expect("writes");
    }
    assert!(
        on_disk().iter().all(|byte| *byte == 1),
        "taken away under running I/O"
    );
    drop(guard);
    for _ in 0..3 {
        image.flush().expect("flushes");
    }
    assert!(on_disk().iter().all(|byte| *byte != 1), "never given back");
    drop(image);
    check_clean(&path);
}

/// Where refcounts lie, a cluster has a second mapping, and a write may have begun by it after the first
/// was dropped.
fn io_in_flight_by_another_mapping_keeps_it_too() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "64M");
    let image = open(&[(&path, Format::Qcow2)]);
    write(&*image, 0, &vec![1; CLUSTER as usize]).expect("writes");
    image.close().expect("closes");
    drop(image);
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .expect("opens");
    let bytes = contents(&path);
    let table = word(&bytes, word(&bytes, 40)) & 0x00ff_ffff_ffff_fe00;
    file.write_all_at(&word(&bytes, table).to_be_bytes(), table + 8)
        .expect("lies");
    let image = open(&[(&path, Format::Qcow2)]);
    let Resolved::Mapped(_, before) = image.resolve_read(0, CLUSTER).expect("resolves") else {
        panic!("an allocated cluster lies in the file");
    };
    image.discard(0, CLUSTER).expect("discards");
    image.flush().expect("flushes");
    let Resolved::Mapped(extent, guard) = image.resolve_write(CLUSTER, CLUSTER).expect("resolves") else {
        panic!("the refcount says that it may be overwritten");
    };
    assert_eq!(extent.offset, host_of_first(&bytes), "the same cluster");
    drop(before);
    let is_reused = || {
        let mut bytes = vec![0; CLUSTER as usize];
        file.read_exact_at(&mut bytes, extent.offset).expect("reads");
        bytes.contains(&2)
    };
    let use_more = |from: u64| {
        for cluster in from..from + 400 {
            write(&*image, cluster * CLUSTER, &vec![2; CLUSTER as usize]).expect("writes");
        }
        image.flush().expect("flushes");
    };
    image.flush().expect("flushes");
    use_more(2);
    assert!(!is_reused(), "given out under a running write");
    drop(guard);
    image.flush().expect("flushes");
    use_more(402);
    assert!(is_reused(), "never given out");
}

/// What another queue drops while a flush's barrier runs, that barrier does not cover.
fn a_drop_during_the_barrier_waits_for_the_next() {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "64M");
    let file = Arc::new(Hooked::new(Recorder::new(contents(&path))));
    let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, file.clone())];
    let image = open_layers(layers, None, &OpenOptions::default()).expect("opens");
    write(&*image, 0, &vec![1; CLUSTER as usize]).expect("writes");
    image.flush().expect("flushes");
    let host = host_of_first(&file.inner.after_process_death(file.inner.position()));
    let other_queue = Arc::clone(&image);
    *file.after_sync.lock().expect("nobody panicked") = Some(Box::new(move || {
        other_queue.discard(0, CLUSTER).expect("discards");
    }));
    let before = file.inner.position();
    image.flush().expect("flushes");
    let touched = || file.inner.log()[before..].iter().any(|op| touches(op, host));
    assert!(!touched(), "given back although its drop is not durable");
    image.flush().expect("flushes");
    assert!(touched(), "never given back");
}

suite! {
    with_qemu_img: [
        a_barrier_stands_between_drop_and_reuse,
        a_drop_during_the_barrier_waits_for_the_next,
        io_in_flight_by_another_mapping_keeps_it_too,
        io_in_flight_keeps_its_cluster,
    ],
    alone: [],
}
