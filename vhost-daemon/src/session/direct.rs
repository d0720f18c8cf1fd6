//! The messages that the `vhost` crate does not hand to a back end as this one needs them:
//! SET_BACKEND_REQ_FD (it wraps the socket in a type that cannot send a configuration change),
//! SET_STATUS and GET_STATUS (it has no method for them). A look at the header, left in the
//! socket, tells whose a message is.

use super::Session;
use crate::descriptors::receive;
use nix::sys::socket::{MsgFlags, recv, send};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// Bytes of a message's header: request, flags, size.
const HEADER: usize = 12;
const SET_BACKEND_REQ_FD: u32 = 21;
const SET_STATUS: u32 = 39;
const GET_STATUS: u32 = 40;
const CONFIG_CHANGE_MSG: u32 = 2;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Bits of the device status (virtio 1.3, 2.1).
const KNOWN_STATUS: u64 = 0xFF;

/// Reads the socket's next header without taking it. `None`: not one of ours (or not whole yet, or
/// the end), so the crate's business.
pub(super) fn is_direct(socket: BorrowedFd<'_>) -> bool {
    let mut header = [0; HEADER];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let whole = recv(socket.as_raw_fd(), &mut header, flags) == Ok(HEADER);
    whole && matches!(word(&header, 0), SET_BACKEND_REQ_FD | SET_STATUS | GET_STATUS)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// Receives and carries out one message for which [`is_direct`] said yes.
pub(super) fn handle(session: &mut Session, socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut message = [0; HEADER + 8];
    let (length, fds) = receive(socket, &mut message)?;
    let request = word(&message, 0);
    let flags = word(&message, 4);
    let size = word(&message, 8) as usize;
    if length != HEADER + size || flags & 3 != VERSION {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "vhost-user message of a wrong size",
        ));
    }
    let mut payload = [0; 8];
    payload.copy_from_slice(&message[HEADER..]);
    let value = u64::from_le_bytes(payload);
    let result = match (request, size) {
        (GET_STATUS, 0) => return reply(socket, request, session.status),
        (SET_STATUS, 8) => set_status(session, value),
        (SET_BACKEND_REQ_FD, _) => take_channel(session, fds),
        _ => Err("wrong size"),
    };
    if let Err(reason) = result {
        tracing::warn!(request, reason, "vhost-user message refused");
    }
    let acknowledge = session.protocol_negotiated(VhostUserProtocolFeatures::REPLY_ACK);
    if acknowledge && flags & NEED_REPLY != 0 {
        reply(socket, request, u64::from(result.is_err()))?;
    }
    Ok(())
}

fn set_status(session: &mut Session, status: u64) -> Result<(), &'static str> {
    if status & !KNOWN_STATUS != 0 {
        return Err("unknown device status bits");
    }
    if status == 0 {
        session.reset_device().map_err(|_| "the device cannot be reset")?;
    }
    session.status = status;
    Ok(())
}

fn take_channel(session: &mut Session, mut fds: Vec<OwnedFd>) -> Result<(), &'static str> {
    match (fds.pop(), fds.is_empty()) {
        (Some(fd), true) => {
            session.backend_channel = Some(UnixStream::from(fd));
            Ok(())
        }
        _ => Err("one file descriptor was expected"),
    }
}

impl Session {
    /// Tells the front end that the configuration space changed (BACKEND_CONFIG_CHANGE_MSG). No
    /// answer is asked for, so that this side never waits.
    pub(super) fn send_config_change(&self) -> io::Result<()> {
        let Some(channel) = &self.backend_channel else {
            return Ok(());
        };
        let message = header(CONFIG_CHANGE_MSG, VERSION, 0);
        send_whole(channel.as_raw_fd(), &message)
    }
}

fn header(request: u32, flags: u32, size: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&request.to_le_bytes());
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..].copy_from_slice(&size.to_le_bytes());
    bytes
}

fn reply(socket: BorrowedFd<'_>, request: u32, value: u64) -> io::Result<()> {
    let mut bytes = [0; HEADER + 8];
    bytes[..HEADER].copy_from_slice(&header(request, VERSION | REPLY, 8));
    bytes[HEADER..].copy_from_slice(&value.to_le_bytes());
    send_whole(socket.as_raw_fd(), &bytes)
}

/// A message this short goes into the socket's buffer whole or not at all; a peer that lets its
/// buffer run full is not waited for.
fn send_whole(socket: RawFd, message: &[u8]) -> io::Result<()> {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    match send(socket, message, flags) {
        Ok(sent) if sent == message.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(error) => Err(error.into()),
    }
}
