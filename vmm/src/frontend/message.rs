//! Message headers and the payloads whose layout the `vhost` crate keeps private or pads.

use super::error::ReplyProblem;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Longest payload that any reply may have, in bytes: a back end that claims more is broken, and
/// nothing is allocated for it.
pub(super) const MAX_PAYLOAD: usize = 0x1000;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const KNOWN_FLAGS: u32 = VERSION_MASK | REPLY | NEED_REPLY;

/// The 12 bytes before every payload, in machine byte order.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) request: u32,
    flags: u32,
    pub(super) size: u32,
}

/// Bytes of a [`Header`].
pub(super) const HEADER_SIZE: usize = size_of::<Header>();

/// Whether the sender of a request wants to hear how it went (REPLY_ACK).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ack {
    Wanted,
    None,
}

impl Header {
    /// A request's header. `size` is bounded by the callers: our own messages are short.
    pub(super) fn request(request: u32, size: usize, ack: Ack) -> Self {
        let flags = match ack {
            Ack::Wanted => VERSION | NEED_REPLY,
            Ack::None => VERSION,
        };
        Self {
            request,
            flags,
            size: size as u32,
        }
    }

    /// The header of an answer to `self`.
    pub(super) fn reply(self, size: usize) -> Self {
        Self {
            request: self.request,
            flags: VERSION | REPLY,
            size: size as u32,
        }
    }

    pub(super) fn wants_reply(self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// Judges a request from the back end. The size is bounded; the code is the caller's affair.
    pub(super) fn is_request(self) -> bool {
        self.flags & !NEED_REPLY == VERSION && self.size as usize <= MAX_PAYLOAD
    }

    /// Judges a reply to `request`. NEED_REPLY may be left over from the request: libvhost-user
    /// answers with the request's flags.
    pub(super) fn check_reply(self, request: u32) -> Result<(), ReplyProblem> {
        if self.flags & !KNOWN_FLAGS != 0 || self.flags & (VERSION_MASK | REPLY) != VERSION | REPLY {
            Err(ReplyProblem::Flags(self.flags))
        } else if self.request != request {
            Err(ReplyProblem::Code(self.request))
        } else if self.size as usize > MAX_PAYLOAD {
            Err(ReplyProblem::Size {
                expected: MAX_PAYLOAD,
                got: self.size,
            })
        } else {
            Ok(())
        }
    }
}

/// The in-flight description (GET_INFLIGHT_FD, SET_INFLIGHT_FD), padded as QEMU, libvhost-user
/// and the `vhost` crate send it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Inflight {
    pub(super) mmap_size: u64,
    pub(super) mmap_offset: u64,
    pub(super) num_queues: u16,
    pub(super) queue_size: u16,
    pub(super) padding: [u8; 4],
}
