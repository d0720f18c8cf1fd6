//! What can go wrong between the vmm and a back end.

use std::io;
use std::time::Duration;
use vhost::vhost_user::message::FrontendReq;
use vm_spec::control::Loss;

/// A failed exchange or negotiation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer within the deadline.
    #[error("back end did not answer {request:?} within {after:?}")]
    Timeout {
        /// The request.
        request: FrontendReq,
        /// The deadline that passed.
        after: Duration,
    },
    /// End of file on the socket.
    #[error("back end closed its socket during {0:?}")]
    Gone(FrontendReq),
    /// End of file while nothing was asked.
    #[error("back end closed its socket")]
    Closed,
    /// Bytes that answer nothing.
    #[error("back end sent a message that nobody asked for")]
    Unasked,
    /// The socket failed while nothing was asked.
    #[error("vhost-user socket failed")]
    Socket(#[source] io::Error),
    /// The socket failed.
    #[error("vhost-user socket failed during {request:?}")]
    Io {
        /// The request.
        request: FrontendReq,
        /// What the system said.
        source: io::Error,
    },
    /// An answer that the protocol does not allow.
    #[error("back end gave a bad reply to {request:?}: {problem}")]
    Reply {
        /// The request.
        request: FrontendReq,
        /// What is wrong with it.
        problem: ReplyProblem,
    },
    /// The back end answered that it failed (REPLY_ACK with a value other than 0).
    #[error("back end refused {0:?}{advice}", advice = advice(*.0))]
    Refused(FrontendReq),
    /// The back end lacks VIRTIO_F_VERSION_1.
    #[error("back end does not offer VIRTIO_F_VERSION_1 (feature bit 32)")]
    NoVersion1,
    /// A successor lacks what the guest was promised by its predecessor.
    #[error("new back end does not fit the running device: {0}")]
    Successor(&'static str),
    /// The back end serves fewer queues than the device type needs.
    #[error("back end serves {offered} queues, the device needs {needed}")]
    Queues {
        /// What the back end said.
        offered: u64,
        /// What the device type needs at least.
        needed: u16,
    },
    /// The device's queues take more eventfds than this process can have.
    #[error("no descriptors are left for {queues} queues")]
    Descriptors {
        /// Of the device.
        queues: u16,
    },
    /// The in-flight region is not acceptable.
    #[error("back end's in-flight region refused: {0}")]
    Inflight(&'static str),
    /// The in-flight region cannot be inspected or zeroed.
    #[error("back end's in-flight region cannot be used")]
    InflightIo(#[source] io::Error),
    /// An eventfd, socketpair or thread could not be made.
    #[error("cannot make {what}")]
    Resource {
        /// What was to be made.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The vmm is shutting down.
    #[error("interrupted by shutdown")]
    Cancelled,
    /// There is no back end: it was lost before.
    #[error("device has no back end")]
    NoBackend,
    /// The device's thread did not answer in time.
    #[error("device thread did not answer within {0:?}")]
    Thread(Duration),
}

/// What a refusal may come of.
fn advice(request: FrontendReq) -> &'static str {
    match request {
        FrontendReq::SET_VRING_NUM => ": it may take smaller queues only (key 'queue-size')",
        _ => "",
    }
}

/// How a reply breaks the protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReplyProblem {
    /// Of another length than the request's reply has.
    #[error("{got} bytes of payload instead of {expected}")]
    Size {
        /// Bytes that the protocol says.
        expected: usize,
        /// Bytes that the header says.
        got: u32,
    },
    /// To another request.
    #[error("request code {0}")]
    Code(u32),
    /// Not a reply, of another version, or with reserved bits.
    #[error("flags {0:#x}")]
    Flags(u32),
    /// A file descriptor that does not belong there, too many, or none where one must be.
    #[error("wrong number of file descriptors")]
    Fds,
    /// A value out of range.
    #[error("value {0:#x} out of range")]
    Value(u64),
}

impl Error {
    /// In which way this costs the back end; `None` where it does not.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        match self {
            Self::Gone(_) | Self::Closed | Self::Socket(_) | Self::Io { .. } | Self::NoBackend => {
                Some(Loss::Closed)
            }
            Self::Timeout { .. } => Some(Loss::Silent),
            Self::Unasked | Self::Reply { .. } | Self::Inflight(_) | Self::InflightIo(_) => {
                Some(Loss::Broken)
            }
            Self::Refused(_)
            | Self::NoVersion1
            | Self::Successor(_)
            | Self::Queues { .. }
            | Self::Descriptors { .. }
            | Self::Resource { .. }
            | Self::Cancelled
            | Self::Thread(_) => None,
        }
    }

    /// What a person can do about it; may be empty.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Timeout { .. } => "see the back end's log; is it a vhost-user back end, and does it run?",
            Self::Gone(_) | Self::Closed => "the back end's own log says why it ended",
            Self::Reply { .. } | Self::Unasked => {
                "the socket's other end does not speak vhost-user, or is broken"
            }
            Self::NoVersion1 => {
                "only back ends of virtio 1.0 or later work; update it or turn its legacy mode off"
            }
            Self::Descriptors { .. } => "ask for fewer queues",
            Self::Queues { .. } => "ask for fewer queues, or start the back end with more",
            _ => "",
        }
    }
}
