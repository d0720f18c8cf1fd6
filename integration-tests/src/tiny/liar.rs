//! A disk's back end that behaves for a while, most often until its rings run, and then does not.

use anyhow::{Context, Result, bail, ensure};
use nix::{
    cmsg_space,
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        eventfd::EventFd,
        memfd::{MFdFlags, memfd_create},
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg, shutdown},
    },
};
use std::{
    fs::File,
    io::{IoSlice, IoSliceMut},
    net::Shutdown,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::frontend_harness::{protocol, request, virtio};

const SET_BACKEND_REQ_FD: u32 = 21;
const CONFIG_CHANGE: u32 = 2;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;
/// Messages and signals of a flood.
const FLOOD: usize = 200_000;
/// For the peer's next message while it is alive.
const PATIENCE: Duration = Duration::from_secs(40);

/// What the back end does once a queue is to run; to its channel before it hangs up, and to one whose predecessors did
/// that, once all is negotiated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lie {
    /// An answer of half its length.
    WrongLength,
    /// An answer of 4 GiB.
    HugeReply,
    /// No answer.
    NoReply,
    /// The answer to another question.
    OutOfOrder,
    /// Messages that nobody asked for.
    Unasked,
    /// A flood of requests on the back-end channel, whose answers are not read.
    FloodRequests,
    /// A flood of configuration changes, each time another configuration.
    FloodChanges,
    /// A flood of bytes on the back-end channel that are no request.
    Garbage,
    /// Three descriptors with an answer that has none.
    Descriptors,
    /// A flood of interrupts, and an error signal for each.
    Interrupts,
    /// Noise over all parts of the ring.
    Noise,
    /// A used index that jumps.
    UsedIndex,
    /// An attempt to cut guest RAM short.
    Truncate,
    /// It hangs up.
    Close,
    /// The back-end channel shut down.
    ShutChannel,
    /// Half a request on the back-end channel.
    HalfRequest,
    /// No lie: a configuration change, which the front end is to look at next.
    Change,
}

impl Lie {
    /// At which request.
    fn moment(self) -> u32 {
        match self {
            Self::ShutChannel | Self::HalfRequest | Self::Change => request::GET_INFLIGHT_FD,
            _ => request::SET_VRING_ENABLE,
        }
    }
}

/// The back end's thread.
#[derive(Debug)]
pub struct Liar(JoinHandle<Result<()>>);

impl Liar {
    /// Starts one; the socket is the front end's.
    ///
    /// # Errors
    /// When there are no sockets.
    pub fn start(lie: Lie) -> Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self::on(ours, lie)?, theirs))
    }

    /// Starts one on its connection to a front end.
    ///
    /// # Errors
    /// When it is none.
    pub fn on(socket: UnixStream, lie: Lie) -> Result<Self> {
        socket.set_read_timeout(Some(PATIENCE))?;
        let backend = Backend {
            socket,
            lie,
            channel: None,
            memory: None,
            call: None,
            error: None,
            regions: Vec::new(),
            rings: [0; 3],
            capacity: 1 << 16,
        };
        Ok(Self(thread::spawn(move || backend.serve())))
    }

    /// Waits until the front end has hung up.
    ///
    /// # Errors
    /// When the back end itself failed: it did not come to its lie.
    pub fn finish(self) -> Result<()> {
        self.0
            .join()
            .map_err(|_| anyhow::anyhow!("the back end panicked"))?
    }
}

struct Backend {
    socket: UnixStream,
    lie: Lie,
    channel: Option<OwnedFd>,
    memory: Option<File>,
    call: Option<EventFd>,
    error: Option<EventFd>,
    /// Size, front end's address and place in the file of each region.
    regions: Vec<[u64; 3]>,
    /// The front end's addresses of the queue's descriptors, used ring and available ring.
    rings: [u64; 3],
    /// Of the disk, in sectors.
    capacity: u64,
}

struct Message {
    request: u32,
    flags: u32,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    fn long(&self, at: usize) -> u64 {
        let bytes = self
            .payload
            .get(at..at + 8)
            .and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    }
}

impl Backend {
    fn serve(mut self) -> Result<()> {
        let mut lied = false;
        while let Some(mut message) = self.receive()? {
            self.keep(&mut message);
            if message.request == self.lie.moment() && !lied {
                lied = true;
                if !self.lie(&message)? {
                    continue;
                }
            }
            self.answer(&message)?;
        }
        match lied {
            true => Ok(()),
            false => bail!("the front end did not come to the moment of the lie"),
        }
    }

