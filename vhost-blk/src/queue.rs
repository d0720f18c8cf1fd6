//! One request queue: takes what is available, executes it, completes it.

use crate::image::Image;
use crate::request::{Request, Status};
use std::io;
use std::sync::Arc;
use vhost_daemon::{Chain, QueueHandler, Ring, RingFault, Wait};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES};
use vm_memory::VolatileSlice;

/// The handler of one queue; all queues share the image.
pub(crate) struct BlkQueue {
    image: Arc<dyn Image>,
    serial: Vec<u8>,
    features: u64,
}

impl BlkQueue {
    pub(crate) fn new(image: Arc<dyn Image>, serial: Vec<u8>) -> Self {
        Self {
            image,
            serial,
            features: 0,
        }
    }

    fn negotiated(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Executes one request and writes its status, which is the chain's last writable byte whatever
    /// the framing (virtio 1.3, 5.2.6). Returns the used length.
    fn execute(&self, chain: &Chain) -> Result<u32, RingFault> {
        let Some(status_at) = chain.writable_length().checked_sub(1) else {
            return Err(RingFault::Request("a block request has no room for its status"));
        };
        let outcome =
            Request::read(chain, self.image.capacity()).and_then(|request| self.act(&request, chain));
        let status = outcome.err().unwrap_or(Status::OK);
        chain.write_at(status_at, &[status.0]);
        // Below 2^32: the ring refuses longer chains.
        Ok(chain.writable_length() as u32)
    }

    fn act(&self, request: &Request, chain: &Chain) -> Result<(), Status> {
        match request {
            Request::In { offset, length } => {
                let mut slices = Vec::with_capacity(8);
                chain.writable_slices(0, *length, &mut slices);
                answer("read", self.image.read(&slices, *offset))
            }
            Request::Out { offset, length } => {
                self.check_writable()?;
                let mut slices: Vec<VolatileSlice<'_>> = Vec::with_capacity(8);
                chain.readable_slices(Request::HEADER_LENGTH, *length, &mut slices);
                answer("write", self.image.write(&slices, *offset))?;
                self.write_through()
            }
            Request::Flush => answer("flush", self.image.flush()),
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

    fn check_writable(&self) -> Result<(), Status> {
        if self.image.read_only() {
            Err(Status::IOERR)
        } else {
            Ok(())
        }
    }

    fn check_offered(&self, bit: u32) -> Result<(), Status> {
        if !self.negotiated(bit) {
            return Err(Status::UNSUPP);
        }
        self.check_writable()
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

/// The driver learns that it failed, the log why. A guest can cause this at will on a damaged image,
/// so it is logged where few look.
fn answer(what: &str, result: io::Result<()>) -> Result<(), Status> {
    result.map_err(|error| {
        tracing::debug!(what, error = &error as &dyn std::error::Error, "request failed");
        Status::IOERR
    })
}

impl QueueHandler for BlkQueue {
    fn start(&mut self, features: u64) {
        self.features = features;
    }

    fn process(&mut self, ring: &mut Ring) -> Result<Wait, RingFault> {
        while let Some(chain) = ring.pop()? {
            let written = self.execute(&chain)?;
            ring.complete(chain, written);
        }
        Ok(Wait::AVAILABLE)
    }
}
