//! A connection to one back end: negotiation, and the messages that start, stop and reset rings.

use super::backend_channel::BackendChannel;
use super::channel::{Channel, Exchange, Reply};
use super::error::{Error, ReplyProblem};
use super::inflight::InflightRegion;
use super::memory::MemoryTable;
use super::message::{Ack, Header, Inflight};
use super::rings::{QueueState, Ring};
use super::{Deadlines, MAX_QUEUES};
use nix::poll::PollFlags;
use nix::sys::eventfd::EventFd;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{
    FrontendReq, VHOST_USER_MAX_VRINGS, VhostUserConfig, VhostUserConfigFlags, VhostUserMemory,
    VhostUserMemoryRegion, VhostUserProtocolFeatures as Protocol, VhostUserSingleMemoryRegion,
    VhostUserVirtioFeatures, VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
};
use vm_memory::ByteValued;
use vm_spec::control::BACKEND_FDS;
use zerocopy::{FromBytes, IntoBytes};

const VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// SET_VRING_KICK and its like: the queue's index is the low byte.
const VRING_INDEX_MASK: u64 = 0xFF;
/// Between two looks at what a stopped back end has not completed.
const LOOK: Duration = Duration::from_millis(5);
/// Most regions in one SET_MEM_TABLE.
const MAX_TABLE_REGIONS: usize = 8;

/// The sockets of one back end, made for it alone: what another did to its own does not reach it.
#[derive(Debug)]
pub struct BackendSockets {
    /// The connected vhost-user socket.
    pub socket: OwnedFd,
    /// The channel for the back end's own requests, a Unix stream socketpair: our end,
    pub requests: OwnedFd,
    /// and the end that the back end is given.
    pub requests_peer: OwnedFd,
}

impl From<[OwnedFd; BACKEND_FDS]> for BackendSockets {
    fn from([socket, requests, requests_peer]: [OwnedFd; BACKEND_FDS]) -> Self {
        Self {
            socket,
            requests,
            requests_peer,
        }
    }
}

impl From<BackendSockets> for [OwnedFd; BACKEND_FDS] {
    fn from(sockets: BackendSockets) -> Self {
        [sockets.socket, sockets.requests, sockets.requests_peer]
    }
}

/// What a session needs besides its sockets.
#[derive(Clone)]
pub struct SessionOptions {
    /// Guest RAM.
    pub memory: Arc<MemoryTable>,
    /// How long to wait.
    pub deadlines: Deadlines,
    /// Readable when the vmm shuts down: every wait ends.
    pub cancel: Arc<EventFd>,
    /// The back end is one of ours: its in-flight region must be sealed.
    pub ours: bool,
}

/// A negotiated connection. After any error but [`Error::Refused`] the stream may be out of step
/// and the session must be dropped.
pub struct Session {
    channel: Channel,
    requests: BackendChannel,
    options: SessionOptions,
    features: u64,
    protocol: Protocol,
    queue_limit: Option<u64>,
    /// For one message.
    patience: Duration,
    /// For the whole operation that the message is part of: many slow steps must not add up.
    until: Instant,
}

impl Session {
    /// Negotiates everything that does not depend on the guest's driver.
    ///
    /// # Errors
    /// Any [`Error`]; [`Error::NoVersion1`] for a legacy back end.
    pub fn connect(sockets: BackendSockets, options: SessionOptions) -> Result<Self, Error> {
        let mut session = Self {
            channel: Channel::new(sockets.socket, Arc::clone(&options.cancel))?,
            requests: BackendChannel::default(),
            features: 0,
            protocol: Protocol::empty(),
            queue_limit: None,
            patience: options.deadlines.first_answer,
            until: Instant::now() + options.deadlines.drain,
            options,
        };
        session.agree_on_features()?;
        if session.has(Protocol::MQ) {
            let limit = session.get_u64(FrontendReq::GET_QUEUE_NUM)?;
            if !(1..=VHOST_USER_MAX_VRINGS).contains(&limit) {
                return Err(bad(FrontendReq::GET_QUEUE_NUM, ReplyProblem::Value(limit)));
            }
            session.queue_limit = Some(limit);
        }
        if session.has(Protocol::BACKEND_REQ) {
            let acks = session.has(Protocol::REPLY_ACK);
            session.requests = BackendChannel::new(sockets.requests, acks);
            let peer = Some(sockets.requests_peer.as_fd());
            session.set(FrontendReq::SET_BACKEND_REQ_FD, &[], peer)?;
        }
        session.share_memory()?;
        Ok(session)
    }

