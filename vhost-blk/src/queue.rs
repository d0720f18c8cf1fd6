//! One request queue: takes what is available, executes it, completes it.
//!
//! Requests that only move data, on a range that lies in one piece in the host's file, go through the
//! ring where there is one; all others are done by calls before `process` returns.

use crate::image::{Image, Resolved};
use crate::io::{Direction, RestrictedRing, Transfer};
use crate::request::{Request, Status};
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use vhost_daemon::faults::{self, Step};
use vhost_daemon::{Chain, QueueHandler, Ring, RingFault, Wait};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES};

/// Bytes moved by calls before the driver hears of them: it prepares more while the next ones move.
const MOST_UNPUBLISHED: usize = 256 << 10;

/// The handler of one queue; all queues share the image, which lives as long as the process, so that
/// transfers under way may refer to it.
pub(crate) struct BlkQueue {
    image: &'static dyn Image,
    serial: Vec<u8>,
    features: u64,
    uring: Option<RestrictedRing>,
    /// Bytes moved by calls in this round.
    moved: usize,
}

impl BlkQueue {
    pub(crate) fn new(image: &'static dyn Image, serial: Vec<u8>, uring: Option<RestrictedRing>) -> Self {
        Self {
            image,
            serial,
            features: 0,
            uring,
            moved: 0,
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
        let transfer = |chain, direction, offset, length, skip| Transfer {
            chain,
            direction,
            offset,
            length,
            skip,
        };
        let transfer = match Request::read(&chain, self.image.capacity()) {
            Ok(Request::In { offset, length }) => transfer(chain, Direction::Read, offset, length, 0),
            Ok(Request::Out { offset, length }) if !self.image.read_only() => {
                transfer(chain, Direction::Write, offset, length, Request::HEADER_LENGTH)
            }
            Ok(Request::Out { .. }) => return complete(chain, Err(Status::IOERR), ring),
            Ok(request) => {
                let outcome = self.act(&request, &chain);
                return complete(chain, outcome, ring);
            }
            Err(status) => return complete(chain, Err(status), ring),
        };
        faults::point(Step::BeforeSubmit);
        match self.begin(transfer) {
            None => {
                faults::point(Step::AfterSubmit);
                Ok(())
            }
            Some(transfer) => self.finish(transfer, ring),
        }
    }

    /// Begins a transfer through the ring; gives it back where it has to be done by calls.
    fn begin(&mut self, transfer: Transfer) -> Option<Transfer> {
        let durable_at_once =
            transfer.direction == Direction::Write && self.features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        let Some(uring) = self.uring.as_mut().filter(|_| !durable_at_once) else {
            return Some(transfer);
        };
        let length = transfer.length as u64;
        let resolved = match transfer.direction {
            Direction::Read => self.image.resolve_read(transfer.offset, length),
            Direction::Write => self.image.resolve_write(transfer.offset, length),
        };
        match resolved {
            Ok(Resolved::Mapped(extent, guard)) if extent.len == length => {
                uring.push(transfer, extent.file, extent.offset, guard).err()
            }
            _ => Some(transfer),
        }
    }

    /// Does a whole transfer by calls.
    fn finish(&mut self, transfer: Transfer, ring: &mut Ring) -> Result<(), RingFault> {
        self.moved += transfer.length;
        let slices = transfer.slices();
        let outcome = match transfer.direction {
            Direction::Read => answer("read", self.image.read(&slices, transfer.offset)),
            Direction::Write => {
                let written = answer("write", self.image.write(&slices, transfer.offset));
                written.and_then(|()| self.write_through())
            }
        };
        drop(slices);
        faults::point(Step::AfterSubmit);
        complete(transfer.chain, outcome, ring)
    }

    /// Completes what the ring has ended.
    fn reap(&mut self, ring: &mut Ring) -> Result<(), RingFault> {
        while let Some((transfer, moved)) = self.uring.as_mut().and_then(RestrictedRing::ended) {
            match moved {
                Ok(moved) if moved == transfer.length => complete(transfer.chain, Ok(()), ring)?,
                // A short one, at the end of the file or by a signal; or one that is not aligned.
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR | Errno::EINVAL) => self.finish(transfer, ring)?,
                Err(error) => {
                    let failed = answer("transfer", Err(error.into()));
                    complete(transfer.chain, failed, ring)?;
                }
            }
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.uring.as_ref().is_none_or(RestrictedRing::has_room)
    }

    fn act(&self, request: &Request, chain: &Chain) -> Result<(), Status> {
        match request {
            Request::In { .. } | Request::Out { .. } => Err(Status::UNSUPP),
            Request::Flush => {
                faults::point(Step::Flush);
                answer("flush", self.image.flush())
            }
            Request::GetId { length } => {
                let mut id = self.serial.clone();
                id.resize(*length, 0);
                chain.write_at(0, &id);
                Ok(())
            }
            Request::Discard(ranges) => {
                self.check_offered(VIRTIO_BLK_F_DISCARD)?;
                for range in ranges {
                    answer("discard", self.image.discard(range.offset, range.length))?;
                }
                Ok(())
            }
            Request::WriteZeroes(ranges) => {
                self.check_offered(VIRTIO_BLK_F_WRITE_ZEROES)?;
                for range in ranges {
                    let zeroed = self.image.write_zeroes(range.offset, range.length, range.unmap);
                    answer("write zeroes", zeroed)?;
                }
                self.write_through()
            }
        }
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
    fn write_through(&self) -> Result<(), Status> {
        if self.negotiated(VIRTIO_BLK_F_FLUSH) {
            Ok(())
        } else {
            answer("flush", self.image.flush())
        }
    }
}

/// Writes the status, which is the chain's last writable byte whatever the framing (virtio 1.3, 5.2.6),
/// and gives the chain back.
fn complete(chain: Chain, outcome: Result<(), Status>, ring: &mut Ring) -> Result<(), RingFault> {
    let length = chain.writable_length();
    let status = outcome.err().unwrap_or(Status::OK);
    chain.write_at(length.saturating_sub(1), &[status.0]);
    // Below 2^32: the ring refuses longer chains.
    ring.complete(chain, length as u32);
    Ok(())
}

/// The driver learns that it failed, the log why. A guest can cause this at will on a damaged image,
/// so it is logged where few look.
fn answer(what: &str, result: io::Result<()>) -> Result<(), Status> {
    result.map_err(|error| {
        tracing::debug!(what, error = &error as &dyn std::error::Error, "request failed");
        Status::IOERR
    })
}

/// The ring itself fails: nothing that was begun can be told from what was not.
fn lost(error: &io::Error) -> RingFault {
    tracing::error!(
        error = error as &dyn std::error::Error,
        "the host's io_uring fails"
    );
    RingFault::Request("the host's io_uring fails")
}

impl QueueHandler for BlkQueue {
    fn start(&mut self, features: u64) {
        self.features = features;
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.uring.as_ref().map(AsFd::as_fd)
    }

    fn process(&mut self, ring: &mut Ring) -> Result<Wait, RingFault> {
        self.moved = 0;
        self.reap(ring)?;
        while self.has_room() && self.moved < MOST_UNPUBLISHED {
            let Some(chain) = ring.pop()? else { break };
            self.take(chain, ring)?;
        }
        let Some(uring) = &mut self.uring else {
            return Ok(Wait::AVAILABLE);
        };
        uring.submit().map_err(|error| lost(&error))?;
        Ok(Wait {
            available: uring.has_room(),
            readable: uring.is_busy(),
            writable: false,
        })
    }

    fn drain(&mut self, ring: &mut Ring) -> Result<(), RingFault> {
        while let Some(uring) = self.uring.as_mut().filter(|uring| uring.is_busy()) {
            uring.wait().map_err(|error| lost(&error))?;
            self.reap(ring)?;
        }
        Ok(())
    }
}
