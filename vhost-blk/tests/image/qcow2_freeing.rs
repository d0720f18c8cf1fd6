//! A cluster that the mapping dropped is neither cleared nor reused before a barrier has made the drop
//! durable, nor while I/O that began before the drop still runs.

use crate::support;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use crate::support::hooked::Hooked;
use crate::support::recorder::{Op, Recorder};
use crate::support::{Scratch, assert_same, check_clean, contents, create, open, text, write};
use vhost_blk::image::{BlockFile, Format, Image, OpenOptions, Resolved, open_layers};

const CLUSTER: u64 = 64 << 10;
const DEADLINE: Duration = Duration::from_secs(30);

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

/// An image of which the data lies in a file of its own, both recorded.
struct External {
    scratch: Scratch,
    file: Arc<Hooked>,
    data: Arc<Hooked>,
    image: Arc<dyn Image>,
}

impl External {
    /// With four clusters of 1s.
    fn new() -> Self {
        let scratch = Scratch::new();
        let (path, data) = (scratch.path("top"), scratch.path("data"));
        create(&path, &format!("data_file={}", text(&data)), "64M");
        let recorder = Recorder::new(contents(&path));
        let data = Arc::new(Hooked::new(recorder.beside(contents(&data))));
        let file = Arc::new(Hooked::new(recorder));
        let layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, file.clone())];
        let image = open_layers(layers, Some(data.clone()), &OpenOptions::default()).expect("opens");
        write(&*image, 0, &vec![1; 4 * CLUSTER as usize]).expect("writes");
        image.flush().expect("flushes");
        Self {
            scratch,
            file,
            data,
            image,
        }
    }

    /// Where holes were made in the data.
    fn holes(&self) -> Vec<(u64, u64)> {
        let hole = |op: &Op| match op {
            Op::Zero { offset, len } => Some((*offset, *len)),
            _ => None,
        };
        self.data.inner.log().iter().filter_map(hole).collect()
    }

    /// Every cluster shows its value, here and to qemu-img.
    fn close(self, values: [u8; 4]) {
        let expected: Vec<u8> = values
            .iter()
            .flat_map(|value| vec![*value; CLUSTER as usize])
            .collect();
        assert_same(
            &support::read(&*self.image, 0, expected.len()).expect("reads"),
            &expected,
            "ours",
        );
        drop(self.image);
        let path = self.scratch.path("top");
        for (name, file) in [("top", &self.file), ("data", &self.data)] {
            let left = file.inner.after_process_death(file.inner.position());
            std::fs::write(self.scratch.path(name), left).expect("writes");
        }
        check_clean(&path);
        assert_same(
            &support::qemu_contents(&path, &[])[..expected.len()],
            &expected,
            "QEMU's",
        );
    }
}

fn a_barrier_stands_between_drop_and_hole() {
    let external = External::new();
    let image = &*external.image;
    image.discard(0, 2 * CLUSTER).expect("discards");
    image.write_zeroes(3 * CLUSTER, CLUSTER, true).expect("clears");
    let dropped = external.file.inner.position();
    // Mapped again before there was a hole: there must be none.
    write(image, CLUSTER + 512, &[2; 512]).expect("writes");
    write(image, CLUSTER, &vec![2; CLUSTER as usize]).expect("writes");
    assert_eq!(external.holes(), [], "no barrier yet");
    let file = Arc::clone(&external.file);
    *external.data.before_zero.lock().expect("nobody panicked") = Some(Box::new(move || {
        let is_barrier = |op: &Op| matches!(op, Op::Barrier);
        let stands = file.inner.log()[dropped..].iter().any(is_barrier);
        assert!(stands, "a hole before the barrier");
    }));
    image.flush().expect("flushes");
    assert_eq!(external.holes(), [(0, CLUSTER), (3 * CLUSTER, CLUSTER)]);
    image.flush().expect("flushes");
    assert_eq!(external.holes().len(), 2, "once is enough");
    external.close([0, 2, 1, 0]);
}

/// What was mapped and dropped again while the barrier ran may be mapped after a crash.
fn a_cluster_that_was_dropped_twice_waits_for_the_second_barrier() {
    let external = External::new();
    let image = &*external.image;
    let other_queue = Arc::clone(&external.image);
    *external.file.after_sync.lock().expect("nobody panicked") = Some(Box::new(move || {
        write(&*other_queue, 0, &[3; 512]).expect("writes");
        other_queue.discard(0, 2 * CLUSTER).expect("discards");
    }));
    image.discard(0, CLUSTER).expect("discards");
    image.flush().expect("flushes");
    assert_eq!(external.holes(), [], "that drop is not durable");
    image.flush().expect("flushes");
    assert_eq!(external.holes(), [(0, 2 * CLUSTER)]);
    external.close([0, 0, 1, 1]);
}

/// A write that comes while the hole is made is not lost in it.
fn nothing_is_written_where_a_hole_is_being_made() {
    let external = External::new();
    let image = &*external.image;
    image.discard(0, 2 * CLUSTER).expect("discards");
    let other_queue = Arc::clone(&external.image);
    let (begun, has_begun) = mpsc::channel();
    *external.data.before_zero.lock().expect("nobody panicked") = Some(Box::new(move || {
        let (told, done) = mpsc::channel();
        std::thread::spawn(move || {
            write(&*other_queue, CLUSTER, &vec![4; CLUSTER as usize]).expect("writes");
            // The image is closed by whoever lets go of it last.
            drop(other_queue);
            told.send(()).ok();
        });
        // It cannot end before the hole is made.
        let early = done.recv_timeout(Duration::from_millis(200));
        begun.send((done, early.is_ok())).expect("is waited for");
    }));
    image.flush().expect("flushes");
    let (done, early) = has_begun.try_recv().expect("a hole was made");
    assert!(!early, "it did not wait");
    done.recv_timeout(DEADLINE).expect("the write ends");
    assert_eq!(external.holes(), [(0, 2 * CLUSTER)]);
    external.close([0, 4, 1, 1]);
}

fn the_host_gets_space_of_an_external_data_file_back() {
    let scratch = Scratch::new();
    let (path, data) = (scratch.path("top"), scratch.path("data"));
    create(&path, &format!("data_file={}", text(&data)), "64M");
    let options = OpenOptions {
        data_file: Some(Arc::new(support::fd(&data, true))),
        ..OpenOptions::default()
    };
    let image = support::open_with(&[(&path, Format::Qcow2)], &options).expect("opens");
    write(&*image, 0, &vec![1; 8 << 20]).expect("writes");
    image.flush().expect("flushes");
    let used = || std::fs::metadata(&data).expect("is there").blocks() * 512;
    assert!(used() >= 8 << 20);
    assert!(image.can_discard());
    image.discard(0, 4 << 20).expect("discards");
    image.write_zeroes(4 << 20, 3 << 20, true).expect("clears");
    image.flush().expect("flushes");
    assert!(used() < 2 << 20, "{} bytes are in use", used());
    drop(image);
    check_clean(&path);
}

crate::suite! {
    with_qemu_img: [
        a_barrier_stands_between_drop_and_reuse,
        a_drop_during_the_barrier_waits_for_the_next,
        io_in_flight_by_another_mapping_keeps_it_too,
        io_in_flight_keeps_its_cluster,
        a_barrier_stands_between_drop_and_hole,
        a_cluster_that_was_dropped_twice_waits_for_the_second_barrier,
        nothing_is_written_where_a_hole_is_being_made,
        the_host_gets_space_of_an_external_data_file_back,
    ],
    alone: [],
}