    /// `None`: the front end has hung up.
    fn receive(&self) -> Result<Option<Message>> {
        let mut header = [0; HEADER];
        let mut control = cmsg_space!([RawFd; 8]);
        let mut vectors = [IoSliceMut::new(&mut header)];
        let flags = MsgFlags::MSG_WAITALL | MsgFlags::MSG_CMSG_CLOEXEC;
        let received = match recvmsg::<()>(self.socket.as_raw_fd(), &mut vectors, Some(&mut control), flags) {
            Ok(received) if received.bytes == HEADER => received,
            Ok(_) | Err(nix::Error::ECONNRESET) => return Ok(None),
            Err(error) => bail!("the front end says nothing: {error}"),
        };
        let fds = received.cmsgs()?.flat_map(|part| match part {
            ControlMessageOwned::ScmRights(numbers) => numbers,
            _ => Vec::new(),
        });
        let fds = fds.map(own).collect();
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut payload = vec![0; word(8) as usize];
        std::io::Read::read_exact(&mut &self.socket, &mut payload)?;
        Ok(Some(Message {
            request: word(0),
            flags: word(4),
            payload,
            fds,
        }))
    }

    fn send(&self, request: u32, payload: &[u8], fds: &[RawFd]) -> Result<()> {
        let mut message = Vec::from(request.to_le_bytes());
        message.extend((VERSION | REPLY).to_le_bytes());
        message.extend(u32::try_from(payload.len())?.to_le_bytes());
        message.extend(payload);
        transmit(self.socket.as_raw_fd(), &message, fds)
    }

    /// What a back end takes from a message.
    fn keep(&mut self, message: &mut Message) {
        let fd = message.fds.pop();
        match message.request {
            request::SET_MEM_TABLE => {
                self.memory = fd.map(File::from);
                // Behind the count: guest address, size, host address, offset in the file.
                let count = (message.payload.len() / 8).saturating_sub(1) / 4;
                let region = |index| [16, 24, 32].map(|at| message.long(index * 32 + at));
                self.regions = (0..count).map(region).collect();
            }
            request::SET_VRING_CALL => self.call = fd.map(event),
            request::SET_VRING_ERR => self.error = fd.map(event),
            SET_BACKEND_REQ_FD => self.channel = fd,
            request::SET_VRING_ADDR => self.rings = [8, 16, 24].map(|at| message.long(at)),
            _ => {}
        }
    }

    fn answer(&mut self, message: &Message) -> Result<()> {
        use protocol::{BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, MQ, REPLY_ACK};
        let number = |value: u64| value.to_le_bytes().to_vec();
        let payload = match message.request {
            request::GET_FEATURES => number(virtio::VERSION_1 | virtio::PROTOCOL_FEATURES),
            request::GET_PROTOCOL_FEATURES => number(MQ | REPLY_ACK | BACKEND_REQ | CONFIG | INFLIGHT_SHMFD),
            request::GET_QUEUE_NUM => number(1),
            request::GET_CONFIG => {
                let mut space = message.payload.clone();
                space[12..20].copy_from_slice(&self.capacity.to_le_bytes());
                self.capacity += 1;
                space
            }
            request::GET_VRING_BASE => message.payload.clone(),
            request::GET_INFLIGHT_FD => {
                let region = memfd(4096)?;
                let mut payload = message.payload.clone();
                payload[..8].copy_from_slice(&4096_u64.to_le_bytes());
                return self.send(message.request, &payload, &[region.as_raw_fd()]);
            }
            _ if message.flags & NEED_REPLY != 0 => number(0),
            _ => return Ok(()),
        };
        // A front end that has had enough has hung up; the next receive says so.
        let _ = self.send(message.request, &payload, &[]);
        Ok(())
    }

