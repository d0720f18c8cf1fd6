//! Requests from the back end (SET_BACKEND_REQ_FD). Only CONFIG_CHANGE_MSG is carried out; what
//! is malformed closes the channel, and the device goes on without it.

use super::message::{HEADER_SIZE, Header, MAX_PAYLOAD};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use vhost::vhost_user::message::BackendReq;
use zerocopy::{FromBytes, IntoBytes};

/// Most messages taken at one time, so that a back end that floods does not hold the thread.
const BURST: usize = 16;

/// The back end is gone, or has had enough of the channel.
const END: &str = "end of file";

/// The channel of one session, which may be closed.
#[derive(Default)]
pub(super) struct BackendChannel {
    socket: Option<OwnedFd>,
    partial: Vec<u8>,
    acks: bool,
    config_changed: bool,
}

impl BackendChannel {
    /// A channel whose other end one back end alone has. `acks`: REPLY_ACK is agreed.
    pub(super) fn new(socket: OwnedFd, acks: bool) -> Self {
        Self {
            socket: Some(socket),
            acks,
            ..Self::default()
        }
    }

    /// To be polled, unless it is closed.
    pub(super) fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Whether the device's configuration changed since the last call.
    pub(super) fn take_config_changed(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    /// Takes and answers what has arrived. A channel that breaks the protocol is closed.
    pub(super) fn service(&mut self) {
        let Some(socket) = self.socket.take() else {
            return;
        };
        match self.take_messages(socket.as_fd()) {
            Ok(()) => self.socket = Some(socket),
            Err(END) => tracing::info!("back-end request channel closed"),
            Err(problem) => tracing::warn!(problem, "back-end request channel closed"),
        }
    }

    fn take_messages(&mut self, socket: BorrowedFd<'_>) -> Result<(), &'static str> {
        for _ in 0..BURST {
            let header = match self.need(socket, HEADER_SIZE)? {
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
            if !self.need(socket, HEADER_SIZE + header.size as usize)? {
                return Ok(());
            }
            self.partial.clear();
            self.carry_out(socket, header)?;
        }
        Ok(())
    }

    /// Reads until `partial` holds `length` bytes. False: not yet.
    fn need(&mut self, socket: BorrowedFd<'_>, length: usize) -> Result<bool, &'static str> {
        let mut buffer = [0; HEADER_SIZE + MAX_PAYLOAD];
        while self.partial.len() < length {
            let missing = length - self.partial.len();
            // With no room for them: file descriptors that come along are closed by the kernel.
            // Without waiting, whatever mode the back end has set.
            match recv(socket.as_raw_fd(), &mut buffer[..missing], MsgFlags::MSG_DONTWAIT) {
                Ok(0) | Err(Errno::ECONNRESET) => return Err(END),
                Ok(count) => self.partial.extend_from_slice(&buffer[..count]),
                Err(Errno::EAGAIN) => return Ok(false),
                Err(Errno::EINTR) => {}
                Err(_) => return Err("read failed"),
            }
        }
        Ok(true)
    }

    fn carry_out(&mut self, socket: BorrowedFd<'_>, header: Header) -> Result<(), &'static str> {
        let known = header.request == u32::from(BackendReq::CONFIG_CHANGE_MSG) && header.size == 0;
        self.config_changed |= known;
        if self.acks && header.wants_reply() {
            let answer = u64::from(!known);
            let mut message = header.reply(size_of_val(&answer)).as_bytes().to_vec();
            message.extend_from_slice(answer.as_bytes());
            // 20 bytes: a socket that cannot take them belongs to a back end that never reads.
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(socket.as_raw_fd(), &message, flags) {
                Ok(count) if count == message.len() => {}
                _ => return Err("answers are not read"),
            }
        }
        Ok(())
    }
}
