//! Messages of one vhost-user socket, well-formed or not.

use anyhow::{Context, Result, bail, ensure};
use nix::{
    cmsg_space,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};
use std::{
    io::{IoSlice, IoSliceMut, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

/// Request numbers (vhost-user, "Front-end message types").
pub mod request {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
}

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;

/// An answer.
#[derive(Debug)]
pub struct Reply {
    /// Its request number.
    pub request: u32,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    /// The payload as one 64-bit number.
    ///
    /// # Errors
    /// When it has another length.
    pub fn number(&self) -> Result<u64> {
        let bytes = self.payload.as_slice().try_into();
        Ok(u64::from_le_bytes(bytes.context("reply is not 64 bits long")?))
    }
}

/// One connected socket.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    deadline: Duration,
    /// VHOST_USER_PROTOCOL_F_REPLY_ACK is negotiated: [`Connection::tell`] waits for an answer.
    pub acknowledges: bool,
}

impl Connection {
    /// Over `socket`, with `deadline` for each answer.
    #[must_use]
    pub fn new(socket: UnixStream, deadline: Duration) -> Self {
        Self {
            socket,
            deadline,
            acknowledges: false,
        }
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// When the socket refuses.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let sent = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .context("sendmsg on the vhost-user socket")?;
        ensure!(sent == bytes.len(), "short write on the vhost-user socket");
        Ok(())
    }

    fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut message = Vec::with_capacity(HEADER + payload.len());
        message.extend(request.to_le_bytes());
        message.extend((VERSION | flags).to_le_bytes());
        message.extend(u32::try_from(payload.len())?.to_le_bytes());
        message.extend(payload);
        self.send_raw(&message, fds)
    }

    /// Sends a request that has a reply of its own, and returns that.
    ///
    /// # Errors
    /// When none comes in time, or one of another kind.
    pub fn ask(&mut self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Reply> {
        self.send(request, 0, payload, fds)?;
        let reply = self.receive()?;
        ensure!(
            reply.request == request,
            "asked {request}, got a reply to {}",
            reply.request
        );
        Ok(reply)
    }

    /// Sends a request that has none; with REPLY_ACK waits for the acknowledgement.
    ///
    /// # Errors
    /// When the back end says so, or says nothing in time.
    pub fn tell(&mut self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        if !self.acknowledges {
            return self.send(request, 0, payload, fds);
        }
        self.send(request, NEED_REPLY, payload, fds)?;
        let reply = self.receive()?;
        ensure!(
            reply.request == request,
            "told {request}, got a reply to {}",
            reply.request
        );
        match reply.number()? {
            0 => Ok(()),
            code => bail!("the back end refused request {request} with {code}"),
        }
    }

    /// The next message.
    ///
    /// # Errors
    /// When none comes in time, or the back end has gone.
    pub fn receive(&mut self) -> Result<Reply> {
        let end = Instant::now() + self.deadline;
        let mut header = [0; HEADER];
        let fds = self.receive_with_fds(&mut header, end)?;
        let field =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        ensure!(field(4) & 3 == VERSION, "message of version {}", field(4) & 3);
        ensure!(field(4) & REPLY != 0, "message is no reply");
        ensure!(field(8) <= 4096, "reply of {} bytes", field(8));
        let mut payload = vec![0; field(8) as usize];
        let mut have = 0;
        while have < payload.len() {
            self.wait_readable(end)?;
            let count = self.socket.read(&mut payload[have..])?;
            ensure!(count > 0, "the back end closed the socket within a message");
            have += count;
        }
        Ok(Reply {
            request: field(0),
            payload,
            fds,
        })
    }

    fn receive_with_fds(&mut self, header: &mut [u8; HEADER], end: Instant) -> Result<Vec<OwnedFd>> {
        self.wait_readable(end)?;
        let mut space = cmsg_space!([RawFd; 8]);
        let mut slices = [IoSliceMut::new(header)];
        let message = recvmsg::<()>(
            self.socket.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL,
        )
        .context("recvmsg on the vhost-user socket")?;
        let mut fds = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                fds.extend(raw.into_iter().map(own));
            }
        }
        match message.bytes {
            HEADER => Ok(fds),
            0 => bail!("the back end closed the socket"),
            short => bail!("header of {short} bytes"),
        }
    }

    fn wait_readable(&self, end: Instant) -> Result<()> {
        let left = end.saturating_duration_since(Instant::now());
        let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let ready = poll(
            &mut polled,
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
        )?;
        ensure!(ready > 0, "the back end did not answer in {:?}", self.deadline);
        Ok(())
    }

    /// Waits until the back end closes the socket; what it still sends is thrown away.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn wait_closed(&mut self) -> Result<()> {
        let end = Instant::now() + self.deadline;
        let mut scrap = [0; 512];
        loop {
            self.wait_readable(end)?;
            match self.socket.read(&mut scrap) {
                Ok(0) | Err(_) => return Ok(()),
                Ok(_) => {}
            }
        }
    }
}

#[expect(unsafe_code, reason = "SCM_RIGHTS hands over raw descriptors")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