    fn agree_on_features(&mut self) -> Result<(), Error> {
        self.set(FrontendReq::SET_OWNER, &[], None)?;
        self.features = self.get_u64(FrontendReq::GET_FEATURES)?;
        // It has answered, so it runs: from here on each step has the short deadline.
        self.patience = self.options.deadlines.step;
        if self.features & VERSION_1 == 0 {
            return Err(Error::NoVersion1);
        }
        if self.features & PROTOCOL_FEATURES != 0 {
            let offered = self.get_u64(FrontendReq::GET_PROTOCOL_FEATURES)?;
            let known = Protocol::MQ
                | Protocol::REPLY_ACK
                | Protocol::CONFIG
                | Protocol::BACKEND_REQ
                | Protocol::INFLIGHT_SHMFD
                | Protocol::RESET_DEVICE
                | Protocol::CONFIGURE_MEM_SLOTS
                | Protocol::GET_VRING_BASE_INFLIGHT;
            let mut agreed = known & Protocol::from_bits_truncate(offered);
            // It makes no sense without a record, and must not be agreed on.
            if !agreed.contains(Protocol::INFLIGHT_SHMFD) {
                agreed.remove(Protocol::GET_VRING_BASE_INFLIGHT);
            }
            // REPLY_ACK holds from the next message on.
            self.set(FrontendReq::SET_PROTOCOL_FEATURES, agreed.bits().as_bytes(), None)?;
            self.protocol = agreed;
        }
        Ok(())
    }

    fn share_memory(&mut self) -> Result<(), Error> {
        let memory = Arc::clone(&self.options.memory);
        let regions = memory.regions();
        if self.has(Protocol::CONFIGURE_MEM_SLOTS)
            && self.get_u64(FrontendReq::GET_MAX_MEM_SLOTS)? >= regions.len() as u64
        {
            for r in regions {
                let region =
                    VhostUserSingleMemoryRegion::new(r.guest_address, r.size, r.host_address, r.memfd_offset);
                self.set(FrontendReq::ADD_MEM_REG, region.as_slice(), Some(memory.memfd()))?;
            }
            return Ok(());
        }
        if regions.len() > MAX_TABLE_REGIONS {
            return Err(Error::Successor("it takes no more than 8 memory regions"));
        }
        let mut payload = VhostUserMemory::new(regions.len() as u32).as_slice().to_vec();
        for r in regions {
            let region = VhostUserMemoryRegion::new(r.guest_address, r.size, r.host_address, r.memfd_offset);
            payload.extend_from_slice(region.as_slice());
        }
        let fds = vec![memory.memfd(); regions.len()];
        self.set_with_fds(FrontendReq::SET_MEM_TABLE, &payload, &fds)
    }

