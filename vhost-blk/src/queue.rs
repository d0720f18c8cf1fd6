//! One request queue: takes what is available, executes it, completes it.
//!
//! Requests that only move data, on a range that lies in one piece in the host's file, go through the
//! ring where there is one; all others are done by calls before `process` returns. What the host fails
//! is completed with an error, or kept and tried again (`--on-error`).

use crate::counters::{Operation, QueueCounters};
use crate::flusher::Flushes;
use crate::image::{Buffers, Image, Resolved, Way, read_at_once};
use crate::io::{Direction, RestrictedRing, Transfer};
use crate::outcome::{Done, Failure};
use crate::pieces::in_pieces;
use crate::request::{Request, Status};
use crate::settings::{OnError, Settings};
use jailer::sandbox::end;
use nix::errno::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost_daemon::faults::{self, Step};
use vhost_daemon::{Chain, QueueHandler, Ring, RingFault, Wait};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES};

/// Bytes moved by calls before the driver hears of them: it prepares more while the next ones move.
const MOST_UNPUBLISHED: usize = 256 << 10;
/// A round that has lasted so long takes no more: 256 requests that each clear 64 MiB would keep what is done from
/// the driver, and this thread from its orders, for minutes.
const LONG_ROUND: Duration = Duration::from_millis(1);
/// A flush that takes longer gains nothing by what two wake-ups cost.
const SHORT_FLUSH: Duration = Duration::from_millis(1);
/// Between two tries of what the host failed, under `--on-error=stop`.
const RETRY: Duration = Duration::from_millis(500);

/// A request that waits for something: that the host, which failed it, is able again, or for a flush.
struct Parked {
    chain: Chain,
    taken: Instant,
}

/// The handler of one queue; all queues share the image, which lives as long as the process, so that
/// transfers under way may refer to it.
pub(crate) struct BlkQueue {
    index: usize,
    image: &'static dyn Image,
    settings: Settings,
    counters: Arc<QueueCounters>,
    features: u64,
    uring: Option<RestrictedRing>,
    flushes: Option<Flushes>,
    /// What waits for those, the oldest first.
    flushing: VecDeque<Parked>,
    /// Whether the driver asked for something else while the last flush ran.
    is_busy: bool,
    /// How long that took.
    flush_time: Duration,
    /// Bytes moved by calls in this round.
    moved: usize,
    /// The end of the latest request done by calls, and so the start of the next.
    clock: Instant,
    parked: VecDeque<Parked>,
    retry_at: Instant,
}

impl BlkQueue {
    pub(crate) fn new(
        index: usize,
        image: &'static dyn Image,
        settings: Settings,
        counters: Arc<QueueCounters>,
        uring: Option<RestrictedRing>,
        flushes: Option<Flushes>,
    ) -> Self {
        let now = Instant::now();
        Self {
            index,
            image,
            settings,
            counters,
            features: 0,
            uring,
            flushes,
            flushing: VecDeque::new(),
            is_busy: false,
            flush_time: Duration::MAX,
            moved: 0,
            clock: now,
            parked: VecDeque::new(),
            retry_at: now,
        }
    }

