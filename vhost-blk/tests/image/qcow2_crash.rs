//! Both models of a crash: every write and barrier of a random workload is recorded; prefixes and
//! reorderings of them are replayed. Then `qemu-img check` finds leaks at most, and what qemu-img reads is
//! what a completed flush (host) or a completed write (process) covered, or something newer.

use crate::support;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::support::recorder::{Op, Recorder};
use crate::support::{
    Random, Request, Scratch, check_leaks_at_most, contents, create, full, qemu_contents, qemu_img, text,
};
use vhost_blk::image::qcow2::{self, Progress, Repair};
use vhost_blk::image::{BlockFile, Format, Image, OpenOptions, open_layers};

const SECTOR: usize = 512;

/// A request that ran: the logs' length before and after, what it may have changed, and the disk after.
struct Event {
    begin: usize,
    end: usize,
    sectors: std::ops::Range<usize>,
    after: Vec<u8>,
    flush: bool,
}

fn uniform(disk: &[u8]) -> Vec<u8> {
    disk.chunks(SECTOR)
        .map(|sector| {
            assert!(
                sector[1..] == sector[..SECTOR - 1],
                "the test writes whole sectors of one value"
            );
            sector[0]
        })
        .collect()
}

/// Runs random requests on `image` and notes what each did.
fn workload(
    image: &dyn Image,
    recorder: &Recorder,
    model: &mut [u8],
    random: &mut Random,
    steps: u64,
) -> Vec<Event> {
    let mut events = Vec::new();
    for step in 0..steps {
        let size = model.len() as u64;
        let request = support::random_request(random, size, 100 << 10, (step as u8).wrapping_mul(2) | 1);
        let sectors = match &request {
            Request::Write { offset, bytes } => {
                *offset as usize / SECTOR..(*offset as usize + bytes.len()) / SECTOR
            }
            Request::Discard { offset, len } | Request::Zero { offset, len, .. } => {
                *offset as usize / SECTOR..(offset + len) as usize / SECTOR
            }
            _ => 0..0,
        };
        let begin = recorder.moment();
        request.run(image, model);
        let flush = matches!(request, Request::Flush);
        events.push(Event {
            begin,
            end: recorder.moment(),
            sectors,
            after: uniform(model),
            flush,
        });
    }
    events
}

/// Values that a sector may have: a bit for each.
#[derive(Clone, Copy, Default)]
struct Values([u128; 2]);

impl Values {
    fn only(value: u8) -> Self {
        let mut values = Self::default();
        values.insert(value);
        values
    }

    fn insert(&mut self, value: u8) {
        self.0[usize::from(value >> 7)] |= 1 << (value & 127);
    }

    fn contains(self, value: u8) -> bool {
        self.0[usize::from(value >> 7)] >> (value & 127) & 1 == 1
    }
}

impl std::fmt::Debug for Values {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set()
            .entries((0..=255).filter(|value| self.contains(*value)))
            .finish()
    }
}

/// Values that each sector may have, if all before event `base` is certain and the log ends at `count`.
fn allowed(events: &[Event], start: &[u8], base: Option<usize>, count: usize) -> Vec<Values> {
    let certain = base.map_or(start, |at| &events[at].after);
    let mut values: Vec<Values> = certain.iter().map(|value| Values::only(*value)).collect();
    let first = base.map_or(0, |at| at + 1);
    for event in events[first..].iter().take_while(|event| event.begin < count) {
        for sector in event.sectors.clone() {
            values[sector].insert(event.after[sector]);
        }
    }
    values
}

/// qemu-img finds leaks at most, and reads what is allowed.
fn judge(path: &Path, values: &[Values], what: &str) {
    if let Err(found) = check_leaks_at_most(path) {
        panic!("{what}: {found}");
    }
    compare(&qemu_contents(path, &[]), values, what);
}

fn compare(disk: &[u8], values: &[Values], what: &str) {
    for (sector, (data, values)) in disk.chunks(SECTOR).zip(values).enumerate() {
        let good = values.contains(data[0]) && data[1..] == data[..SECTOR - 1];
        assert!(
            good,
            "{what}: sector {sector} has {:#x}, expected one of {values:x?}",
            data[0]
        );
    }
}

/// With `--full` a crash is tried after each of so many operations, and at a few moments later on.
const EACH: usize = 100;

/// Lengths of the log, of at most `total`, at which a crash is tried.
fn points(total: usize, random: &mut Random) -> Vec<usize> {
    let each = if full() { EACH.min(total) + 1 } else { 0 };
    let later = (0..8).map(|_| random.below(total as u64 + 1) as usize);
    (0..each).chain(later).collect()
}

