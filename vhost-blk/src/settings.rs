//! What all queues of a disk share besides the image.

use crate::trouble::Trouble;
use std::str::FromStr;
use std::sync::Arc;
use vhost_daemon::SharedLimiter;

/// What becomes of a request that the host fails (`--on-error`).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) enum OnError {
    /// The driver is told.
    #[default]
    Report,
    /// Where the host may be able later (no space, a disk that fails), the queue stops and tries again
    /// until it succeeds; only a driver that resets the device, or the end of the session, is told.
    Stop,
}

impl FromStr for OnError {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "report" => Ok(Self::Report),
            "stop" => Ok(Self::Stop),
            _ => Err("expected report or stop"),
        }
    }
}

/// Of one disk.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// What GET_ID answers; at most as long as the specification has room for.
    pub(crate) serial: Arc<[u8]>,
    pub(crate) limits: SharedLimiter,
    pub(crate) on_error: OnError,
    pub(crate) trouble: Arc<Trouble>,
}
