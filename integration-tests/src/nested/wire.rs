//! Frames between the runner and its agent in the outer guest, over one virtio-serial port.
//!
//! A frame is one byte of kind, four bytes of length (little-endian), then the payload. Output
//! travels as it is; the other kinds carry JSON. A frame longer than [`MAX_FRAME`] ends the
//! conversation.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::path::PathBuf;
use std::time::Duration;

/// Longest payload in bytes.
pub const MAX_FRAME: usize = 1 << 20;
/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "bulkhead.nested";

/// A command to run in the outer guest. The host's file tree is its root, so that paths of the
/// host hold; what it writes there stays in the guest's memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub environment: BTreeMap<String, String>,
    /// Working folder.
    pub folder: PathBuf,
    /// User and group id; root if none.
    pub user: Option<u32>,
    /// The command is killed, with its process group, when this has passed.
    pub deadline: Duration,
}

/// How a command ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Ended {
    /// It exited with this code.
    Exited(i32),
    /// A signal killed it.
    Signalled(i32),
    /// Its deadline passed and it was killed.
    TimedOut,
    /// It could not be started.
    NotStarted(String),
}

impl Ended {
    /// It exited with code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        *self == Self::Exited(0)
    }
}

/// Where output was written to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// What the runner says.
#[derive(Debug)]
pub enum ToAgent {
    /// Run a command; output and [`FromAgent::Ended`] follow.
    Run(Job),
    /// Nothing to do. It comes with an interrupt, which is the point.
    Pulse,
    /// Power the outer guest off.
    PowerOff,
}

/// What the agent says.
#[derive(Debug)]
pub enum FromAgent {
    /// The agent is up and takes commands.
    Ready,
    /// A piece of the running command's output.
    Output(Stream, Vec<u8>),
    /// The command is over.
    Ended(Ended),
}

const RUN: u8 = b'R';
const PULSE: u8 = b'.';
const POWER_OFF: u8 = b'P';
const READY: u8 = b'r';
const OUT: u8 = b'o';
const ERR: u8 = b'e';
const ENDED: u8 = b'x';

impl ToAgent {
    /// Writes one frame.
    ///
    /// # Errors
    /// The port's, or a command longer than a frame.
    pub fn write(&self, port: &mut impl Write) -> Result<()> {
        match self {
            Self::Run(job) => frame(port, RUN, &serde_json::to_vec(job)?),
            Self::Pulse => frame(port, PULSE, &[]),
            Self::PowerOff => frame(port, POWER_OFF, &[]),
        }
    }

    /// Reads one frame.
    ///
    /// # Errors
    /// End of file (the runner is gone), or a malformed frame.
    pub fn read(port: &mut impl Read) -> Result<Self> {
        match unframe(port)? {
            (RUN, payload) => Ok(Self::Run(serde_json::from_slice(&payload)?)),
            (PULSE, _) => Ok(Self::Pulse),
            (POWER_OFF, _) => Ok(Self::PowerOff),
            (kind, _) => Err(unknown(kind)),
        }
    }
}

impl FromAgent {
    /// Writes one frame.
    ///
    /// # Errors
    /// The port's.
    pub fn write(&self, port: &mut impl Write) -> Result<()> {
        match self {
            Self::Ready => frame(port, READY, &[]),
            Self::Output(Stream::Out, bytes) => frame(port, OUT, bytes),
            Self::Output(Stream::Err, bytes) => frame(port, ERR, bytes),
            Self::Ended(ended) => frame(port, ENDED, &serde_json::to_vec(ended)?),
        }
    }

    /// Reads one frame.
    ///
    /// # Errors
    /// End of file (the outer guest is gone), a timeout of the port, or a malformed frame.
    pub fn read(port: &mut impl Read) -> Result<Self> {
        match unframe(port)? {
            (READY, _) => Ok(Self::Ready),
            (OUT, bytes) => Ok(Self::Output(Stream::Out, bytes)),
            (ERR, bytes) => Ok(Self::Output(Stream::Err, bytes)),
            (ENDED, payload) => Ok(Self::Ended(serde_json::from_slice(&payload)?)),
            (kind, _) => Err(unknown(kind)),
        }
    }
}

fn frame(port: &mut impl Write, kind: u8, payload: &[u8]) -> Result<()> {
    if payload.len() > MAX_FRAME {
        return Err(Error::new(ErrorKind::InvalidInput, "frame too long"));
    }
    let mut bytes = Vec::with_capacity(5 + payload.len());
    bytes.push(kind);
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(payload);
    port.write_all(&bytes)
}

fn unframe(port: &mut impl Read) -> Result<(u8, Vec<u8>)> {
    let mut header = [0; 5];
    port.read_exact(&mut header)?;
    let [kind, length @ ..] = header;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(Error::new(ErrorKind::InvalidData, "frame too long"));
    }
    let mut payload = vec![0; length];
    port.read_exact(&mut payload)?;
    Ok((kind, payload))
}

fn unknown(kind: u8) -> Error {
    Error::new(ErrorKind::InvalidData, format!("unknown frame kind {kind:#x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_port() {
        let mut port = Vec::new();
        FromAgent::Output(Stream::Err, b"x\0y".to_vec())
            .write(&mut port)
            .unwrap();
        FromAgent::Ended(Ended::Exited(3)).write(&mut port).unwrap();
        let mut port = port.as_slice();
        assert!(
            matches!(FromAgent::read(&mut port).unwrap(), FromAgent::Output(Stream::Err, b) if b == b"x\0y")
        );
        assert!(matches!(
            FromAgent::read(&mut port).unwrap(),
            FromAgent::Ended(Ended::Exited(3))
        ));
        assert!(FromAgent::read(&mut port).is_err());
    }

    #[test]
    fn a_long_frame_is_refused_before_it_is_read() {
        let bytes = [OUT, 0xff, 0xff, 0xff, 0xff];
        let error = FromAgent::read(&mut bytes.as_slice()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
    }
}
