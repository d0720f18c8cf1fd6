//! The messages that the `vhost` crate does not hand to a back end as this one needs them:
//! SET_BACKEND_REQ_FD (it wraps the socket in a type that cannot send a configuration change),
//! SET_STATUS and GET_STATUS (it has no method for them), GET_INFLIGHT_FD and SET_INFLIGHT_FD (20
//! bytes in the specification, 24 with the padding that QEMU sends; it knows one length only), and
//! SET_VRING_ENABLE (QEMU sends it for network devices before SET_FEATURES, which the crate refuses).
//! A look at the header, left in the socket, tells whose a message is.

use super::handler::InflightDescription;
use super::{Session, SessionError};
use crate::descriptors::receive;
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use vhost::vhost_user::message::{MAX_MSG_SIZE, VhostUserProtocolFeatures};

/// Bytes of a message's header: request, flags, size.
const HEADER: usize = 12;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const SET_STATUS: u32 = 39;
const GET_STATUS: u32 = 40;
const CONFIG_CHANGE_MSG: u32 = 2;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// The messages that are handled here.
const DIRECT: [u32; 6] = [
    SET_VRING_ENABLE,
    SET_BACKEND_REQ_FD,
    GET_INFLIGHT_FD,
    SET_INFLIGHT_FD,
    SET_STATUS,
    GET_STATUS,
];
/// The longest of their payloads.
const MAX_PAYLOAD: usize = 24;
/// Bits of the device status (virtio 1.3, 2.1).
const KNOWN_STATUS: u64 = 0xFF;

/// What lies at the front of the socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Next {
    /// A whole message that is handled here; bytes of its payload, as it says.
    Ours(usize),
    /// A whole message, the end, or an error: the crate's business.
    Crates,
    /// A part of a message. Whoever reads it waits for the rest, deaf to all else.
    Part,
}

