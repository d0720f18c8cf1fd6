//! Requests from the back end (SET_BACKEND_REQ_FD). Only CONFIG_CHANGE_MSG is carried out; what
//! is malformed closes the channel, and the device goes on without it: its configuration is looked at
//! from time to time.

use super::message::{HEADER_SIZE, Header, MAX_PAYLOAD};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vhost::vhost_user::message::BackendReq;
use zerocopy::{FromBytes, IntoBytes};

/// Most messages taken at one time, so that a back end that floods does not hold the thread.
const BURST: usize = 16;

/// Most bytes dropped of what a back end has left: more than a socket holds, unless somebody goes on
/// writing.
const MOST_WASTE: usize = 1 << 20;

/// Our end, and the end that back ends are given: one after the other the same, because the vmm
/// makes no sockets. What one does to it its successors find: bytes and modes are put right, a shutdown
/// cannot be.
#[derive(Debug)]
pub struct RequestSockets {
    ours: OwnedFd,
    theirs: UnixStream,
}

impl RequestSockets {
    /// The two ends of a Unix stream socketpair.
    #[must_use]
    pub fn new(ours: OwnedFd, theirs: OwnedFd) -> Self {
        let theirs = UnixStream::from(theirs);
        Self { ours, theirs }
    }

    /// The end for the back end.
    pub(crate) fn theirs(&self) -> BorrowedFd<'_> {
        self.theirs.as_fd()
    }
}

/// The channel of one session.
pub(super) struct BackendChannel {
    sockets: Arc<RequestSockets>,
    partial: Vec<u8>,
    acks: bool,
    config_changed: bool,
}

impl BackendChannel {
    /// A channel for a new peer: what the last one left in it, requests and answers, is dropped. `acks`:
    /// REPLY_ACK is agreed. `None`: the last one has shut it down.
    pub(super) fn new(sockets: Arc<RequestSockets>, acks: bool) -> Option<Self> {
        let left = |end| drop_waste(end) == Err(Errno::EAGAIN);
        let sound = left(sockets.ours.as_fd())
            && left(sockets.theirs())
            && sockets.theirs.set_nonblocking(false).is_ok();
        if !sound {
            tracing::warn!("a back end has broken the request channel for those after it");
            return None;
        }
        Some(Self {
            sockets,
            partial: Vec::new(),
            acks,
            config_changed: false,
        })
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.sockets.ours.as_fd()
    }

    /// Whether the device's configuration changed since the last call.
    pub(super) fn take_config_changed(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    /// Takes and answers what has arrived. A channel that breaks the protocol is dropped.
    pub(super) fn service(channel: &mut Option<Self>) {
        if let Some(open) = channel
            && let Err(problem) = open.take_messages()
        {
            tracing::warn!(problem, "back-end request channel closed");
            *channel = None;
        }
    }

    fn take_messages(&mut self) -> Result<(), &'static str> {
        for _ in 0..BURST {
            let header = match self.need(HEADER_SIZE)? {
                true => {
                    Header::read_from_prefix(&self.partial)
                        .map_err(|_| "no header")?
                        .0
                }
                false => return Ok(()),
            };
            if !header.is_request() {
                return Err("malformed header");
            }
            if !self.need(HEADER_SIZE + header.size as usize)? {
                return Ok(());
            }
            self.partial.clear();
            self.carry_out(header)?;
        }
        Ok(())
    }

    /// Reads until `partial` holds `length` bytes. False: not yet.
    fn need(&mut self, length: usize) -> Result<bool, &'static str> {
        let mut buffer = [0; HEADER_SIZE + MAX_PAYLOAD];
        while self.partial.len() < length {
            let missing = length - self.partial.len();
            // With no room for them: file descriptors that come along are closed by the kernel.
            match take(self.as_fd(), &mut buffer[..missing]) {
                Ok(0) => return Err("end of file"),
                Ok(count) => self.partial.extend_from_slice(&buffer[..count]),
                Err(Errno::EAGAIN) => return Ok(false),
                Err(Errno::EINTR) => {}
                Err(_) => return Err("read failed"),
            }
        }
        Ok(true)
    }

    fn carry_out(&mut self, header: Header) -> Result<(), &'static str> {
        let known = header.request == u32::from(BackendReq::CONFIG_CHANGE_MSG) && header.size == 0;
        self.config_changed |= known;
        if self.acks && header.wants_reply() {
            let answer = u64::from(!known);
            let mut message = header.reply(size_of_val(&answer)).as_bytes().to_vec();
            message.extend_from_slice(answer.as_bytes());
            // 20 bytes: a socket that cannot take them belongs to a back end that never reads.
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.as_fd().as_raw_fd(), &message, flags) {
                Ok(count) if count == message.len() => {}
                _ => return Err("answers are not read"),
            }
        }
        Ok(())
    }
}

/// Reads until nothing is there; the error says why.
fn drop_waste(end: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut waste = [0; MAX_PAYLOAD];
    for _ in 0..MOST_WASTE / MAX_PAYLOAD {
        if take(end, &mut waste)? == 0 {
            break;
        }
    }
    Ok(())
}

/// Receives without waiting, whatever mode a back end has left or sets meanwhile.
fn take(end: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    recv(end.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)
}