/// Orders in which a crash of the host keeps what was not flushed, at each point.
fn orders() -> u64 {
    if full() { 3 } else { 1 }
}

struct Case<'a> {
    path: &'a Path,
    below: Option<(&'a Path, Format)>,
    /// The external data file.
    data: Option<&'a Path>,
    start: Vec<u8>,
    seed: u64,
    steps: u64,
}

/// The recorded files.
struct Files {
    image: Arc<Recorder>,
    data: Option<Arc<Recorder>>,
}

impl Case<'_> {
    /// Opens what lies in the files, as a recording.
    fn open(&self) -> (Arc<dyn Image>, Files) {
        let image = Recorder::new(contents(self.path));
        let data = self.data.map(|path| Arc::new(image.beside(contents(path))));
        let image = Arc::new(image);
        let mut layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(Format::Qcow2, image.clone())];
        if let Some((below, format)) = self.below {
            layers.push((
                format,
                Arc::new(vhost_blk::image::HostFile::new(support::fd(below, false)).unwrap()),
            ));
        }
        let given = data.clone().map(|data| data as Arc<dyn BlockFile>);
        let opened = open_layers(layers, given, &OpenOptions::default());
        let files = Files { image, data };
        (opened.unwrap_or_else(|error| panic!("{error:?}")), files)
    }

    /// Puts what a crash leaves into the files.
    fn leave(&self, files: &Files, mut left: impl FnMut(&Recorder) -> Vec<u8>) {
        fs::write(self.path, left(&files.image)).expect("writes");
        if let (Some(path), Some(recorder)) = (self.data, &files.data) {
            fs::write(path, left(recorder)).expect("writes");
        }
    }

    fn run(self) {
        let mut model = self.start.clone();
        let start = uniform(&model);
        let mut random = Random::new(self.seed);
        let (image, files) = self.open();
        let events = workload(&*image, &files.image, &mut model, &mut random, self.steps);
        drop(image);
        assert!(files.image.log().iter().any(|op| matches!(op, Op::Barrier)));
        let total = files.image.moment();
        for count in points(total, &mut random) {
            let flushed = events.iter().rposition(|event| event.flush && event.end <= count);
            let values = allowed(&events, &start, flushed, count);
            for order in 0..orders() {
                self.leave(&files, |file| {
                    file.after_host_crash(file.count_at(count), &mut random)
                });
                let what = format!("host crash after {count} of {total}, order {order}");
                self.judge_alone(&values, &what);
                // To start qemu-img takes longer than all the rest.
                if order == 0 {
                    judge(self.path, &values, &what);
                }
            }
            let completed = events.iter().rposition(|event| event.end <= count);
            self.leave(&files, |file| file.after_process_death(file.count_at(count)));
            let values = allowed(&events, &start, completed, count);
            let what = format!("process death after {count} of {total}");
            judge(self.path, &values, &what);
            self.go_on(&mut random);
        }
        self.leave(&files, |file| file.after_process_death(file.count_at(total)));
        support::check_clean(self.path);
    }

    /// Our own check finds leaks at most, and who opens the image reads what is allowed.
    fn judge_alone(&self, values: &[Values], what: &str) {
        let (image, files) = self.open();
        compare(
            &support::read(&*image, 0, self.start.len()).expect("reads"),
            values,
            what,
        );
        drop(image);
        let found = qcow2::check(&*files.image, Repair::No, &Progress::untold()).expect("checks");
        assert_eq!((found.corruptions, &found.broken), (0, &None), "{what}");
    }

    /// The successor can write to what the dead process left.
    fn go_on(&self, random: &mut Random) {
        let (image, files) = self.open();
        let mut model = support::read(&*image, 0, self.start.len()).expect("reads");
        workload(&*image, &files.image, &mut model, random, 10);
        drop(image);
        let values: Vec<_> = uniform(&model).into_iter().map(Values::only).collect();
        self.leave(&files, |file| file.after_process_death(file.position()));
        self.judge_alone(&values, "the successor");
        if !full() {
            judge(self.path, &values, "the successor");
        }
    }
}

/// Some data in 512-byte sectors of one value each.
fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|at| (at / SECTOR * 5 + 2) as u8 & 0xfe).collect()
}

const SIZE: usize = 2 << 20;

/// Bytes of the disk: with `--full` few clusters, such that a crash after each operation can be tried.
fn size(options: &str) -> usize {
    let cluster = options
        .split(',')
        .find_map(|option| option.strip_prefix("cluster_size="));
    let cluster = match cluster.map(|size| (size.trim_end_matches('k'), size.ends_with('k'))) {
        Some((number, kibi)) => number.parse::<usize>().expect("a number") << if kibi { 10 } else { 0 },
        None => 64 << 10,
    };
    if full() { SIZE.min(128 * cluster) } else { SIZE }
}