    fn negotiated(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Executes the request in `chain`, or begins it.
    fn take(&mut self, chain: Chain, ring: &mut Ring) -> Result<(), RingFault> {
        if chain.writable_length() == 0 {
            return Err(RingFault::Request("a block request has no room for its status"));
        }
        let request = match Request::read(&chain, self.image.capacity()) {
            Ok(request) => request,
            Err(status) => {
                self.settings.limits.passed(0);
                let done = Done::new(Operation::Other, 0, Err(status.into()));
                self.settle(chain, self.clock, &done, ring);
                return Ok(());
            }
        };
        self.settings.limits.passed(request.data_length());
        faults::point(Step::BeforeSubmit);
        let Some(chain) = self.begin(chain, &request, ring) else {
            faults::point(Step::AfterSubmit);
            return Ok(());
        };
        let done = self.execute(&request, &chain);
        if done.operation == Operation::Flush {
            self.is_busy = ring.has_available().unwrap_or(true);
        }
        faults::point(Step::AfterSubmit);
        self.moved += done.bytes;
        self.conclude(chain, done, ring);
        Ok(())
    }

    /// Whether there is anything, or likely to be soon, that a flush by this thread would hold up. A driver that does
    /// nothing else during a short one has its answer sooner from this thread than from another.
    fn others_wait(&self, ring: &Ring) -> bool {
        // More than the flush itself is held, or was completed and not told yet.
        self.is_busy
            || self.flush_time > SHORT_FLUSH
            || ring.held() > 1
            || ring.has_unpublished()
            || ring.has_available().unwrap_or(true)
    }

    /// Begins a flush, or a transfer through the ring, unless what it reads is there at once; gives the chain back
    /// where it has to be done by calls.
    fn begin(&mut self, chain: Chain, request: &Request, ring: &mut Ring) -> Option<Chain> {
        let flush = self.negotiated(VIRTIO_BLK_F_FLUSH);
        if let (Request::Flush, Some(flushes)) = (request, &self.flushes)
            && self.others_wait(ring)
        {
            flushes.begin();
            self.is_busy = !self.flushing.is_empty();
            let taken = self.clock;
            self.flushing.push_back(Parked { chain, taken });
            return None;
        }
        self.is_busy |= !self.flushing.is_empty();
        let Some(uring) = &mut self.uring else {
            return Some(chain);
        };
        let (direction, offset, length) = match *request {
            Request::In { offset, length } => (Direction::Read, offset, length),
            Request::Out { offset, length } if flush && uring.writes() => (Direction::Write, offset, length),
            _ => return Some(chain),
        };
        let resolved = match direction {
            Direction::Read => self.image.resolve_read(offset, length as u64),
            Direction::Write => self.image.resolve_write(offset, length as u64),
        };
        let (extent, guard) = match resolved {
            Ok(Resolved::Mapped(extent, guard)) if extent.len == length as u64 => (extent, guard),
            _ => return Some(chain),
        };
        let at_once = match (extent.way, direction) {
            (Way::Ring, _) => 0,
            (Way::Attempt, Direction::Read) => chain.with_writable(0, length, |slices| {
                // What went wrong, the ring will tell.
                read_at_once(extent.file, Buffers::new(slices), extent.offset).unwrap_or(0)
            }),
            (Way::Attempt, Direction::Write) | (Way::Calls, _) => return Some(chain),
        };
        if at_once == length {
            self.moved += length;
            self.conclude(chain, Done::new(Operation::Read, length, Ok(())), ring);
            return None;
        }
        let transfer = Transfer {
            chain,
            direction,
            at_once,
            length: length - at_once,
            taken: self.clock,
        };
        let refused = uring.push(transfer, extent.file, extent.offset + at_once as u64, guard);
        refused.err().map(|transfer| transfer.chain)
    }

    /// Carries a request out by calls.
    fn execute(&self, request: &Request, chain: &Chain) -> Done {
        use Operation as O;
        match request {
            Request::In { offset, length } => {
                let read = in_pieces(*offset, *length as u64, |at, length| {
                    let skip = (at - offset) as usize;
                    chain.with_writable(skip, length as usize, |slices| self.image.read(slices, at))
                });
                Done::new(O::Read, *length, read.map_err(Failure::from))
            }
            Request::Out { offset, length } => {
                let written = faults::write().and_then(|()| {
                    in_pieces(*offset, *length as u64, |at, length| {
                        let skip = Request::HEADER_LENGTH + (at - offset) as usize;
                        chain.with_readable(skip, length as usize, |slices| self.image.write(slices, at))
                    })
                });
                let written = written.and_then(|()| self.write_through());
                Done::new(O::Write, *length, written.map_err(Failure::from))
            }
            Request::Flush => {
                faults::point(Step::Flush);
                Done::new(O::Flush, 0, self.image.flush().map_err(Failure::from))
            }
            Request::GetId { length } => {
                let mut id = [0; crate::options::SERIAL_LENGTH];
                let serial = &self.settings.serial;
                id[..serial.len()].copy_from_slice(serial);
                chain.write_at(0, &id[..*length]);
                Done::new(O::Other, *length, Ok(()))
            }
            Request::Discard(_) => Done::new(O::Discard, 0, self.clear(request)),
            Request::WriteZeroes(_) => Done::new(O::WriteZeroes, 0, self.clear(request)),
        }
    }

    /// DISCARD and WRITE_ZEROES.
    fn clear(&self, request: &Request) -> Result<(), Failure> {
        match request {
            Request::Discard(ranges) => {
                self.check_offered(VIRTIO_BLK_F_DISCARD)?;
                for range in ranges {
                    in_pieces(range.offset, range.length, |at, length| {
                        self.image.discard(at, length)
                    })?;
                }
            }
            Request::WriteZeroes(ranges) => {
                self.check_offered(VIRTIO_BLK_F_WRITE_ZEROES)?;
                for range in ranges {
                    in_pieces(range.offset, range.length, |at, length| {
                        self.image.write_zeroes(at, length, range.unmap)
                    })?;
                }
                self.write_through()?;
            }
            _ => {}
        }
        Ok(())
    }

    fn check_offered(&self, bit: u32) -> Result<(), Status> {
        if !self.negotiated(bit) {
            return Err(Status::UNSUPP);
        }
        if self.image.read_only() {
            return Err(Status::IOERR);
        }
        Ok(())
    }

    /// A driver that did not accept FLUSH believes that a completed write is durable (virtio 1.3,
    /// 5.2.6.2).
    fn write_through(&self) -> io::Result<()> {
        if self.negotiated(VIRTIO_BLK_F_FLUSH) {
            Ok(())
        } else {
            self.image.flush()
        }
    }

    /// Ends a request that was done by calls.
    fn conclude(&mut self, chain: Chain, done: Done, ring: &mut Ring) {
        let taken = std::mem::replace(&mut self.clock, Instant::now());
        self.settings.trouble.saw(&done);
        if self.is_to_wait(&done) {
            self.park(chain, taken);
        } else {
            self.settle(chain, taken, &done, ring);
        }
    }

    /// A flush that failed may have dropped what it was to write: another one that succeeds would say
    /// nothing. It is never tried again.
    fn is_to_wait(&self, done: &Done) -> bool {
        self.settings.on_error == OnError::Stop
            && done.operation != Operation::Flush
            && done.outcome.as_ref().is_err_and(Failure::may_pass)
    }

    fn park(&mut self, chain: Chain, taken: Instant) {
        if self.parked.is_empty() {
            tracing::warn!(
                queue = self.index,
                "the host fails a request: the queue stops until it succeeds"
            );
            self.retry_at = Instant::now() + RETRY;
        }
        self.settings.trouble.waits();
        self.parked.push_back(Parked { chain, taken });
        self.counters.set_stopped(self.parked.len());
    }

    /// Tries what the host failed again, in order, as far as it succeeds.
    fn retry(&mut self, ring: &mut Ring) {
        if self.parked.is_empty() || Instant::now() < self.retry_at {
            return;
        }
        self.clock = Instant::now();
        while let Some(Parked { chain, taken }) = self.parked.pop_front() {
            let done = self.again(&chain);
            if self.is_to_wait(&done) {
                self.parked.push_front(Parked { chain, taken });
                break;
            }
            self.settings.trouble.waits_no_more();
            self.settings.trouble.saw(&done);
            self.settle(chain, taken, &done, ring);
        }
        self.clock = Instant::now();
        self.retry_at = self.clock + RETRY;
        self.counters.set_stopped(self.parked.len());
        if self.parked.is_empty() {
            tracing::warn!(queue = self.index, "the host is able again: the queue goes on");
        }
    }

    /// The driver may have changed the request meanwhile: it is read and checked as if it were new.
    fn again(&self, chain: &Chain) -> Done {
        match Request::read(chain, self.image.capacity()) {
            Ok(request) => self.execute(&request, chain),
            Err(status) => Done::new(Operation::Other, 0, Err(status.into())),
        }
    }

    /// Writes the status, which is the chain's last writable byte whatever the framing (virtio 1.3,
    /// 5.2.6), and gives the chain back.
    fn settle(&mut self, chain: Chain, taken: Instant, done: &Done, ring: &mut Ring) {
        let latency = self.clock.saturating_duration_since(taken);
        if done.operation == Operation::Flush {
            self.flush_time = latency;
        }
        let status = done
            .outcome
            .as_ref()
            .map_or_else(Failure::status, |()| Status::OK);
        let failed = status != Status::OK;
        // A serial number is no data of the disk's.
        let data = match done.operation {
            Operation::Other => 0,
            _ => done.bytes,
        };
        self.counters.completed(done.operation, data, failed, latency);
        let before = chain.writable_length().saturating_sub(1);
        chain.write_at(before, &[status.0]);
        // What was written without a gap (virtio 1.3, 2.7.8.2): the status counts where it is not behind one.
        let mut written = if failed { 0 } else { done.written() };
        written += usize::from(written == before);
        // Below 2^32: the ring refuses longer chains.
        ring.complete(chain, written as u32);
    }

    /// Completes what the ring has ended.
    fn reap(&mut self, ring: &mut Ring) {
        while let Some((transfer, moved)) = self.uring.as_mut().and_then(RestrictedRing::ended) {
            let operation = transfer.direction.into();
            let length = transfer.at_once + transfer.length;
            let done = match moved {
                Ok(moved) if moved == transfer.length => Done::new(operation, length, Ok(())),
                // A short one, at the end of the file or by a signal; one that is not aligned; or one for which
                // the kernel could make no thread.
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR | Errno::EINVAL | Errno::ECANCELED) => {
                    let done = self.again(&transfer.chain);
                    self.clock = Instant::now();
                    done
                }
                Err(error) => Done::new(operation, length, Err(io::Error::from(error).into())),
            };
            self.settings.trouble.saw(&done);
            if self.is_to_wait(&done) {
                self.park(transfer.chain, transfer.taken);
            } else {
                self.settle(transfer.chain, transfer.taken, &done, ring);
            }
        }
    }

