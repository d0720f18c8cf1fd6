//! What each queue has done, for whoever runs the process: totals in the log, Prometheus' text format on
//! request.

use crate::io::Direction;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a request asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    /// GET_ID, and what is no request.
    Other,
}

impl From<Direction> for Operation {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Read => Self::Read,
            Direction::Write => Self::Write,
        }
    }
}

const OPERATIONS: [(Operation, &str); 6] = [
    (Operation::Read, "read"),
    (Operation::Write, "write"),
    (Operation::Flush, "flush"),
    (Operation::Discard, "discard"),
    (Operation::WriteZeroes, "write_zeroes"),
    (Operation::Other, "other"),
];

/// The histogram's buckets end at 4^0, 4^1 and so on to 4^11 microseconds (4.2 s); one more has no end.
const BUCKETS: usize = 12;

/// Up to so many queues have a histogram each. More have one together, or their text would be longer than
/// [`MAX_SAID`](vm_spec::client::MAX_SAID).
const MOST_HISTOGRAMS: usize = 16;

/// One queue's counters, on cache lines of their own. Only the queue's thread writes them; reads are not
/// synchronised with each other.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct QueueCounters {
    operations: [AtomicU64; OPERATIONS.len()],
    bytes: [AtomicU64; OPERATIONS.len()],
    errors: AtomicU64,
    latency: [AtomicU64; BUCKETS + 1],
    /// Sum of all latencies, in nanoseconds.
    waited: AtomicU64,
    /// Requests that wait for the host to be able again (`--on-error=stop`).
    stopped: AtomicU64,
}

/// One writer: no other addition is lost.
fn add(counter: &AtomicU64, amount: u64) {
    let sum = counter.load(Ordering::Relaxed).wrapping_add(amount);
    counter.store(sum, Ordering::Relaxed);
}

/// The first bucket that a latency lies in.
fn bucket(latency: Duration) -> usize {
    let micros = u64::try_from(latency.as_nanos().div_ceil(1000)).unwrap_or(u64::MAX);
    let bits = u64::BITS - micros.saturating_sub(1).leading_zeros();
    (bits.div_ceil(2) as usize).min(BUCKETS)
}

impl QueueCounters {
    /// A request was completed, `latency` after it was taken.
    pub(crate) fn completed(&self, operation: Operation, bytes: usize, failed: bool, latency: Duration) {
        add(&self.operations[operation as usize], 1);
        if failed {
            add(&self.errors, 1);
        } else {
            add(&self.bytes[operation as usize], bytes as u64);
        }
        add(&self.latency[bucket(latency)], 1);
        add(
            &self.waited,
            u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX),
        );
    }

    /// So many requests wait for the host.
    pub(crate) fn set_stopped(&self, requests: usize) {
        self.stopped.store(requests as u64, Ordering::Relaxed);
    }

    fn log(&self, queue: usize) {
        let of = |operation| self.operations[operation as usize].load(Ordering::Relaxed);
        let bytes = |operation| self.bytes[operation as usize].load(Ordering::Relaxed);
        tracing::info!(
            queue,
            reads = of(Operation::Read),
            read_bytes = bytes(Operation::Read),
            writes = of(Operation::Write),
            written_bytes = bytes(Operation::Write),
            flushes = of(Operation::Flush),
            discards = of(Operation::Discard),
            write_zeroes = of(Operation::WriteZeroes),
            errors = self.errors.load(Ordering::Relaxed),
            "totals"
        );
    }

    fn write_samples(&self, text: &mut String, family: Family, queue: usize) {
        let mut sample = |name: &str, labels: &str, value: u64| {
            let _ = writeln!(text, "bulkhead_blk_{name}{{queue=\"{queue}\"{labels}}} {value}");
        };
        match family {
            Family::Operations | Family::Bytes => {
                for (operation, name) in OPERATIONS {
                    let counters = match family {
                        Family::Bytes => &self.bytes,
                        _ => &self.operations,
                    };
                    let value = counters[operation as usize].load(Ordering::Relaxed);
                    sample(family.name(), &format!(",op=\"{name}\""), value);
                }
            }
            Family::Errors => sample(family.name(), "", self.errors.load(Ordering::Relaxed)),
            Family::Stopped => sample(family.name(), "", self.stopped.load(Ordering::Relaxed)),
            Family::Latency => write_histogram(text, &format!("queue=\"{queue}\""), &[self]),
        }
    }
}

/// The latencies of all requests of `queues`; `label` says whose they are.
fn write_histogram(text: &mut String, label: &str, queues: &[&QueueCounters]) {
    let total = |of: &dyn Fn(&QueueCounters) -> &AtomicU64| {
        let each = queues.iter().map(|queue| of(queue).load(Ordering::Relaxed));
        each.fold(0, u64::wrapping_add)
    };
    let comma = if label.is_empty() { "" } else { "," };
    let mut sum = 0_u64;
    for index in 0..=BUCKETS {
        sum = sum.wrapping_add(total(&|queue| &queue.latency[index]));
        let end = match index {
            BUCKETS => "+Inf".to_owned(),
            _ => (4_f64.powi(index as i32) / 1e6).to_string(),
        };
        let _ = writeln!(
            text,
            "bulkhead_blk_latency_seconds_bucket{{{label}{comma}le=\"{end}\"}} {sum}"
        );
    }
    let labels = match label {
        "" => String::new(),
        label => format!("{{{label}}}"),
    };
    let seconds = Duration::from_nanos(total(&|queue| &queue.waited)).as_secs_f64();
    let _ = writeln!(
        text,
        "bulkhead_blk_latency_seconds_count{labels} {sum}\nbulkhead_blk_latency_seconds_sum{labels} {seconds}"
    );
}

