//! The control protocol: what another command says to a running VM's supervisor, on the
//! SOCK_SEQPACKET socket [`SOCKET_NAME`] in the VM's run-time folder. Transport and envelope are
//! as in [`crate::control`]: the envelope carries the version, and the request's number, which the
//! answer repeats.

use crate::control::DeviceConfig;
use crate::supervise::AddedProcess;
use serde::{Deserialize, Serialize};

/// The socket's name in the run-time folder.
pub const SOCKET_NAME: &str = "control.sock";

/// From a client. Any may be answered by [`Answer::Refused`], and one that takes its time by [`Answer::Failed`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Request {
    /// The first message. Answered by [`Answer::Hello`].
    Hello,
    /// Replace a running device process by another build of it; one fd attached: the binary.
    /// Answered by [`Answer::Upgraded`], when the guest is served again.
    Upgrade {
        /// The device's id.
        device: String,
    },
    /// Pass an order on to a running device process (its `--control-fd`): one line without its end.
    /// Answered by [`Answer::Ordered`].
    Order {
        /// The device's id.
        device: String,
        /// The line, at most [`MAX_ORDER`] bytes.
        line: String,
    },
    /// Put a device into one of the slots that are kept for them. With a process the log pipe's read end, the
    /// supervisor's end of the socket for orders, and [`AddedProcess::descriptors`] are attached, else
    /// [`crate::control::BACKEND_FDS`]. Answered by [`Answer::Attached`], when the guest can see it.
    Attach(Box<Attachment>),
    /// Have the guest let go of a device, and end its process. Answered by [`Answer::Detached`] once that is done;
    /// after [`Answer::Failed`] the guest may still let go of it later.
    Detach {
        /// The device's id.
        device: String,
    },
    /// Listen to the console or the log. Answered by [`Answer::Listening`].
    Listen {
        /// To what.
        channel: Channel,
        /// Until the VM is over; without it, only to what was said already.
        follow: bool,
    },
    /// Which ids are taken. Answered by [`Answer::Devices`].
    Devices,
}

/// A device to attach.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attachment {
    /// The device; slot 0 stands for any. Its numbers mean nothing.
    pub device: DeviceConfig,
    /// Its process; `None`: someone else's back end serves it.
    pub process: Option<AddedProcess>,
}

/// What a client can listen to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Channel {
    /// What the guest writes; what the client says is typed at it.
    Console,
    /// What the VM's processes log, whole lines, before each the time at which the supervisor had it (RFC 3339) and a
    /// space; a line without one tells how many bytes were lost. The client says nothing.
    Log,
}

/// Ends what a device process answers by several lines.
pub const LAST_LINE: &str = "# EOF";

/// Longest answer of a device process in bytes; a message holds it, with its envelope.
pub const MAX_SAID: usize = 48 << 10;

/// Longest order in bytes.
pub const MAX_ORDER: usize = 60;

/// From the supervisor.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The protocol is spoken.
    Hello,
    /// The new build serves.
    Upgraded {
        /// Its process id, in the spawner's process id namespace.
        pid: i32,
        /// Microseconds for which the guest was not served.
        took_us: u64,
    },
    /// The guest can see the device.
    Attached {
        /// PCI device number.
        slot: u8,
        /// Its process, where it is ours, in the spawner's process id namespace.
        pid: Option<i32>,
    },
    /// The guest has let go of the device, and its process has ended.
    Detached,
    /// What the device's process said.
    Ordered(
        /// Its lines.
        String,
    ),
    /// This connection carries no more messages: datagrams of plain bytes follow, of at most 4096 bytes from the
    /// supervisor and 256 from the client, until either side ends it.
    Listening,
    /// It was begun, and is not done; for an upgrade: the old build serves, or will in a moment.
    Failed(
        /// Why, one line.
        String,
    ),
    /// The ids of all devices, and those of devices that are coming or going.
    Devices(Vec<String>),
    /// It was not begun: nothing has changed.
    Refused(Refusal),
}

/// Why a request is not begun.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// For another reason, one line.
    #[error("{0}")]
    Because(String),
    /// Another device has the id of the one to attach by now.
    #[error("its id is another device's")]
    IdTaken,
    /// The VM has no such device.
    #[error("the VM has no such device")]
    NoDevice,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A command of one build may talk to a supervisor of another: whatever is new comes last.
    #[test]
    fn messages_keep_their_numbers() {
        let number = |bytes: Result<Vec<u8>, postcard::Error>| bytes.unwrap()[0];
        let listen = Request::Listen {
            channel: Channel::Log,
            follow: false,
        };
        let device = String::new;
        let detach = Request::Detach { device: device() };
        for (message, expected) in [
            (Request::Hello, 0),
            (Request::Upgrade { device: device() }, 1),
            (detach, 4),
            (listen, 5),
            (Request::Devices, 6),
        ] {
            assert_eq!(number(postcard::to_allocvec(&message)), expected, "{message:?}");
        }
        for (message, expected) in [
            (Answer::Hello, 0),
            (Answer::Upgraded { pid: 1, took_us: 1 }, 1),
            (Answer::Detached, 3),
            (Answer::Ordered(device()), 4),
            (Answer::Listening, 5),
            (Answer::Failed(device()), 6),
            (Answer::Devices(vec![]), 7),
            (Answer::Refused(Refusal::NoDevice), 8),
        ] {
            assert_eq!(number(postcard::to_allocvec(&message)), expected, "{message:?}");
        }
    }
}