fn plain_images() {
    for (seed, options) in [
        "compat=1.1",
        "compat=0.10,cluster_size=4k",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=4k,refcount_bits=1",
        "lazy_refcounts=on",
    ]
    .iter()
    .enumerate()
    {
        eprintln!("{options}");
        let scratch = Scratch::new();
        let path = scratch.path("top");
        create(&path, options, &size(options).to_string());
        let start = vec![0; size(options)];
        Case {
            path: &path,
            below: None,
            data: None,
            start,
            seed: seed as u64 + 1,
            steps: 60,
        }
        .run();
    }
}

fn overlays() {
    for (seed, options) in [
        "compat=1.1",
        "compat=0.10,cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
    ]
    .iter()
    .enumerate()
    {
        eprintln!("{options}");
        let scratch = Scratch::new();
        let (path, below) = (scratch.path("top"), scratch.path("below"));
        fs::write(&below, pattern(size(options))).expect("writes");
        create(
            &path,
            &format!("{options},backing_file={},backing_fmt=raw", text(&below)),
            &size(options).to_string(),
        );
        Case {
            path: &path,
            below: Some((&below, Format::Raw)),
            data: None,
            start: pattern(size(options)),
            seed: seed as u64 + 100,
            steps: 60,
        }
        .run();
    }
}

fn compressed_and_snapshot_images() {
    for (seed, options) in ["compression_type=zlib", "compression_type=zstd,cluster_size=4k"]
        .iter()
        .enumerate()
    {
        eprintln!("{options}");
        let scratch = Scratch::new();
        let (path, raw) = (scratch.path("top"), scratch.path("raw"));
        fs::write(&raw, pattern(size(options))).expect("writes");
        qemu_img(&[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-c",
            "-o",
            options,
            text(&raw),
            text(&path),
        ]);
        qemu_img(&["snapshot", "-c", "one", text(&path)]);
        Case {
            path: &path,
            below: None,
            data: None,
            start: pattern(size(options)),
            seed: seed as u64 + 200,
            steps: 60,
        }
        .run();
        assert!(
            qemu_contents(&path, &["-l", "snapshot.name=one"]) == pattern(size(options)),
            "the snapshot has changed"
        );
    }
}

fn external_data_files() {
    for (seed, options) in [
        "data_file_raw=off",
        "data_file_raw=off,cluster_size=4k",
        "data_file_raw=off,cluster_size=16k,extended_l2=on",
        "data_file_raw=on,cluster_size=4k",
    ]
    .iter()
    .enumerate()
    {
        eprintln!("{options}");
        let scratch = Scratch::new();
        let (path, data) = (scratch.path("top"), scratch.path("data"));
        create(
            &path,
            &format!("{options},data_file={}", text(&data)),
            &size(options).to_string(),
        );
        Case {
            path: &path,
            below: None,
            data: Some(&data),
            start: vec![0; size(options)],
            seed: seed as u64 + 300,
            steps: 100,
        }
        .run();
    }
}

/// Whoever dies in the middle, the file itself and what qemu-img reads through the image are the same.
fn a_raw_data_file_is_zeroed_before_its_image_says_so() {
    let scratch = Scratch::new();
    let (path, data) = (scratch.path("top"), scratch.path("data"));
    create(
        &path,
        &format!("data_file_raw=on,cluster_size=4k,data_file={}", text(&data)),
        &SIZE.to_string(),
    );
    let case = Case {
        path: &path,
        below: None,
        data: Some(&data),
        start: vec![0; SIZE],
        seed: 0,
        steps: 0,
    };
    let (image, files) = case.open();
    let mut model = vec![0; SIZE];
    let bytes = pattern(256 << 10);
    Request::Write { offset: 0, bytes }.run(&*image, &mut model);
    let len = 64 << 10;
    for (n, unmap) in [(0, Some(true)), (1, Some(false)), (2, None)] {
        let offset = n * len;
        let begin = files.image.moment();
        match unmap {
            Some(unmap) => Request::Zero { offset, len, unmap },
            None => Request::Discard { offset, len },
        }
        .run(&*image, &mut model);
        for count in begin..=files.image.moment() {
            case.leave(&files, |file| file.after_process_death(file.count_at(count)));
            let (raw, read) = (contents(&data), qemu_contents(&path, &[]));
            support::assert_same(&raw[..SIZE], &read, &format!("{unmap:?}, {count} from {begin}"));
        }
    }
    drop(image);
}

crate::suite! {
    with_qemu_img: [
        plain_images,
        overlays,
        compressed_and_snapshot_images,
        external_data_files,
        a_raw_data_file_is_zeroed_before_its_image_says_so,
    ],
    alone: [],
}
