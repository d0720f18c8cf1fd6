//! Receive queues: from the TAP straight into the guest's buffers (virtio 1.3, 5.1.6.3 and 5.1.6.4).
//!
//! A frame's length is known only after it was read. So buffers for the frames that are expected are
//! gathered first, and a private spill buffer behind them takes the end of a longer one. Such a frame
//! waits in the spill buffer until the driver made enough buffers available: none is lost, and while
//! it waits, later frames wait in the kernel's queue. A driver whose buffers are never enough loses
//! the frame after a while (`GRACE`), not the link.

mod discard;
mod expectation;
mod head;

use crate::buffers::{FrameBuffers, MAX_SEGMENTS, SliceStorage, Storage};
use crate::counters::{Batch, Counters, Drop};
use crate::header::{Cut, HEADER_SIZE, MAX_FRAME, NetHeader};
use crate::link::Link;
use crate::offload::Offloads;
use crate::pacer::Pacer;
use crate::steering::Running;
use expectation::Expectation;
use head::Head;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::collections::VecDeque;
use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost_daemon::{Chain, QueueHandler, Ring, RingFault, Wait};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MTU;
use vm_memory::VolatileSlice;
use zerocopy::IntoBytes;

/// The longest frame with its header.
const LONGEST: usize = HEADER_SIZE + MAX_FRAME;
/// Frames after which the driver is shown what it has, so that it works while we read on.
const PUBLISH_EVERY: usize = 16;

/// Frames after which the worker may interrupt the driver and look after its other duties. Bounds
/// the work that a flood of frames, each dropped for want of room, can cause at a time.
const MOST_FRAMES: usize = 64;

/// How long a frame that lacks room waits for the driver's next buffer. Far above what a busy or
/// paused driver takes, as a frame is lost to it.
const GRACE: Duration = Duration::from_secs(2);

/// One receive queue.
pub struct ReceiveQueue {
    pacer: Pacer,
    counters: Arc<Counters>,
    batch: Batch,
    link: Arc<Link>,
    running: Running,
    offloads: Offloads,
    /// Taken from the ring, in order, for the next frames.
    chains: VecDeque<Chain>,
    /// Bytes that they hold.
    room: usize,
    spill: Vec<u8>,
    /// It lies in `spill`, whole.
    waiting: Option<Waiting>,
    /// Room for which a frame was given up: until there is more, no frame waits that needs more.
    hopeless: usize,
    timer: TimerFd,
    expected: Expectation,
    /// `--mtu`.
    mtu: Option<u16>,
    /// The longest frame of the MTU that the driver was told, with its header and no tag.
    longest_whole: usize,
    storage: Storage,
    slices: SliceStorage,
}

/// A frame that was read.
#[derive(Clone, Copy, Debug)]
struct Frame {
    /// In bytes, with its header.
    length: usize,
    /// What it stands for.
    cut: Cut,
}

/// A frame that waits for buffers.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    frame: Frame,
    /// Since there was last a new buffer, and how much room there was.
    since: Option<(Instant, usize)>,
}

/// What became of one attempt to read.
enum Read {
    Frame(Frame),
    /// A frame that the driver must not get.
    Refused,
    Nothing(Wait),
}

