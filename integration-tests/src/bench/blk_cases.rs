//! What is measured, and what it must reach.

use super::blk_driver::{Operation, Pattern, Work};
use super::blk_peer::{Contender, Format, Program};

/// Where images lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    Tmpfs,
    Disk,
}

/// What the image holds before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Content {
    /// Data everywhere.
    Full,
    /// Data everywhere, and nothing of it in the page cache when a turn begins.
    Cold,
    /// Nothing: every cluster is allocated on its first write.
    Empty,
}

/// One line of the table.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) place: Place,
    pub(super) content: Content,
    pub(super) contender: Contender,
    pub(super) baseline: Contender,
    pub(super) work: Work,
    /// The rate must be at least so many times the baseline's.
    pub(super) goal: f64,
    /// CPU time of a request, at most so many times the baseline's; none where it says nothing.
    pub(super) cpu_goal: Option<f64>,
}

impl Case {
    /// A bare loop over the file does the same work.
    pub(super) fn has_floor(&self) -> bool {
        self.contender.format == Format::Raw
            && !self.contender.direct
            && self.content == Content::Full
            && self.work.flush_every == 0
    }
}

const BLOCK: u64 = 4096;
/// CPU time an operation beside qemu-storage-daemon.
const CPU_GOAL: f64 = 0.6;

fn contender(program: Program, format: Format) -> Contender {
    Contender {
        program,
        format,
        queues: 1,
        direct: false,
    }
}

fn work(operation: Operation, pattern: Pattern, block: u64, depth: u16, span: u64) -> Work {
    Work {
        operation,
        pattern,
        block,
        depth,
        span,
        flush_every: 0,
    }
}

const OPERATIONS: [(Operation, &str); 2] = [(Operation::Read, "read"), (Operation::Write, "write")];

/// Every case, for images of `size` bytes; `large` is the size of the sparse ones.
pub(super) fn all(size: u64, large: u64) -> Vec<Case> {
    let mut cases = Vec::new();
    for format in [Format::Raw, Format::Qcow2] {
        for (operation, verb) in OPERATIONS {
            let small = |depth| work(operation, Pattern::Random, BLOCK, depth, size);
            let name = |what: &str| format!("{} {what} {verb}", format.name());
            cases.push(against_qemu(
                name("4 KiB random, depth 32"),
                format,
                small(32),
                2.0,
            ));
            cases.push(against_qemu(name("4 KiB random, depth 1"), format, small(1), 1.3));
            let sequential = work(operation, Pattern::Sequential, 1 << 20, 4, size);
            cases.push(against_qemu(name("1 MiB sequential"), format, sequential, 1.0));
        }
    }
    for (operation, verb) in OPERATIONS {
        let work = work(operation, Pattern::Random, BLOCK, 32, size);
        cases.push(Case {
            name: format!("qcow2 beside our raw, 4 KiB, depth 32 {verb}"),
            baseline: contender(Program::Ours, Format::Raw),
            cpu_goal: None,
            ..against_qemu(String::new(), Format::Qcow2, work, 0.9)
        });
        let four = |queues| Contender {
            queues,
            ..contender(Program::Ours, Format::Raw)
        };
        cases.push(Case {
            name: format!("raw four queues beside one {verb}"),
            contender: four(4),
            baseline: four(1),
            cpu_goal: None,
            ..against_qemu(String::new(), Format::Raw, work, 1.7)
        });
    }
    cases.push(Case {
        name: "qcow2 of 4 TiB, first writes, tmpfs".to_owned(),
        content: Content::Empty,
        ..against_qemu(
            String::new(),
            Format::Qcow2,
            work(Operation::Write, Pattern::Clusters, BLOCK, 32, 4 << 40),
            1.5,
        )
    });
    allocating(&mut cases, large);
    direct(&mut cases, size);
    cold(&mut cases, size);
    durable(&mut cases, size);
    cases
}

fn against_qemu(name: String, format: Format, work: Work, goal: f64) -> Case {
    Case {
        name,
        place: Place::Tmpfs,
        content: Content::Full,
        contender: contender(Program::Ours, format),
        baseline: contender(Program::Qemu, format),
        work,
        goal,
        cpu_goal: Some(CPU_GOAL),
    }
}

fn allocating(cases: &mut Vec<Case>, large: u64) {
    let work = work(Operation::Write, Pattern::Clusters, BLOCK, 32, large);
    let first = Case {
        content: Content::Empty,
        ..against_qemu("qcow2 first writes, tmpfs".to_owned(), Format::Qcow2, work, 1.5)
    };
    cases.push(Case {
        name: "qcow2 first writes, disk, FLUSH every 64".to_owned(),
        place: Place::Disk,
        work: Work {
            flush_every: 64,
            ..work
        },
        ..first.clone()
    });
    cases.push(first);
}

fn direct(cases: &mut Vec<Case>, size: u64) {
    let formats = [Format::Raw, Format::Qcow2];
    for (format, (operation, verb)) in formats
        .into_iter()
        .flat_map(|format| OPERATIONS.map(|of| (format, of)))
    {
        let case = against_qemu(
            format!("{} O_DIRECT, disk, depth 32 {verb}", format.name()),
            format,
            work(operation, Pattern::Random, BLOCK, 32, size),
            1.0,
        );
        let direct = |contender| Contender {
            direct: true,
            ..contender
        };
        cases.push(Case {
            place: Place::Disk,
            contender: direct(case.contender),
            baseline: direct(case.baseline),
            ..case
        });
    }
}

/// Through the page cache, which holds nothing: each read waits for the disk.
fn cold(cases: &mut Vec<Case>, size: u64) {
    for format in [Format::Raw, Format::Qcow2] {
        let work = work(Operation::Read, Pattern::Random, BLOCK, 32, size);
        let name = format!("{} not in the page cache, disk, depth 32 read", format.name());
        cases.push(Case {
            place: Place::Disk,
            content: Content::Cold,
            ..against_qemu(name, format, work, 1.0)
        });
    }
}

/// What a database does: random writes, and flushes between them.
fn durable(cases: &mut Vec<Case>, size: u64) {
    for format in [Format::Raw, Format::Qcow2] {
        for (depth, flush_every) in [(32, 64), (1, 2)] {
            let work = work(Operation::Write, Pattern::Random, BLOCK, depth, size);
            let name = format!(
                "{} 4 KiB random, FLUSH every {flush_every}, disk, depth {depth} write",
                format.name()
            );
            cases.push(Case {
                place: Place::Disk,
                work: Work { flush_every, ..work },
                ..against_qemu(name, format, work, 1.0)
            });
        }
    }
}