    /// The back end's virtio features, the front end's own bits left out.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features & !(PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL.bits())
    }

    /// Queues that the back end serves, when it says so (GET_QUEUE_NUM).
    #[must_use]
    pub fn queue_limit(&self) -> Option<u64> {
        self.queue_limit
    }

    /// Whether the back end keeps the configuration space (VHOST_USER_PROTOCOL_F_CONFIG).
    #[must_use]
    pub fn has_config(&self) -> bool {
        self.has(Protocol::CONFIG)
    }

    /// Reads the first `size` bytes of the configuration space. `None`: the back end has no space
    /// of that size (it answers with an empty payload).
    ///
    /// # Errors
    /// Any [`Error`].
    pub fn read_config(&mut self, size: usize) -> Result<Option<Vec<u8>>, Error> {
        self.begin();
        let request = FrontendReq::GET_CONFIG;
        let head = VhostUserConfig::new(0, size as u32, VhostUserConfigFlags::empty());
        let mut payload = head.as_slice().to_vec();
        payload.resize(payload.len() + size, 0);
        let reply = self.ask(request, &payload, self.patience)?;
        no_fd(request, &reply)?;
        let prefix = size_of::<VhostUserConfig>();
        if reply.payload.is_empty() || reply.payload.len() == prefix {
            return Ok(None);
        }
        expect_size(request, &reply, prefix + size)?;
        if reply.payload[..4] != [0; 4] || reply.payload[4..8] != (size as u32).to_ne_bytes() {
            return Err(bad(request, ReplyProblem::Value(size as u64)));
        }
        Ok(Some(reply.payload[prefix..].to_vec()))
    }

    /// Passes on what the driver wrote to the configuration space.
    ///
    /// # Errors
    /// Any [`Error`]; [`Error::Refused`] leaves the session usable.
    pub fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), Error> {
        self.begin();
        let head = VhostUserConfig::new(offset, data.len() as u32, VhostUserConfigFlags::empty());
        let payload = [head.as_slice(), data].concat();
        self.set(FrontendReq::SET_CONFIG, &payload, None)
    }

    /// Asks for an in-flight region for `queues` queues of at most `queue_size` entries; `None`
    /// where the back end has none.
    ///
    /// # Errors
    /// Any [`Error`].
    pub fn get_inflight(&mut self, queues: u16, queue_size: u16) -> Result<Option<InflightRegion>, Error> {
        if !self.has(Protocol::INFLIGHT_SHMFD) {
            return Ok(None);
        }
        self.begin();
        let request = FrontendReq::GET_INFLIGHT_FD;
        let wanted = Inflight {
            mmap_size: 0,
            mmap_offset: 0,
            num_queues: queues,
            queue_size,
            padding: [0; 4],
        };
        let reply = self.ask(request, wanted.as_bytes(), self.patience)?;
        expect_size(request, &reply, size_of::<Inflight>())?;
        let message = Inflight::read_from_bytes(&reply.payload).map_err(|_| {
            bad(
                request,
                ReplyProblem::Size {
                    expected: size_of::<Inflight>(),
                    got: reply.payload.len() as u32,
                },
            )
        })?;
        match reply.fd {
            Some(fd) => InflightRegion::accept(fd, message, wanted, self.options.ours).map(Some),
            // A region of no bytes: nothing is tracked.
            None if message.mmap_size == 0 => Ok(None),
            None => Err(bad(request, ReplyProblem::Fds)),
        }
    }

    /// Sends the driver's features and starts `rings`. Kicks that came before wait in their
    /// eventfds.
    ///
    /// # Errors
    /// Any [`Error`].
    pub fn start(
        &mut self,
        features: u64,
        rings: &[Ring],
        inflight: Option<&InflightRegion>,
    ) -> Result<(), Error> {
        self.begin();
        let features = features & self.features() | self.features & PROTOCOL_FEATURES;
        self.set(FrontendReq::SET_FEATURES, features.as_bytes(), None)?;
        if let Some(region) = inflight.filter(|_| self.has(Protocol::INFLIGHT_SHMFD)) {
            let description = region.description();
            self.set(
                FrontendReq::SET_INFLIGHT_FD,
                description.as_bytes(),
                Some(region.as_fd()),
            )?;
        }
        for ring in rings {
            self.configure(ring)?;
        }
        if self.features & PROTOCOL_FEATURES != 0 {
            for ring in rings {
                self.set_state(FrontendReq::SET_VRING_ENABLE, ring.index, 1)?;
            }
        }
        if !self.has(Protocol::REPLY_ACK) {
            // Nothing so far was confirmed: an answer to this shows that it was all taken in.
            self.get_u64(FrontendReq::GET_FEATURES)?;
        }
        Ok(())
    }

    fn configure(&mut self, ring: &Ring) -> Result<(), Error> {
        let index = u32::from(ring.index);
        let [descriptors, driver, device] = ring.addresses.areas().map(|area| area.get());
        self.set_state(
            FrontendReq::SET_VRING_NUM,
            ring.index,
            ring.addresses.size().into(),
        )?;
        self.set_state(FrontendReq::SET_VRING_BASE, ring.index, ring.base.into())?;
        let flags = VhostUserVringAddrFlags::empty();
        let addresses = VhostUserVringAddr::new(index, flags, descriptors, device, driver, 0);
        self.set(FrontendReq::SET_VRING_ADDR, addresses.as_slice(), None)?;
        let word = (u64::from(index) & VRING_INDEX_MASK).to_ne_bytes();
        let events = &ring.events;
        self.set(FrontendReq::SET_VRING_CALL, &word, Some(events.call.as_fd()))?;
        self.set(FrontendReq::SET_VRING_ERR, &word, Some(events.error.as_fd()))?;
        self.set(FrontendReq::SET_VRING_KICK, &word, Some(events.kick.as_fd()))
    }

    /// Stops queues and waits until each has drained. Where the back end keeps a record, what waits for something
    /// may stay in it (VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT).
    ///
    /// # Errors
    /// Any [`Error`]; [`Error::Timeout`] when one drain deadline passes for all of them.
    pub fn stop(&mut self, queues: impl Iterator<Item = u16>) -> Result<Vec<QueueState>, Error> {
        let request = FrontendReq::GET_VRING_BASE;
        let drain = self.options.deadlines.drain;
        self.begin();
        let mut states = Vec::new();
        for index in queues.take(MAX_QUEUES.into()) {
            let payload = VhostUserVringState::new(index.into(), 0);
            let reply = self.ask(request, payload.as_slice(), drain)?;
            no_fd(request, &reply)?;
            expect_size(request, &reply, size_of::<VhostUserVringState>())?;
            let words: [u8; 8] = reply.payload[..].try_into().unwrap_or_default();
            let [number, base] = [0, 4].map(|i| u32::from_ne_bytes(std::array::from_fn(|j| words[i + j])));
            let base = u16::try_from(base).map_err(|_| bad(request, ReplyProblem::Value(base.into())))?;
            if number != u32::from(index) {
                return Err(bad(request, ReplyProblem::Value(number.into())));
            }
            states.push(QueueState {
                index,
                next_avail: base,
            });
        }
        Ok(states)
    }

    /// Waits, after [`Session::stop`] and within its deadline, until all that was taken is `completed`: many back
    /// ends answer GET_VRING_BASE while they work.
    ///
    /// # Errors
    /// Any [`Error`]; [`Error::Timeout`] when the deadline passes.
    pub fn await_completion(&mut self, completed: impl Fn() -> bool) -> Result<(), Error> {
        let request = FrontendReq::GET_VRING_BASE;
        while !completed() {
            let look = Exchange::new(request, LOOK, self.until);
            match self.channel.wait(look, PollFlags::POLLIN, &mut self.requests) {
                Ok(()) => self.channel.check_idle()?,
                Err(Error::Timeout { .. }) if Instant::now() < self.until => {}
                Err(Error::Timeout { request, .. }) => {
                    let after = self.options.deadlines.drain;
                    return Err(Error::Timeout { request, after });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Brings a stopped device back to its first state. The indices of the `rings` that were started are set to 0 in
    /// any case: RESET_DEVICE leaves them as they were.
    ///
    /// # Errors
    /// Any [`Error`].
    pub fn reset(&mut self, rings: impl IntoIterator<Item = u16>) -> Result<(), Error> {
        self.begin();
        if self.has(Protocol::RESET_DEVICE) {
            self.set(FrontendReq::RESET_DEVICE, &[], None)?;
        }
        for index in rings {
            self.set_state(FrontendReq::SET_VRING_BASE, index, 0)?;
        }
        Ok(())
    }

    /// Asks for a sign of life.
    ///
    /// # Errors
    /// Any [`Error`]; [`Error::Timeout`] when none comes. A back end of someone else's may serve
    /// messages and disk on one thread, so that a slow disk delays its answer.
    pub fn ping(&mut self) -> Result<(), Error> {
        self.begin();
        let patience = match self.options.ours {
            true => self.options.deadlines.alive,
            false => self.options.deadlines.drain,
        };
        let request = FrontendReq::GET_FEATURES;
        let reply = self.ask(request, &[], patience)?;
        no_fd(request, &reply)?;
        u64_of(request, &reply).map(drop)
    }

    /// The socket, to be polled while nothing is asked.
    #[must_use]
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// The back-end channel, to be polled while nothing is asked.
    #[must_use]
    pub fn request_channel(&self) -> Option<BorrowedFd<'_>> {
        self.requests.as_fd()
    }

    /// Looks at the socket while no answer is due.
    ///
    /// # Errors
    /// [`Error::Closed`], or [`Error::Unasked`] when the back end talks unasked.
    pub fn check_idle(&mut self) -> Result<(), Error> {
        self.channel.check_idle()
    }

    /// Takes what came on the back-end channel, also during exchanges. True: the configuration
    /// has changed.
    pub fn take_config_change(&mut self) -> bool {
        self.requests.service();
        self.requests.take_config_changed()
    }

    /// From now on waits end when `cancel` is readable.
    pub fn set_cancel(&mut self, cancel: Arc<EventFd>) {
        self.channel.set_cancel(cancel);
    }

    /// Whether the back end keeps its requests in an in-flight region.
    #[must_use]
    pub fn has_inflight(&self) -> bool {
        self.has(Protocol::INFLIGHT_SHMFD)
    }

    /// Whether a stopped back end may leave requests in its record, on which it works no more
    /// (VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT).
    #[must_use]
    pub fn may_leave_requests(&self) -> bool {
        self.has(Protocol::GET_VRING_BASE_INFLIGHT)
    }

    /// Starts the clock of an operation of several messages.
    fn begin(&mut self) {
        self.until = Instant::now() + self.options.deadlines.drain;
    }

    fn has(&self, feature: Protocol) -> bool {
        self.protocol.contains(feature)
    }

    fn set_state(&mut self, request: FrontendReq, index: u16, value: u32) -> Result<(), Error> {
        let state = VhostUserVringState::new(index.into(), value);
        self.set(request, state.as_slice(), None)
    }

    fn get_u64(&mut self, request: FrontendReq) -> Result<u64, Error> {
        let reply = self.ask(request, &[], self.patience)?;
        no_fd(request, &reply)?;
        u64_of(request, &reply)
    }

    /// A request that has a reply of its own.
    fn ask(&mut self, request: FrontendReq, payload: &[u8], after: Duration) -> Result<Reply, Error> {
        let exchange = Exchange::new(request, after, self.until);
        let header = Header::request(request.into(), payload.len(), Ack::None);
        let message = [header.as_bytes(), payload].concat();
        self.channel.send(exchange, &message, &[], &mut self.requests)?;
        self.channel.receive(exchange, &mut self.requests)
    }

    /// A request without a reply of its own: confirmed where REPLY_ACK is agreed.
    fn set(&mut self, request: FrontendReq, payload: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        self.set_with_fds(request, payload, fd.as_slice())
    }

    fn set_with_fds(
        &mut self,
        request: FrontendReq,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let ack = if self.has(Protocol::REPLY_ACK) {
            Ack::Wanted
        } else {
            Ack::None
        };
        let exchange = Exchange::new(request, self.patience, self.until);
        let header = Header::request(request.into(), payload.len(), ack);
        let message = [header.as_bytes(), payload].concat();
        self.channel.send(exchange, &message, fds, &mut self.requests)?;
        if ack == Ack::None {
            return Ok(());
        }
        let reply = self.channel.receive(exchange, &mut self.requests)?;
        no_fd(request, &reply)?;
        match u64_of(request, &reply)? {
            0 => Ok(()),
            _ => Err(Error::Refused(request)),
        }
    }
}

fn bad(request: FrontendReq, problem: ReplyProblem) -> Error {
    Error::Reply { request, problem }
}

fn no_fd(request: FrontendReq, reply: &Reply) -> Result<(), Error> {
    match reply.fd {
        None => Ok(()),
        Some(_) => Err(bad(request, ReplyProblem::Fds)),
    }
}

fn expect_size(request: FrontendReq, reply: &Reply, expected: usize) -> Result<(), Error> {
    if reply.payload.len() == expected {
        return Ok(());
    }
    let got = reply.payload.len() as u32;
    Err(bad(request, ReplyProblem::Size { expected, got }))
}

fn u64_of(request: FrontendReq, reply: &Reply) -> Result<u64, Error> {
    expect_size(request, reply, 8)?;
    let bytes: [u8; 8] = reply.payload[..].try_into().unwrap_or_default();
    Ok(u64::from_ne_bytes(bytes))
}
