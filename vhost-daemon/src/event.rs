//! What happens to a device process that its supervisor writes down: a line on standard error that
//! both people and the supervisor read, whatever the log level and format are.

use std::fmt;
use std::io::Write;

/// What happened. The names are those of `bulkhead events`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Happening {
    /// The host has no space left for the image.
    NoSpace,
    /// The host's disk fails.
    IoError,
    /// What failed goes on.
    Recovered,
    /// The network interface is gone.
    TapLost,
}

impl fmt::Display for Happening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSpace => "no-space",
            Self::IoError => "io-error",
            Self::Recovered => "recovered",
            Self::TapLost => "tap-lost",
        })
    }
}

/// Tells of it: `event: NAME: DETAIL`. The caller sees to it that a guest cannot cause many.
pub fn tell(happening: Happening, detail: &str) {
    // One call, so that no other thread's line comes in between. Whoever reads no log misses it.
    let _ = std::io::stderr().write_all(format!("event: {happening}: {detail}\n").as_bytes());
}
