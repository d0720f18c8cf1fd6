//! What happens to a running VM's devices: lines of `events.jsonl` in its run-time folder, one
//! JSON object each, as `bulkhead events` prints them. The same type goes from the supervisor,
//! which decides, to the spawner, which writes; so every field is always there.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Name of the file in the VM's run-time folder.
pub const FILE_NAME: &str = "events.jsonl";
/// Most bytes of that file. Before a line that would exceed them it is begun anew, by [`EventKind::BegunAnew`].
pub const MAX_BYTES: u64 = 1 << 20;
/// Events that the device's process itself may tell of ([`EventKind::told_as`]) within [`TOLD_PERIOD`]; what exceeds
/// them is counted in the next line's `count` only.
pub const MOST_TOLD: u32 = 16;
/// See [`MOST_TOLD`].
pub const TOLD_PERIOD: Duration = Duration::from_secs(10);
/// Most bytes of [`VmEvent::detail`].
pub const MAX_DETAIL: usize = 512;

/// One event.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmEvent {
    /// CLOCK_MONOTONIC in nanoseconds.
    pub time_ns: u64,
    /// The device's id; for `begun-anew`: none.
    pub device: String,
    /// What happened.
    pub event: EventKind,
    /// The process that it happened to, in the spawner's process id namespace; 0: none.
    pub pid: i32,
    /// How many events of this kind this device has had, this one included.
    pub count: u64,
    /// Microseconds from the predecessor's death, as the supervisor heard of it, to the vmm's word
    /// that the guest is served again; 0 where nothing was replaced.
    pub took_us: u64,
    /// For `restarted` and `reconnected`: requests that the guest had under way when its predecessor was lost; 0
    /// elsewhere.
    pub outstanding: u32,
    /// Why, one line; may be empty.
    pub detail: String,
}

/// A line of the file: an event, and when it was written down.
#[derive(Debug, Serialize)]
pub struct EventLine<'a> {
    /// Wall-clock time, RFC 3339 in UTC.
    pub time: String,
    /// The event.
    #[serde(flatten)]
    pub event: &'a VmEvent,
}

/// What happened to a device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// Its process ended, and nobody had asked it to.
    Died,
    /// A new process serves the guest.
    Restarted,
    /// Someone else's back end, or passt, closed its socket, did not answer, or broke the protocol.
    Disconnected,
    /// Someone else's back end, or another passt, serves the guest again.
    Reconnected,
    /// Its process did not answer, or made no progress, and was killed.
    Hung,
    /// A process of another build serves the guest.
    Upgraded,
    /// The guest was told that the device needs a reset (NEEDS_RESET).
    NeedsReset,
    /// The kernel killed its process, since its VM's memory limit was reached.
    OutOfMemory,
    /// The host has no space left for a disk's image.
    NoSpace,
    /// The host's disk fails.
    IoError,
    /// What `no-space` or `io-error` told of is over.
    Recovered,
    /// It was attached to the running VM.
    Attached,
    /// The guest let go of it, and its process has ended.
    Detached,
    /// A NIC's TAP is gone.
    TapLost,
    /// There is a TAP of that name again; a new process takes it over.
    TapBack,
    /// The file had [`MAX_BYTES`]: what it told before this line is gone.
    BegunAnew,
}

impl VmEvent {
    /// The first line of a file that was begun anew, for the `count`th time.
    #[must_use]
    pub fn begun_anew(time_ns: u64, count: u64) -> Self {
        Self {
            time_ns,
            device: String::new(),
            event: EventKind::BegunAnew,
            pid: 0,
            count,
            took_us: 0,
            outstanding: 0,
            detail: "there were too many events: those before are gone".to_owned(),
        }
    }
}

impl EventKind {
    /// What a device process itself may tell of, by the name that it gives.
    #[must_use]
    pub fn told_as(name: &str) -> Option<Self> {
        match name {
            "no-space" => Some(Self::NoSpace),
            "io-error" => Some(Self::IoError),
            "recovered" => Some(Self::Recovered),
            "tap-lost" => Some(Self::TapLost),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_with_the_names_that_people_grep_for() {
        let event = VmEvent {
            time_ns: 5,
            device: "disk0".into(),
            event: EventKind::NeedsReset,
            pid: 7,
            count: 1,
            took_us: 0,
            outstanding: 0,
            detail: "line\nbreak".into(),
        };
        let line = EventLine {
            time: "T".into(),
            event: &event,
        };
        let line = serde_json::to_string(&line).unwrap();
        assert!(line.starts_with(r#"{"time":"T","time-ns":5,"#), "{line}");
        assert!(
            line.contains(r#""event":"needs-reset""#) && !line.contains('\n'),
            "{line}"
        );
        assert_eq!(serde_json::from_str::<VmEvent>(&line).unwrap(), event);
        let bytes = postcard::to_allocvec(&event).unwrap();
        assert_eq!(postcard::from_bytes::<VmEvent>(&bytes).unwrap(), event);
    }
}