    /// The flushes, while any of this queue's is under way.
    fn under_way(&self) -> Option<&Flushes> {
        self.flushes.as_ref().filter(|_| !self.flushing.is_empty())
    }

    /// Completes flushes that have ended so.
    fn flushed(&mut self, outcomes: Vec<io::Result<()>>, ring: &mut Ring) {
        for outcome in outcomes {
            let Some(Parked { chain, taken }) = self.flushing.pop_front() else {
                return;
            };
            let done = Done::new(Operation::Flush, 0, outcome.map_err(Failure::from));
            self.settings.trouble.saw(&done);
            self.settle(chain, taken, &done, ring);
        }
    }

    /// Completes what was begun elsewhere: transfers through the io_uring, flushes.
    fn await_all(&mut self, ring: &mut Ring) {
        let open = self.flushing.len();
        let flushed = self.flushes.as_ref().map(|flushes| flushes.all(open));
        self.clock = Instant::now();
        self.flushed(flushed.unwrap_or_default(), ring);
        while let Some(uring) = self.uring.as_mut().filter(|uring| uring.is_busy()) {
            uring.wait().unwrap_or_else(|error| lost(&error));
            self.clock = Instant::now();
            self.reap(ring);
        }
    }

    /// Takes chains until there are no more, or something says that it is enough; how long to pause
    /// before the next.
    fn take_all(&mut self, ring: &mut Ring) -> Result<Option<Duration>, RingFault> {
        let begun = self.clock;
        while self.has_room() && self.moved < MOST_UNPUBLISHED && self.clock - begun < LONG_ROUND {
            if !self.parked.is_empty() {
                return Ok(Some(RETRY));
            }
            if let Some(pause) = self.settings.limits.wait(Instant::now) {
                return Ok(Some(pause));
            }
            let Some(chain) = ring.pop()? else { break };
            self.take(chain, ring)?;
        }
        // The last one taken may wait for the host: nothing but the pause brings this thread back to it.
        Ok((!self.parked.is_empty()).then_some(RETRY))
    }

