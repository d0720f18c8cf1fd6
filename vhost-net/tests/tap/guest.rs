//! The guest's side: a driver with merged receive buffers and super-frames, over the front-end harness.

use anyhow::{Context, Result, ensure};
use integration_tests::frontend_harness::{Options, Segment, Session, request};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use vhost_net::header::{HEADER_SIZE, NetHeader};
use zerocopy::{FromBytes, IntoBytes};

const RX: usize = 0;
const TX: usize = 1;
/// Room for the longest frame.
const SLOT: u64 = 68 << 10;
const SLOTS: u64 = 64;
/// For any one frame.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// How receive buffers are made.
#[derive(Clone, Copy)]
pub struct Buffers {
    /// How many are posted.
    pub count: u16,
    /// Descriptors in each.
    pub segments: u32,
    /// Bytes in each descriptor.
    pub length: u32,
}

/// What Linux posts when buffers can be merged.
pub const MERGEABLE: Buffers = Buffers {
    count: 128,
    segments: 1,
    length: 1536,
};
/// What Linux posts when they cannot: room for a super-frame in one chain.
pub const LARGE: Buffers = Buffers {
    count: 16,
    segments: 16,
    length: 4352,
};

pub struct Guest {
    pub session: Session,
    options: Options,
    buffers: Buffers,
    receiving: BTreeMap<u16, u64>,
    sending: BTreeMap<u16, u64>,
    free: Vec<u64>,
    next_buffer: u64,
}

impl Guest {
    /// Connects with `features` and posts no receive buffer yet.
    pub fn connect(socket: UnixStream, features: u64, buffers: Buffers) -> Result<Self> {
        Self::with_queues(socket, features, buffers, 2)
    }

    /// Connects with this many queues; frames go through the first pair.
    pub fn with_queues(socket: UnixStream, features: u64, buffers: Buffers, queues: u16) -> Result<Self> {
        let options = Options {
            queues,
            ring_size: 256,
            features,
            ..Options::default()
        };
        let session = Session::start(socket, &options)?;
        let start = session.data_start();
        Ok(Self {
            session,
            options,
            buffers,
            receiving: BTreeMap::new(),
            sending: BTreeMap::new(),
            free: (0..SLOTS).map(|slot| start + slot * SLOT).collect(),
            next_buffer: start + SLOTS * SLOT,
        })
    }

    /// Goes on with another process, which knows nothing of this driver.
    pub fn resume(self, socket: UnixStream) -> Result<Self> {
        Ok(Self {
            session: self.session.resume(socket, &self.options)?,
            ..self
        })
    }

    /// Connects and fills the receive queue.
    pub fn start(socket: UnixStream, features: u64, buffers: Buffers) -> Result<Self> {
        let mut guest = Self::connect(socket, features, buffers)?;
        guest.post(buffers.count)?;
        Ok(guest)
    }

    /// Posts `count` more receive buffers.
    pub fn post(&mut self, count: u16) -> Result<()> {
        for _ in 0..count {
            let address = self.next_buffer;
            self.next_buffer += u64::from(self.buffers.segments * self.buffers.length);
            self.post_at(address)?;
        }
        self.session.rings[RX].notify().map(drop)
    }

    fn post_at(&mut self, address: u64) -> Result<()> {
        let Buffers { segments, length, .. } = self.buffers;
        let segment = |index| Segment {
            address: address + u64::from(index * length),
            length,
            writable: true,
        };
        let chain: Vec<Segment> = (0..segments).map(segment).collect();
        let head = self.session.rings[RX].push(&chain)?;
        self.receiving.insert(head, address);
        Ok(())
    }

    /// Queues a frame in `parts` descriptors, without a kick.
    pub fn queue(&mut self, header: NetHeader, frame: &[u8], parts: usize) -> Result<()> {
        let bytes = [header.as_bytes(), frame].concat();
        self.queue_bytes(&bytes, parts)
    }