/// The metrics; the format wants all samples of one together.
#[derive(Clone, Copy)]
enum Family {
    Operations,
    Bytes,
    Errors,
    Stopped,
    Latency,
}

impl Family {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Operations, "counter"),
        (Self::Bytes, "counter"),
        (Self::Errors, "counter"),
        (Self::Stopped, "gauge"),
        (Self::Latency, "histogram"),
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Operations => "operations_total",
            Self::Bytes => "bytes_total",
            Self::Errors => "errors_total",
            Self::Stopped => "stopped_requests",
            Self::Latency => "latency_seconds",
        }
    }
}

/// The counters of all queues.
#[derive(Clone, Debug)]
pub(crate) struct Counters(Vec<Arc<QueueCounters>>);

impl Counters {
    pub(crate) fn new(queues: u16) -> Self {
        Self((0..queues).map(|_| Arc::default()).collect())
    }

    pub(crate) fn queues(&self) -> &[Arc<QueueCounters>] {
        &self.0
    }

    /// One line a queue that did anything.
    pub(crate) fn log(&self) {
        for (index, queue) in self.0.iter().enumerate() {
            if queue.operations.iter().any(|n| n.load(Ordering::Relaxed) > 0) {
                queue.log(index);
            }
        }
    }

    /// Prometheus' text format; shorter than [`MAX_SAID`](vm_spec::client::MAX_SAID) with what ends it, for the most
    /// queues that there can be.
    pub(crate) fn prometheus(&self, capacity: u64) -> String {
        let mut text =
            format!("# TYPE bulkhead_blk_capacity_bytes gauge\nbulkhead_blk_capacity_bytes {capacity}\n");
        for (family, kind) in Family::ALL {
            let _ = writeln!(text, "# TYPE bulkhead_blk_{} {kind}", family.name());
            if matches!(family, Family::Latency) && self.0.len() > MOST_HISTOGRAMS {
                let all: Vec<_> = self.0.iter().map(|queue| &**queue).collect();
                write_histogram(&mut text, "", &all);
                continue;
            }
            for (index, queue) in self.0.iter().enumerate() {
                queue.write_samples(&mut text, family, index);
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_spec::client::MAX_SAID;

    #[test]
    fn a_latency_lies_in_the_first_bucket_that_ends_at_or_behind_it() {
        for (nanos, expected) in [
            (0, 0),
            (1000, 0),
            (1001, 1),
            (4000, 1),
            (4001, 2),
            (16_000, 2),
            (16_001, 3),
            (4_194_304_000, 11),
            (4_194_304_001, 12),
            (u64::MAX, 12),
        ] {
            assert_eq!(bucket(Duration::from_nanos(nanos)), expected, "{nanos} ns");
        }
    }

    #[test]
    fn the_text_has_every_sample_and_is_bounded() {
        let counters = Counters::new(2);
        let queue = &counters.queues()[1];
        queue.completed(Operation::Read, 4096, false, Duration::from_micros(3));
        queue.completed(Operation::Write, 512, true, Duration::from_secs(9));
        let text = counters.prometheus(1 << 20);
        for line in [
            "bulkhead_blk_capacity_bytes 1048576",
            "# TYPE bulkhead_blk_operations_total counter",
            "bulkhead_blk_operations_total{queue=\"0\",op=\"read\"} 0",
            "bulkhead_blk_operations_total{queue=\"1\",op=\"write\"} 1",
            "bulkhead_blk_bytes_total{queue=\"1\",op=\"read\"} 4096",
            "bulkhead_blk_bytes_total{queue=\"1\",op=\"write\"} 0",
            "bulkhead_blk_errors_total{queue=\"1\"} 1",
            "bulkhead_blk_latency_seconds_bucket{queue=\"1\",le=\"0.000001\"} 0",
            "bulkhead_blk_latency_seconds_bucket{queue=\"1\",le=\"0.000004\"} 1",
            "bulkhead_blk_latency_seconds_bucket{queue=\"1\",le=\"4.194304\"} 1",
            "bulkhead_blk_latency_seconds_bucket{queue=\"1\",le=\"+Inf\"} 2",
            "bulkhead_blk_latency_seconds_count{queue=\"1\"} 2",
            "bulkhead_blk_latency_seconds_sum{queue=\"1\"} 9.000003",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        for queues in [1, MOST_HISTOGRAMS as u16, MOST_HISTOGRAMS as u16 + 1, 32] {
            let most = Counters::new(queues);
            for queue in most.queues() {
                let all = queue.operations.iter().chain(&queue.bytes).chain(&queue.latency);
                for counter in all.chain([&queue.errors, &queue.waited, &queue.stopped]) {
                    counter.store(u64::MAX, Ordering::Relaxed);
                }
            }
            // With the order's number and the last line.
            assert!(most.prometheus(u64::MAX).len() + 64 < MAX_SAID, "{queues} queues");
        }
    }

    #[test]
    fn many_queues_have_one_histogram() {
        let counters = Counters::new(32);
        for queue in counters.queues() {
            queue.completed(Operation::Read, 512, false, Duration::from_secs(1));
        }
        let text = counters.prometheus(1 << 20);
        for line in [
            "bulkhead_blk_latency_seconds_bucket{le=\"0.000001\"} 0",
            "bulkhead_blk_latency_seconds_bucket{le=\"+Inf\"} 32",
            "bulkhead_blk_latency_seconds_count 32",
            "bulkhead_blk_latency_seconds_sum 32",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
