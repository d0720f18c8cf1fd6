//! How requests reach the host's files: by plain calls, or through a restricted io_uring.
//!
//! What is read through the page cache is tried by a call that does not wait (RWF_NOWAIT); what that does not
//! find there goes through a ring, since a call that waits for the disk would leave it one request deep. File
//! systems in memory, where nothing waits, take plain calls, as all writes through the page cache do: they copy
//! and return. O_DIRECT files take the ring at once; where a successor could not wait for what a ring had begun
//! ([`Fence`]), calls.

mod direct;
mod ring;

pub use direct::{DirectFile, Fence, await_direct_writes};
#[cfg(test)]
pub(crate) use ring::is_refused;
pub(crate) use ring::{Direction, RestrictedRing, Transfer};

use std::str::FromStr;

/// Who moves the data (`--io`).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum IoMode {
    /// As said above; where the host has no ring, plain calls.
    #[default]
    Auto,
    /// Plain calls.
    Sync,
    /// The ring for everything; without one the process does not start.
    Uring,
}

impl FromStr for IoMode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "sync" => Ok(Self::Sync),
            "uring" => Ok(Self::Uring),
            _ => Err("expected auto, sync or uring"),
        }
    }
}

/// What the host keeps of the image in memory (`--cache`, QEMU's names).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum CacheMode {
    /// The host's page cache.
    #[default]
    Writeback,
    /// Data goes past the page cache (O_DIRECT).
    None,
}

impl FromStr for CacheMode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "writeback" => Ok(Self::Writeback),
            "none" => Ok(Self::None),
            _ => Err("expected writeback or none"),
        }
    }
}