    fn has_room(&self) -> bool {
        self.uring.as_ref().is_none_or(RestrictedRing::has_room)
    }
}

/// The io_uring itself fails. What is under way in it may still write to guest memory, and can be told from nothing
/// else: only the end of the process ends it. A successor finds its requests in the in-flight region.
fn lost(error: &io::Error) -> ! {
    tracing::error!(
        error = error as &dyn std::error::Error,
        "the host's io_uring fails: the process ends"
    );
    end(1)
}

impl QueueHandler for BlkQueue {
    fn start(&mut self, features: u64) {
        self.features = features;
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.uring.as_ref().map(AsFd::as_fd)
    }

    fn ended_source(&self) -> Option<BorrowedFd<'_>> {
        self.under_way().map(Flushes::source)
    }

    fn is_ready(&mut self) -> bool {
        self.uring.as_mut().is_some_and(RestrictedRing::has_ended)
            || self.under_way().is_some_and(Flushes::has_ended)
    }

    fn process(&mut self, ring: &mut Ring) -> Result<Wait, RingFault> {
        self.moved = 0;
        self.clock = Instant::now();
        self.reap(ring);
        let flushed = self.under_way().map(Flushes::ended).unwrap_or_default();
        self.flushed(flushed, ring);
        self.retry(ring);
        let pause = self.take_all(ring)?;
        let mut wait = Wait {
            available: pause.is_none(),
            pause,
            ..Wait::AVAILABLE
        };
        if let Some(uring) = &mut self.uring {
            let again = uring.submit().unwrap_or_else(|error| lost(&error));
            wait.pause = wait.pause.into_iter().chain(again).min();
            wait.available &= uring.has_room();
            wait.readable = uring.is_busy();
        }
        Ok(wait)
    }

    /// What waits for the host goes on waiting.
    fn suspend(&mut self, ring: &mut Ring) -> Result<(), RingFault> {
        self.await_all(ring);
        Ok(())
    }

    /// What waits for the host is tried once more and then answered: the ring cannot stop before.
    fn drain(&mut self, ring: &mut Ring) -> Result<(), RingFault> {
        self.await_all(ring);
        while let Some(Parked { chain, taken }) = self.parked.pop_front() {
            let done = self.again(&chain);
            self.clock = Instant::now();
            self.settings.trouble.waits_no_more();
            self.settle(chain, taken, &done, ring);
        }
        self.counters.set_stopped(0);
        Ok(())
    }

    /// What waits for the host goes on waiting, as it would had this process been killed.
    fn leave(&mut self, ring: &mut Ring) -> Result<(), RingFault> {
        if !ring.is_recorded() {
            return self.drain(ring);
        }
        self.await_all(ring);
        for _ in self.parked.drain(..) {
            self.settings.trouble.waits_no_more();
        }
        self.counters.set_stopped(0);
        Ok(())
    }
}
