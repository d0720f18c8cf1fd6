//! What passed and what was dropped, and why: bounded logging of what a guest can trigger.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a frame did not pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Drop {
    /// The virtio-net header is missing or does not fit the frame.
    Header,
    /// The guest used an address that is not its own.
    Guard,
    /// The kernel refused the frame, or the interface is down or gone.
    Interface,
    /// The guest's buffer is too small for the frame, or its chain has too many segments.
    Buffer,
    /// The frame is longer than the MTU that the guest was told.
    Mtu,
}

/// With its name in metrics.
const REASONS: [(Drop, &str); 5] = [
    (Drop::Header, "header"),
    (Drop::Guard, "guard"),
    (Drop::Interface, "interface"),
    (Drop::Buffer, "buffer"),
    (Drop::Mtu, "mtu"),
];

/// What one queue passed and nobody counted yet.
#[derive(Clone, Copy, Default, Debug)]
pub struct Batch {
    frames: u64,
    bytes: u64,
}

impl Batch {
    /// A frame of `bytes` passed.
    pub fn passed(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes += bytes as u64;
    }
}

/// Counters of one direction. Reads are not synchronised with each other.
#[derive(Debug, Default)]
pub struct Direction {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: [AtomicU64; REASONS.len()],
}

impl Direction {
    /// Adds what passed since the last call. Queues share these counters: once a batch, not once a frame.
    pub fn add(&self, batch: &mut Batch) {
        let Batch { frames, bytes } = std::mem::take(batch);
        if frames > 0 {
            self.frames.fetch_add(frames, Ordering::Relaxed);
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// A frame was dropped. Says so in the log the 1st, 2nd, 4th, 8th and so on time.
    pub fn dropped(&self, reason: Drop, why: &dyn std::fmt::Display) {
        let count = self.dropped[reason as usize].fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            tracing::warn!(?reason, count, "frame dropped: {why}");
        }
    }

    /// Frames that passed.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Frames dropped for `reason`.
    #[must_use]
    pub fn drops(&self, reason: Drop) -> u64 {
        self.dropped[reason as usize].load(Ordering::Relaxed)
    }

    /// Bytes of frames that passed, without their virtio-net headers.
    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn log(&self, direction: &str) {
        tracing::info!(
            direction,
            frames = self.frames(),
            bytes = self.bytes(),
            dropped_header = self.drops(Drop::Header),
            dropped_guard = self.drops(Drop::Guard),
            dropped_interface = self.drops(Drop::Interface),
            dropped_buffer = self.drops(Drop::Buffer),
            dropped_mtu = self.drops(Drop::Mtu),
            "totals"
        );
    }
}

/// Counters of all queues.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the TAP to the guest.
    pub receive: Direction,
    /// From the guest to the TAP.
    pub transmit: Direction,
}

impl Counters {
    /// One line for each direction.
    pub fn log(&self) {
        for (name, direction) in self.directions() {
            direction.log(name);
        }
    }

    fn directions(&self) -> [(&'static str, &Direction); 2] {
        [("receive", &self.receive), ("transmit", &self.transmit)]
    }

    /// Prometheus' text format, a few lines; what the guest receives is `receive`.
    #[must_use]
    pub fn prometheus(&self, link_up: bool) -> String {
        let up = u8::from(link_up);
        let mut text = format!("# TYPE bulkhead_net_link_up gauge\nbulkhead_net_link_up {up}\n");
        // Writing to a String cannot fail.
        type Count = fn(&Direction) -> u64;
        for (name, count) in [
            ("frames", Direction::frames as Count),
            ("bytes", Direction::bytes),
        ] {
            let _ = writeln!(text, "# TYPE bulkhead_net_{name}_total counter");
            for (direction, counters) in self.directions() {
                let count = count(counters);
                let _ = writeln!(
                    text,
                    "bulkhead_net_{name}_total{{direction=\"{direction}\"}} {count}"
                );
            }
        }
        text.push_str("# TYPE bulkhead_net_dropped_total counter\n");
        for (direction, counters) in self.directions() {
            for (reason, name) in REASONS {
                let count = counters.drops(reason);
                let _ = writeln!(
                    text,
                    "bulkhead_net_dropped_total{{direction=\"{direction}\",reason=\"{name}\"}} {count}"
                );
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_every_sample() {
        let counters = Counters::default();
        let mut batch = Batch::default();
        batch.passed(60);
        batch.passed(1514);
        counters.receive.add(&mut batch);
        counters.transmit.dropped(Drop::Guard, &"not its own");
        let text = counters.prometheus(true);
        for line in [
            "# TYPE bulkhead_net_link_up gauge",
            "bulkhead_net_link_up 1",
            "# TYPE bulkhead_net_frames_total counter",
            "bulkhead_net_frames_total{direction=\"receive\"} 2",
            "bulkhead_net_frames_total{direction=\"transmit\"} 0",
            "bulkhead_net_bytes_total{direction=\"receive\"} 1574",
            "bulkhead_net_dropped_total{direction=\"transmit\",reason=\"guard\"} 1",
            "bulkhead_net_dropped_total{direction=\"receive\",reason=\"buffer\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(counters.prometheus(false).contains("bulkhead_net_link_up 0\n"));
    }
}