/// Looks at the next message without taking it.
pub(super) fn peek(socket: BorrowedFd<'_>) -> Next {
    let mut bytes = [0; HEADER + MAX_MSG_SIZE];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    // With no room for control messages: descriptors stay with the message in the socket.
    let mut vectors = [IoSliceMut::new(&mut bytes)];
    let peeked = recvmsg::<()>(socket.as_raw_fd(), &mut vectors, None, flags);
    match peeked.map(|message| message.bytes) {
        Ok(0) | Err(_) => Next::Crates,
        Ok(length) if length < HEADER => Next::Part,
        Ok(length) => {
            let size = word(&bytes, 8) as usize;
            // Too long a one is refused by whoever reads it.
            let is_whole = size > MAX_MSG_SIZE || length >= HEADER + size;
            match (DIRECT.contains(&word(&bytes, 0)), is_whole) {
                (_, false) => Next::Part,
                (true, true) => Next::Ours(size),
                (false, true) => Next::Crates,
            }
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// Receives and carries out one message, whose payload [`peek`] found to have `size` bytes. No byte
/// behind it is taken: the next message may be there already.
///
/// # Errors
/// When the message is malformed or a reply that the front end waits for cannot be given: the
/// session ends. A message without a reply of its own that is refused is answered by REPLY_ACK.
pub(super) fn handle(session: &mut Session, socket: BorrowedFd<'_>, size: usize) -> io::Result<()> {
    let mut message = [0; HEADER + MAX_PAYLOAD];
    let whole = message.get_mut(..HEADER.saturating_add(size));
    let whole = whole.ok_or_else(|| invalid("vhost-user message with too long a payload"))?;
    let length = whole.len();
    let (received, fds) = receive(socket, whole)?;
    let (header, payload) = message.split_at(HEADER);
    let (request, flags) = (word(header, 0), word(header, 4));
    if received != length || flags & 3 != VERSION {
        return Err(invalid("vhost-user message of a wrong size or version"));
    }
    let result = match (request, size) {
        (GET_STATUS, 0) => {
            let status = session.status.to_le_bytes();
            return reply(socket, request, &status, None);
        }
        (GET_INFLIGHT_FD, 20 | 24) => return get_inflight(session, socket, &payload[..size]),
        (SET_VRING_ENABLE, 8) => session.enable_vring(word(payload, 0), word(payload, 4)),
        (SET_STATUS, 8) => session.set_status(long(payload, 0)),
        (SET_INFLIGHT_FD, 20 | 24) => set_inflight(session, payload, fds),
        (SET_BACKEND_REQ_FD, _) => take_channel(session, fds),
        _ => return Err(invalid("vhost-user message of a wrong size")),
    };
    if let Err(error) = &result {
        tracing::warn!(
            request,
            error = error as &dyn std::error::Error,
            "vhost-user message refused"
        );
    }
    let acknowledge = session.protocol_negotiated(VhostUserProtocolFeatures::REPLY_ACK);
    if acknowledge && flags & NEED_REPLY != 0 {
        let failed = u64::from(result.is_err());
        reply(socket, request, &failed.to_le_bytes(), None)?;
    }
    Ok(())
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    let mut long = [0; 8];
    long.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(long)
}

/// mmap size, mmap offset, number of queues, queue size.
fn description(payload: &[u8]) -> InflightDescription {
    let short = |at: usize| u16::from_le_bytes([payload[at], payload[at + 1]]);
    InflightDescription {
        size: long(payload, 0),
        offset: long(payload, 8),
        queues: short(16),
        queue_size: short(18),
    }
}

/// Answers in the length that the front end used.
fn get_inflight(session: &mut Session, socket: BorrowedFd<'_>, payload: &[u8]) -> io::Result<()> {
    let (region, fd) = session
        .new_inflight(&description(payload))
        .map_err(io::Error::other)?;
    let mut answer = [0; MAX_PAYLOAD];
    answer[..8].copy_from_slice(&region.size.to_le_bytes());
    answer[8..16].copy_from_slice(&region.offset.to_le_bytes());
    answer[16..18].copy_from_slice(&region.queues.to_le_bytes());
    answer[18..20].copy_from_slice(&region.queue_size.to_le_bytes());
    reply(socket, GET_INFLIGHT_FD, &answer[..payload.len()], Some(&fd))
}

fn set_inflight(session: &mut Session, payload: &[u8], mut fds: Vec<OwnedFd>) -> Result<(), SessionError> {
    match (fds.pop(), fds.is_empty()) {
        (Some(fd), true) => session.adopt_inflight(&description(payload), &fd),
        _ => Err(SessionError::Order("SET_INFLIGHT_FD needs one file descriptor")),
    }
}

fn take_channel(session: &mut Session, mut fds: Vec<OwnedFd>) -> Result<(), SessionError> {
    match (fds.pop(), fds.is_empty()) {
        (Some(fd), true) => {
            session.backend_channel = Some(UnixStream::from(fd));
            Ok(())
        }
        _ => Err(SessionError::Order(
            "SET_BACKEND_REQ_FD needs one file descriptor",
        )),
    }
}

impl Session {
    pub(super) fn enable_vring(&mut self, index: u32, value: u32) -> Result<(), SessionError> {
        let enabled = match value {
            0 => false,
            1 => true,
            other => {
                return Err(SessionError::Value {
                    what: "SET_VRING_ENABLE",
                    value: other.into(),
                });
            }
        };
        let (worker, vring) = self.queue(index)?;
        vring.enabled = enabled;
        Ok(worker.set_enabled(enabled)?)
    }

    fn set_status(&mut self, status: u64) -> Result<(), SessionError> {
        if status & !KNOWN_STATUS != 0 {
            return Err(SessionError::Value {
                what: "device status",
                value: status,
            });
        }
        match status {
            // Said at each stop of the device, too (QEMU): what GET_VRING_BASE left in the region is the front
            // end's, which drops it where the driver resets the device.
            0 if self.protocol_negotiated(VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT) => {
                self.reset()?
            }
            0 => self.reset_device()?,
            _ => {}
        }
        self.status = status;
        Ok(())
    }

    /// Tells the front end that the configuration space changed (BACKEND_CONFIG_CHANGE_MSG). No
    /// answer is asked for, so that this side never waits. A notice that nobody takes ends no session:
    /// the next one reads the configuration anyway.
    pub(super) fn send_config_change(&mut self) {
        let Some(channel) = &self.backend_channel else {
            return;
        };
        let message = header(CONFIG_CHANGE_MSG, VERSION, 0);
        match send_whole(channel.as_raw_fd(), &message, &[]) {
            Ok(()) => {}
            // Whoever reads what fills it finds this change too.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(%error, "the front end hears of no more configuration changes");
                self.backend_channel = None;
            }
        }
    }
}

fn header(request: u32, flags: u32, size: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&request.to_le_bytes());
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..].copy_from_slice(&size.to_le_bytes());
    bytes
}

fn reply(socket: BorrowedFd<'_>, request: u32, payload: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
    let mut message = Vec::from(header(request, VERSION | REPLY, payload.len() as u32));
    message.extend_from_slice(payload);
    let Some(fd) = fd else {
        return send_whole(socket.as_raw_fd(), &message, &[]);
    };
    let fds = [fd.as_raw_fd()];
    send_whole(socket.as_raw_fd(), &message, &[ControlMessage::ScmRights(&fds)])
}

/// A message this short goes into the socket's buffer whole or not at all; a peer that lets its
/// buffer run full is not waited for.
fn send_whole(socket: RawFd, message: &[u8], control: &[ControlMessage<'_>]) -> io::Result<()> {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    match sendmsg::<()>(socket, &[IoSlice::new(message)], control, flags, None) {
        Ok(sent) if sent == message.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(error) => Err(error.into()),
    }
}
