//! Handshake, rings and in-flight region of one connection.

use super::{
    memory::Memory,
    ring::Ring,
    wire::{Connection, request},
};
use anyhow::{Context, Result, ensure};
use std::{
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
    time::Duration,
};

/// Protocol feature bits (vhost-user, "Protocol features").
pub mod protocol {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const MQ: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const GET_VRING_BASE_INFLIGHT: u64 = 1 << 20;
}

/// Device feature bits that every device may have (virtio 1.3, 6), and vhost-user's own.
pub mod virtio {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
}

/// What a front end chooses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Queues to start.
    pub queues: u16,
    /// Their size.
    pub ring_size: u16,
    /// Device features to take, where offered; VERSION_1 is always taken.
    pub features: u64,
    /// Protocol features to take, where offered.
    pub protocol: u64,
    /// Guest memory in bytes.
    pub memory: u64,
    /// For each answer.
    pub deadline: Duration,
}

impl Default for Options {
    fn default() -> Self {
        use protocol::{CONFIG, CONFIGURE_MEM_SLOTS, INFLIGHT_SHMFD, MQ, REPLY_ACK, RESET_DEVICE};
        Self {
            queues: 1,
            ring_size: 128,
            features: !(virtio::EVENT_IDX | virtio::INDIRECT_DESC),
            protocol: MQ | REPLY_ACK | CONFIG | INFLIGHT_SHMFD | RESET_DEVICE | CONFIGURE_MEM_SLOTS,
            memory: 64 << 20,
            deadline: super::DEADLINE,
        }
    }
}

/// The in-flight region, which the front end keeps for the next back end.
#[derive(Debug)]
pub struct Inflight {
    /// The back end's memfd.
    pub fd: OwnedFd,
    /// struct VhostUserInflight, as GET_INFLIGHT_FD answered it.
    pub description: Vec<u8>,
}

/// One back end, with its rings running.
#[derive(Debug)]
pub struct Session {
    /// The socket.
    pub connection: Connection,
    /// Device features that both sides took.
    pub features: u64,
    /// Protocol features that both sides took.
    pub protocol: u64,
    /// Queues that the back end has.
    pub queue_num: u64,
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// One a queue.
    pub rings: Vec<Ring>,
    /// Where the back end offers one.
    pub inflight: Option<Inflight>,
}

impl Session {
    /// The whole handshake over `socket`, with new memory and new rings.
    ///
    /// # Errors
    /// When the back end refuses, says nothing in time, or lacks VERSION_1.
    pub fn start(socket: UnixStream, options: &Options) -> Result<Self> {
        Self::start_in(socket, options, Arc::new(Memory::new(options.memory)?))
    }

    /// The whole handshake with new rings in `memory`.
    ///
    /// # Errors
    /// As [`Session::start`].
    pub fn start_in(socket: UnixStream, options: &Options, memory: Arc<Memory>) -> Result<Self> {
        let mut session = Self::negotiate(socket, options, memory)?;
        session.fetch_inflight(options)?;
        session.restart(options)
    }

    /// New rings from index 0, after the old ones were stopped.
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn restart(mut self, options: &Options) -> Result<Self> {
        self.rings.clear();
        self.make_rings(options)?;
        self.start_rings(&vec![0; usize::from(options.queues)])?;
        Ok(self)
    }

    /// Features, protocol features and memory; no ring yet.
    ///
    /// # Errors
    /// As [`Session::start`].
    pub fn negotiate(socket: UnixStream, options: &Options, memory: Arc<Memory>) -> Result<Self> {
        let mut connection = Connection::new(socket, options.deadline);
        let offered = connection.ask(request::GET_FEATURES, &[], &[])?.number()?;
        ensure!(
            offered & virtio::VERSION_1 != 0,
            "no VIRTIO_F_VERSION_1 in {offered:#x}"
        );
        ensure!(
            offered & virtio::PROTOCOL_FEATURES != 0,
            "no protocol features in {offered:#x}"
        );
        let protocol = connection
            .ask(request::GET_PROTOCOL_FEATURES, &[], &[])?
            .number()?
            & options.protocol;
        connection.tell(request::SET_PROTOCOL_FEATURES, &protocol.to_le_bytes(), &[])?;
        connection.acknowledges = protocol & protocol::REPLY_ACK != 0;
        connection.tell(request::SET_OWNER, &[], &[])?;
        let queue_num = if protocol & protocol::MQ != 0 {
            connection.ask(request::GET_QUEUE_NUM, &[], &[])?.number()?
        } else {
            1
        };
        let features = offered & (options.features | virtio::VERSION_1 | virtio::PROTOCOL_FEATURES);
        connection.tell(request::SET_FEATURES, &features.to_le_bytes(), &[])?;
        let mut session = Self {
            connection,
            features,
            protocol,
            queue_num,
            memory,
            rings: Vec::new(),
            inflight: None,
        };
        session.share_memory()?;
        Ok(session)
    }

    fn share_memory(&mut self) -> Result<()> {
        let fds = [self.memory.fd()];
        let slots = self.protocol & protocol::CONFIGURE_MEM_SLOTS != 0;
        let (number, mut payload) = if slots {
            (request::ADD_MEM_REG, 0_u64.to_le_bytes().to_vec())
        } else {
            (request::SET_MEM_TABLE, 1_u64.to_le_bytes().to_vec())
        };
        payload.extend(self.memory.region());
        self.connection.tell(number, &payload, &fds)
    }