    /// The lie; true if the message is then answered as it should be.
    fn lie(&mut self, message: &Message) -> Result<bool> {
        let request = message.request;
        match self.lie {
            Lie::WrongLength => self.send(request, &[0; 4], &[])?,
            Lie::HugeReply => {
                let header = [request, VERSION | REPLY, u32::MAX]
                    .map(u32::to_le_bytes)
                    .concat();
                transmit(self.socket.as_raw_fd(), &header, &[])?;
                let _ = transmit(self.socket.as_raw_fd(), &[0; 65536], &[]);
            }
            Lie::NoReply => {}
            Lie::OutOfOrder => self.send(request::GET_FEATURES, &[0; 8], &[])?,
            Lie::Descriptors => {
                let region = memfd(4096)?;
                self.send(request, &[0; 8], &[region.as_raw_fd(); 3])?;
            }
            Lie::Unasked => {
                self.answer(message)?;
                for _ in 0..FLOOD {
                    if self.send(request::GET_FEATURES, &[0; 8], &[]).is_err() {
                        break;
                    }
                }
            }
            Lie::FloodRequests => self.flood(NEED_REPLY)?,
            Lie::FloodChanges => {
                self.answer(message)?;
                return self.change_often().map(|()| false);
            }
            Lie::Garbage => {
                let channel = self.channel.as_ref().context("no back-end channel")?;
                for _ in 0..FLOOD {
                    if transmit(channel.as_raw_fd(), &[0xA5; 512], &[]).is_err() {
                        break;
                    }
                }
            }
            Lie::Interrupts => {
                for event in [&self.call, &self.error] {
                    let event = event.as_ref().context("no eventfd")?;
                    for _ in 0..FLOOD {
                        // It may be full.
                        let _ = event.write(1);
                    }
                }
            }
            Lie::Noise => {
                for part in self.rings {
                    self.scribble(part, &[0xA5; 64])?;
                }
            }
            Lie::UsedIndex => {
                for index in (0..u16::MAX).step_by(777) {
                    self.scribble(self.rings[1] + 2, &index.to_le_bytes())?;
                    self.call.as_ref().context("no eventfd")?.write(1)?;
                }
            }
            Lie::Truncate => {
                let memory = self.memory.as_ref().context("no memory")?;
                if memory.set_len(4096).is_ok() {
                    bail!("guest RAM was cut short");
                }
            }
            Lie::Close => self.socket.shutdown(Shutdown::Both)?,
            Lie::ShutChannel | Lie::HalfRequest => {
                self.answer(message)?;
                let channel = self.channel.as_ref().context("no back-end channel")?;
                match self.lie {
                    Lie::ShutChannel => shutdown(channel.as_raw_fd(), nix::sys::socket::Shutdown::Both)?,
                    _ => transmit(channel.as_raw_fd(), &CONFIG_CHANGE.to_le_bytes(), &[])?,
                }
                self.socket.shutdown(Shutdown::Both)?;
            }
            Lie::Change => {
                self.answer(message)?;
                let channel = self.channel.as_ref().context("no back-end channel")?;
                let change = [CONFIG_CHANGE, VERSION, 0].map(u32::to_le_bytes).concat();
                transmit(channel.as_raw_fd(), &change, &[])?;
                let next = self.receive()?.context("the front end has hung up")?;
                ensure!(next.request == request::GET_CONFIG, "{} came next", next.request);
                self.answer(&next)?;
                self.socket.shutdown(Shutdown::Both)?;
            }
        }
        let answered = [
            Lie::FloodRequests,
            Lie::Garbage,
            Lie::Interrupts,
            Lie::Noise,
            Lie::UsedIndex,
            Lie::Truncate,
        ];
        Ok(answered.contains(&self.lie))
    }

    /// Configuration changes, until the channel takes no more; nobody reads the answers.
    fn flood(&self, flags: u32) -> Result<()> {
        let channel = self.channel.as_ref().context("no back-end channel")?;
        let change = [CONFIG_CHANGE, VERSION | flags, 0].map(u32::to_le_bytes).concat();
        for _ in 0..FLOOD {
            if transmit(channel.as_raw_fd(), &change, &[]).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Rounds of changes, each of which the front end reads again.
    fn change_often(&mut self) -> Result<()> {
        for _ in 0..100 {
            self.flood(0)?;
            match self.receive()? {
                Some(mut message) => {
                    self.keep(&mut message);
                    self.answer(&message)?;
                }
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Writes into guest RAM at an address of the front end's.
    fn scribble(&self, host: u64, bytes: &[u8]) -> Result<()> {
        let place = self.regions.iter().find_map(|[size, start, offset]| {
            let inside = host.checked_sub(*start).filter(|inside| inside < size)?;
            Some(inside + offset)
        });
        let memory = self.memory.as_ref().context("no memory")?;
        memory.write_all_at(bytes, place.context("the ring is not in RAM")?)?;
        Ok(())
    }
}

fn memfd(size: u64) -> Result<OwnedFd> {
    let fd = memfd_create(c"liar", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&fd, i64::try_from(size)?)?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))?;
    Ok(fd)
}

/// Sends without waiting: a front end that does not read is no reason to hang.
fn transmit(socket: RawFd, bytes: &[u8], fds: &[RawFd]) -> Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(socket, &[IoSlice::new(bytes)], control, flags, None)?;
    Ok(())
}

#[expect(unsafe_code, reason = "owns descriptors that came with a message")]
fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(number) }
}

#[expect(unsafe_code, reason = "takes a descriptor for the eventfd that it is")]
fn event(fd: OwnedFd) -> EventFd {
    // SAFETY: the vmm's are eventfds.
    unsafe { EventFd::from_owned_fd(fd) }
}