    /// Queues anything as a frame with its header.
    pub fn queue_bytes(&mut self, bytes: &[u8], parts: usize) -> Result<()> {
        let address = self.free.pop().context("no transmit buffer left")?;
        self.session.memory.write(address, bytes)?;
        let size = bytes.len().div_ceil(parts).max(1);
        let mut chain: Vec<Segment> = Vec::new();
        for (index, part) in bytes.chunks(size).enumerate() {
            chain.push(Segment {
                address: address + (index * size) as u64,
                length: part.len() as u32,
                writable: false,
            });
        }
        let head = self.session.rings[TX].push(&chain)?;
        self.sending.insert(head, address);
        Ok(())
    }

    /// Kicks and waits until all that was queued was taken.
    pub fn flush(&mut self) -> Result<()> {
        self.session.rings[TX].notify()?;
        while !self.sending.is_empty() {
            let (head, _) = self.session.rings[TX].wait_used(DEADLINE)?;
            self.free.extend(self.sending.remove(&head));
        }
        Ok(())
    }

    /// Sends one frame.
    pub fn send(&mut self, header: NetHeader, frame: &[u8]) -> Result<()> {
        self.queue(header, frame, 2)?;
        self.flush()
    }

    /// The next frame, put together from its buffers, which are posted again.
    pub fn receive(&mut self, deadline: Duration) -> Result<(NetHeader, Vec<u8>)> {
        let mut bytes = self.buffer(deadline)?;
        let header = bytes
            .get(..HEADER_SIZE)
            .context("first buffer without a header")?;
        let header = NetHeader::read_from_bytes(header).ok().context("header")?;
        ensure!(header.num_buffers.get() > 0, "num_buffers is 0");
        for _ in 1..header.num_buffers.get() {
            let more = self
                .buffer(Duration::ZERO)
                .context("num_buffers exceeds what was used")?;
            bytes.extend(more);
        }
        self.session.rings[RX].notify()?;
        Ok((header, bytes.split_off(HEADER_SIZE)))
    }

    /// Lets the guest's frames come and go through pair `pair` from now on. Nothing may be under way
    /// on the one before, and each pair is taken once.
    pub fn use_pair(&mut self, pair: usize) {
        self.session.rings.swap(RX, 2 * pair);
        self.session.rings.swap(TX, 2 * pair + 1);
        self.receiving.clear();
    }

    /// Sends a command on the control queue `index`; the device's answer.
    pub fn control(&mut self, index: usize, command: &[u8]) -> Result<u8> {
        let address = self.free.pop().context("no buffer left")?;
        self.session.memory.write(address, command)?;
        let segment = |address, length, writable| Segment {
            address,
            length,
            writable,
        };
        // Slots are longer than any command that tests send.
        let answer = address + 32768;
        self.session.memory.write(answer, &[0xff])?;
        let chain = [
            segment(address, command.len() as u32, false),
            segment(answer, 1, true),
        ];
        self.session.rings[index].push(&chain)?;
        self.session.rings[index].notify()?;
        self.session.rings[index].wait_used(DEADLINE)?;
        self.free.push(address);
        Ok(self.session.memory.read(answer, 1)?[0])
    }

    /// Where the device's own requests arrive from now on.
    pub fn listen(&mut self) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(DEADLINE))?;
        let connection = &mut self.session.connection;
        connection.tell(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        Ok(ours)
    }

    /// Waits until the device signals queue `index`'s error eventfd.
    pub fn wait_error(&self, index: usize) -> Result<()> {
        let mut fds = [PollFd::new(
            self.session.rings[index].error.as_fd(),
            PollFlags::POLLIN,
        )];
        let ready = poll(&mut fds, PollTimeout::try_from(DEADLINE)?)?;
        ensure!(ready > 0, "no error signal in time");
        Ok(())
    }

    fn buffer(&mut self, deadline: Duration) -> Result<Vec<u8>> {
        let (head, length) = self.session.rings[RX].wait_used(deadline)?;
        let address = self.receiving.remove(&head).context("an unknown head")?;
        let room = self.buffers.segments * self.buffers.length;
        ensure!(length <= room, "{length} bytes in a buffer of {room}");
        let bytes = self.session.memory.read(address, length as usize)?;
        self.post_at(address)?;
        Ok(bytes)
    }
}
