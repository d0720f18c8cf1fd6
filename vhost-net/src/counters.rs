//! What passed and what was dropped, and why: bounded logging of what a guest can trigger.

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
}

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
    dropped: [AtomicU64; 4],
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

    fn log(&self, direction: &str) {
        tracing::info!(
            direction,
            frames = self.frames(),
            bytes = self.bytes.load(Ordering::Relaxed),
            dropped_header = self.drops(Drop::Header),
            dropped_guard = self.drops(Drop::Guard),
            dropped_interface = self.drops(Drop::Interface),
            dropped_buffer = self.drops(Drop::Buffer),
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
        self.receive.log("receive");
        self.transmit.log("transmit");
    }
}