impl ReceiveQueue {
    /// A queue that reads from the pacer's TAP for a driver that is offered `mtu`. Before lockdown.
    ///
    /// # Errors
    /// When the kernel gives no timer.
    pub fn new(
        pacer: Pacer,
        counters: Arc<Counters>,
        link: Arc<Link>,
        running: Running,
        mtu: Option<u16>,
    ) -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self {
            pacer,
            counters,
            batch: Batch::default(),
            link,
            running,
            offloads: Offloads::default(),
            chains: VecDeque::new(),
            room: 0,
            spill: Vec::new(),
            waiting: None,
            hopeless: 0,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            expected: Expectation::default(),
            mtu,
            longest_whole: usize::MAX,
            storage: Storage::default(),
            slices: SliceStorage::default(),
        })
    }

    /// Takes chains until they hold `bytes`; returns whether they do. No more of each is read than it needs for
    /// `each`.
    fn gather(&mut self, ring: &mut Ring, bytes: usize, each: usize) -> Result<bool, RingFault> {
        while self.room < bytes {
            let Some(chain) = ring.pop_enough(each)? else {
                return Ok(false);
            };
            check(&chain)?;
            self.room += chain.writable_length();
            self.chains.push_back(chain);
        }
        Ok(true)
    }

    /// Gathers for the next frame. Unless buffers can be merged it must fit one chain, of which Linux makes 19
    /// descriptors: what of them a short frame does not need is not looked at.
    fn gather_expected(&mut self, ring: &mut Ring) -> Result<(), RingFault> {
        let expected = self.expected.bytes();
        if self.offloads.mergeable() {
            return self.gather(ring, expected, usize::MAX).map(drop);
        }
        if self.room > 0 && self.room < expected {
            self.read_rest(ring)?;
        }
        self.gather(ring, 1, expected).map(drop)
    }

    /// Reads the only chain to its end.
    fn read_rest(&mut self, ring: &mut Ring) -> Result<(), RingFault> {
        if let Some(chain) = self.chains.front_mut()
            && ring.read_rest(chain)?
        {
            check(chain)?;
            self.room = chain.writable_length();
        }
        Ok(())
    }

    /// Reads one frame into the gathered chains. A frame that is too long for them is in the spill
    /// buffer afterwards, from its first byte on.
    fn read(&mut self) -> Read {
        let most = if self.offloads.mergeable() {
            self.chains.len()
        } else {
            1
        };
        let mut slices = self.slices.take();
        // Each segment costs the kernel a look: no more of long chains than the frame may need.
        let mut left = self.expected.bytes();
        for chain in self.chains.iter().take(most) {
            chain.writable_slices(0, left, &mut slices);
            left = left.saturating_sub(chain.writable_length());
        }
        let mut buffers = FrameBuffers::from_storage(std::mem::take(&mut self.storage));
        for slice in &slices {
            if !buffers.push_guest(slice, MAX_SEGMENTS - 1) {
                break;
            }
        }
        let room = buffers.length();
        if room < LONGEST {
            self.spill.resize(LONGEST, 0);
            buffers.push_private(&mut self.spill[room..]);
        }
        let result = read_retrying(&self.pacer, &buffers);
        self.storage = buffers.into_storage();
        let read = result.map(|length| {
            let cut = self.cut(length, &slices)?;
            Some(Frame { length, cut })
        });
        if let Ok(Some(frame)) = read
            && frame.length > room
        {
            let mut done = 0;
            for slice in &slices {
                let end = room.min(done + slice.len());
                done += slice.copy_to(&mut self.spill[done..end]);
            }
            self.waiting = Some(Waiting { frame, since: None });
        }
        self.slices.keep(slices);
        match read {
            Ok(Some(frame)) => Read::Frame(frame),
            Ok(None) => {
                let longer = "longer than the guest's MTU";
                self.counters.receive.dropped(Drop::Mtu, &longer);
                Read::Refused
            }
            Err(error) => Read::Nothing(self.failed(&error)),
        }
    }

    /// What the frame stands for that was just read, in so far as somebody counts it; none: it is longer than
    /// the driver's MTU.
    fn cut(&self, length: usize, slices: &[VolatileSlice<'_>]) -> Option<Cut> {
        let excess = length.saturating_sub(self.longest_whole);
        if excess == 0 && !self.pacer.is_limited() {
            return Some(Cut::WHOLE);
        }
        let head = Head::copy(slices, &self.spill);
        let fits = excess == 0 || head.is_segmented_or_tagged(excess);
        fits.then(|| head.cut(length - HEADER_SIZE))
    }

    fn failed(&mut self, error: &io::Error) -> Wait {
        if error.kind() == io::ErrorKind::WouldBlock {
            return self.pacer.blocked();
        }
        self.counters.receive.dropped(Drop::Interface, error);
        if self.link.suspect(error) {
            return self.pacer.unusable();
        }
        // The kernel took a frame off its queue that it could not hand over: the next one may do.
        self.pacer.blocked()
    }

    /// Places the frame that waits in the spill buffer, or drops it. False: the driver has to make
    /// more buffers available first.
    fn place_waiting(&mut self, ring: &mut Ring, waiting: Waiting) -> Result<bool, RingFault> {
        let length = waiting.frame.length;
        if !self.offloads.mergeable() {
            self.read_rest(ring)?;
            if self
                .chains
                .front()
                .is_none_or(|one| one.writable_length() < length)
            {
                self.give_up(Drop::Buffer, &"longer than the guest's buffer");
                return Ok(true);
            }
        } else if !self.gather(ring, length, usize::MAX)? {
            let room = self.room;
            // With all of the ring's chains in our hands there is no more to wait for.
            let never = ring.is_exhausted() || room <= self.hopeless;
            let late = waiting
                .since
                .is_some_and(|(at, had)| had == room && at.elapsed() >= GRACE);
            if never || late {
                self.hopeless = room;
                self.give_up(Drop::Buffer, &"longer than all of the guest's buffers together");
                return Ok(true);
            }
            self.wait_for_room(waiting, room);
            return Ok(false);
        }
        self.hopeless = 0;
        let mut done = 0;
        for chain in &self.chains {
            done += chain.write_at(0, &self.spill[done..length]);
            if done >= length {
                break;
            }
        }
        self.waiting = None;
        self.complete(ring, waiting.frame);
        Ok(true)
    }

    /// Drops the frame in the spill buffer; it waits no longer.
    fn give_up(&mut self, reason: Drop, why: &dyn Display) {
        self.waiting = None;
        self.counters.receive.dropped(reason, why);
    }

    /// Sets the timer anew where there is more room than before.
    fn wait_for_room(&mut self, waiting: Waiting, room: usize) {
        if waiting.since.is_none_or(|(_, had)| had != room) {
            self.waiting = Some(Waiting {
                since: Some((Instant::now(), room)),
                ..waiting
            });
            let expiry = Expiration::OneShot(TimeSpec::from_duration(GRACE));
            if let Err(error) = self.timer.set(expiry, TimerSetTimeFlags::empty()) {
                tracing::warn!(%error, "cannot arm the timer of a frame that waits");
            }
        }
    }

    /// Gives the driver the first chains, which hold this frame.
    fn complete(&mut self, ring: &mut Ring, Frame { length, cut }: Frame) {
        let mut count: u16 = 0;
        let mut room = 0;
        for chain in &self.chains {
            if room >= length {
                break;
            }
            room += chain.writable_length();
            count += 1;
        }
        if let Some(first) = self.chains.front() {
            self.finish_header(first, count);
        }
        let mut left = length;
        for chain in self.chains.drain(..usize::from(count)) {
            self.room -= chain.writable_length();
            let written = left.min(chain.writable_length());
            left -= written;
            ring.complete(chain, written as u32);
        }
        self.pacer.passed(length - HEADER_SIZE, cut);
        self.batch.passed(length - HEADER_SIZE);
    }

    /// Passes on what the TAP has, as far as buffers, limits and [`MOST_FRAMES`] allow.
    fn receive(&mut self, ring: &mut Ring) -> Result<Wait, RingFault> {
        let (mut longest, mut frames) = (0, 0);
        let wait = loop {
            let up = self.link.is_up();
            if self.waiting.is_some() && !up {
                self.give_up(Drop::Interface, &"the link is down");
            }
            if self.waiting.is_some() && self.pacer.is_detached() {
                self.give_up(Drop::Interface, &"the driver uses its queue no longer");
            }
            if let Some(waiting) = self.waiting
                && !self.place_waiting(ring, waiting)?
            {
                // The timer is the source meanwhile.
                break Wait::AVAILABLE_OR_READABLE;
            }
            if let Some(wait) = self.pacer.wait() {
                break wait;
            }
            if frames == MOST_FRAMES {
                // The TAP stays readable: there is another call at once.
                break self.pacer.blocked();
            }
            if !up {
                frames += 1;
                match self.discard(&"the link is down") {
                    Some(wait) => break wait,
                    None => continue,
                }
            }
            self.gather_expected(ring)?;
            if self.chains.is_empty() {
                break Wait::AVAILABLE;
            }
            match self.read() {
                Read::Nothing(wait) => break wait,
                Read::Refused => frames += 1,
                Read::Frame(frame) => {
                    longest = longest.max(frame.length);
                    frames += 1;
                    if self.waiting.is_none() {
                        self.complete(ring, frame);
                    }
                    if frames % PUBLISH_EVERY == 0 {
                        ring.publish()?;
                    }
                }
            }
        };
        self.expected.learn(longest);
        Ok(wait)
    }

    /// The kernel wrote the header, save `num_buffers`. Without GUEST_CSUM it may still say that a
    /// checksum is known to be right, which the driver must not see (virtio 1.3, 5.1.6.4.1).
    fn finish_header(&self, first: &Chain, count: u16) {
        let whole = NetHeader {
            num_buffers: count.into(),
            ..NetHeader::default()
        };
        let bytes = whole.as_bytes();
        let from = if self.offloads.guest_csum() {
            HEADER_SIZE - 2
        } else {
            0
        };
        first.write_at(from, &bytes[from..]);
    }
}