    fn make_rings(&mut self, options: &Options) -> Result<()> {
        let event_idx = self.features & virtio::EVENT_IDX != 0;
        let indirect = self.features & virtio::INDIRECT_DESC != 0;
        let mut at = super::BASE;
        for _ in 0..options.queues {
            let ring = Ring::new(self.memory.clone(), at, options.ring_size, event_idx, indirect)?;
            at += Ring::footprint(options.ring_size).next_multiple_of(4096);
            self.rings.push(ring);
        }
        Ok(())
    }

    /// Guest memory behind the rings: free for data.
    #[must_use]
    pub fn data_start(&self) -> u64 {
        let ring = |ring: &Ring| Ring::footprint(ring.size()).next_multiple_of(4096);
        super::BASE + self.rings.iter().map(ring).sum::<u64>()
    }

    fn fetch_inflight(&mut self, options: &Options) -> Result<()> {
        if self.protocol & protocol::INFLIGHT_SHMFD == 0 {
            return Ok(());
        }
        let mut ask = vec![0; 16];
        ask.extend(options.queues.to_le_bytes());
        ask.extend(options.ring_size.to_le_bytes());
        let reply = self.connection.ask(request::GET_INFLIGHT_FD, &ask, &[])?;
        let fd = reply
            .fds
            .into_iter()
            .next()
            .context("GET_INFLIGHT_FD brought no descriptor")?;
        let inflight = Inflight {
            fd,
            description: reply.payload,
        };
        self.give_inflight(&inflight)?;
        self.inflight = Some(inflight);
        Ok(())
    }

    fn give_inflight(&mut self, inflight: &Inflight) -> Result<()> {
        let fds = [inflight.fd.as_fd()];
        self.connection
            .tell(request::SET_INFLIGHT_FD, &inflight.description, &fds)
    }

    fn start_rings(&mut self, bases: &[u16]) -> Result<()> {
        let mut rings = std::mem::take(&mut self.rings);
        let result = rings
            .iter_mut()
            .zip(bases)
            .enumerate()
            .try_for_each(|(index, (ring, base))| self.start_ring(index as u32, ring, *base));
        self.rings = rings;
        result
    }

    fn start_ring(&mut self, index: u32, ring: &mut Ring, base: u16) -> Result<()> {
        let state = |value: u32| [index.to_le_bytes(), value.to_le_bytes()].concat();
        let file = u64::from(index).to_le_bytes();
        let connection = &mut self.connection;
        connection.tell(request::SET_VRING_NUM, &state(u32::from(ring.size())), &[])?;
        connection.tell(request::SET_VRING_BASE, &state(u32::from(base)), &[])?;
        connection.tell(request::SET_VRING_ADDR, &ring.address_message(index), &[])?;
        let told =
            |connection: &mut Connection, request, fd: BorrowedFd<'_>| connection.tell(request, &file, &[fd]);
        told(connection, request::SET_VRING_CALL, ring.call.as_fd())?;
        told(connection, request::SET_VRING_ERR, ring.error.as_fd())?;
        told(connection, request::SET_VRING_KICK, ring.kick.as_fd())?;
        connection.tell(request::SET_VRING_ENABLE, &state(1), &[])
    }

    /// Goes on with a new back end: the same memory, rings and in-flight region.
    ///
    /// # Errors
    /// As [`Session::start`].
    pub fn resume(self, socket: UnixStream, options: &Options) -> Result<Self> {
        let mut next = Self::negotiate(socket, options, self.memory.clone())?;
        ensure!(
            next.features == self.features,
            "the new back end offers other features"
        );
        next.inflight = self.inflight;
        next.rings = self.rings;
        let bases: Vec<u16> = next.rings.iter().map(Ring::next_used).collect();
        next.go_on(&bases)?;
        Ok(next)
    }

    /// Starts the rings again, with the in-flight region that was kept; one without goes on at its base.
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn go_on(&mut self, bases: &[u16]) -> Result<()> {
        if let Some(inflight) = self.inflight.take() {
            self.give_inflight(&inflight)?;
            self.inflight = Some(inflight);
        }
        self.start_rings(bases)
    }

    /// Stops queue `index`; the index that it would go on from.
    ///
    /// # Errors
    /// When the back end does not answer.
    pub fn stop_ring(&mut self, index: u32) -> Result<u32> {
        let payload = [index.to_le_bytes(), 0_u32.to_le_bytes()].concat();
        let reply = self.connection.ask(request::GET_VRING_BASE, &payload, &[])?;
        let number = reply.payload.get(4..8).context("short reply to GET_VRING_BASE")?;
        Ok(u32::from_le_bytes([number[0], number[1], number[2], number[3]]))
    }

    /// `length` bytes of configuration space from `offset`.
    ///
    /// # Errors
    /// When the back end refuses or answers with another length.
    pub fn config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>> {
        let mut payload = Vec::new();
        for field in [offset, length, 0] {
            payload.extend(field.to_le_bytes());
        }
        payload.extend(vec![0; length as usize]);
        let reply = self.connection.ask(request::GET_CONFIG, &payload, &[])?;
        let data = reply.payload.get(12..).context("short reply to GET_CONFIG")?;
        ensure!(
            data.len() == length as usize,
            "{} bytes of configuration",
            data.len()
        );
        Ok(data.to_vec())
    }
}