fn check(chain: &Chain) -> Result<(), RingFault> {
    if chain.readable_length() > 0 || chain.writable_length() == 0 {
        return Err(RingFault::Request(
            "a receive buffer must be writable, and only that",
        ));
    }
    Ok(())
}

fn read_retrying(pacer: &Pacer, buffers: &FrameBuffers<'_>) -> io::Result<usize> {
    loop {
        match pacer.tap().read_frame(buffers) {
            Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
            Ok(length) if length < HEADER_SIZE => return Err(Errno::EIO.into()),
            result => return result,
        }
    }
}

impl QueueHandler for ReceiveQueue {
    fn start(&mut self, features: u64) {
        self.offloads = Offloads::new(features);
        let mtu = self.mtu.filter(|_| features & (1 << VIRTIO_NET_F_MTU) != 0);
        self.longest_whole = mtu.map_or(usize::MAX, head::longest_whole);
        self.waiting = None;
        self.hopeless = 0;
        self.expected = Expectation::default();
    }

    /// A driver that goes on takes what it took.
    fn resume(&mut self, index: u16) {
        if self.running.take_unfit() && index == 0 {
            self.discard_unfit();
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        match self.waiting {
            Some(_) => Some(self.timer.as_fd()),
            None => Some(self.pacer.source()),
        }
    }

    fn is_ready(&mut self) -> bool {
        let source = self.source();
        source.is_some_and(|source| {
            let mut fds = [PollFd::new(source, PollFlags::POLLIN)];
            ppoll(&mut fds, Some(TimeSpec::from_duration(Duration::ZERO)), None).is_ok_and(|ready| ready > 0)
        })
    }

    fn process(&mut self, ring: &mut Ring) -> Result<Wait, RingFault> {
        self.running.set(true);
        let result = self.receive(ring);
        self.counters.receive.add(&mut self.batch);
        result
    }

    fn drain(&mut self, ring: &mut Ring) -> Result<(), RingFault> {
        self.running.set(false);
        self.waiting = None;
        self.room = 0;
        while let Some(chain) = self.chains.pop_back() {
            ring.put_back(chain)?;
        }
        Ok(())
    }
}
