//! Transmit queues: from the guest's buffers straight to the TAP (virtio 1.3, 5.1.6.2).
//!
//! The header and the first bytes of each frame are copied out once, checked, and sent from the copy:
//! the guest cannot change them between the check and the kernel's read. The rest is not copied.

use crate::buffers::{FrameBuffers, MAX_SEGMENTS, SliceStorage, Storage};
use crate::counters::{Batch, Counters, Drop};
use crate::guard::{Guard, PREFIX};
use crate::header::{Cut, HEADER_SIZE, NetHeader, TxHeader};
use crate::link::Link;
use crate::offload::Offloads;
use crate::pacer::Pacer;
use nix::errno::Errno;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use vhost_daemon::{Chain, QueueHandler, Ring, RingFault, Wait};
use zerocopy::FromBytes;

/// Frames after which the driver is shown what was sent, so that it can use the buffers again.
const PUBLISH_EVERY: usize = 32;

/// Packets, of whole frames and of cut ones, after which the worker may look after its other duties.
const MOST_PACKETS: usize = 4096;

/// One transmit queue.
pub struct TransmitQueue {
    pacer: Pacer,
    counters: Arc<Counters>,
    batch: Batch,
    link: Arc<Link>,
    guard: Option<Arc<Guard>>,
    offloads: Offloads,
    storage: Storage,
    slices: SliceStorage,
}

/// What became of a frame.
enum Sent {
    /// The kernel took it and made so many packets of it, or it was dropped and counted.
    Done(usize),
    /// The kernel's queue is full.
    Blocked,
}

impl TransmitQueue {
    /// A queue that writes to the pacer's TAP what `guard` lets pass.
    #[must_use]
    pub fn new(pacer: Pacer, counters: Arc<Counters>, link: Arc<Link>, guard: Option<Arc<Guard>>) -> Self {
        Self {
            pacer,
            counters,
            batch: Batch::default(),
            link,
            guard,
            offloads: Offloads::default(),
            storage: Storage::default(),
            slices: SliceStorage::default(),
        }
    }

    fn send(&mut self, chain: &Chain) -> Sent {
        let mut head = [0; HEADER_SIZE + PREFIX];
        if !self.link.is_up() {
            self.counters
                .transmit
                .dropped(Drop::Interface, &"the link is down");
            return Sent::Done(1);
        }
        // The header, and the part of the frame that is looked at.
        let copied = chain.read_at(0, &mut head);
        let head = &mut head[..copied];
        let Some(cut) = self.check(head, chain.readable_length()) else {
            return Sent::Done(1);
        };
        let mut slices = self.slices.take();
        chain.readable_slices(copied, usize::MAX, &mut slices);
        let mut buffers = FrameBuffers::from_storage(std::mem::take(&mut self.storage));
        buffers.push_readable(head);
        let fits = slices.iter().all(|slice| buffers.push_guest(slice, MAX_SEGMENTS));
        let result = if fits {
            write_retrying(&self.pacer, &buffers)
        } else {
            Err(Errno::E2BIG.into())
        };
        let length = chain.readable_length() - HEADER_SIZE;
        self.storage = buffers.into_storage();
        self.slices.keep(slices);
        self.sent(result, length, cut)
    }

    /// Sends what the driver made available, as far as the limits and the TAP allow.
    fn transmit(&mut self, ring: &mut Ring) -> Result<Wait, RingFault> {
        let (mut frames, mut packets) = (0, 0);
        loop {
            if let Some(wait) = self.pacer.wait() {
                return Ok(wait);
            }
            if packets >= MOST_PACKETS {
                // If there is more, there is another call at once.
                return Ok(Wait::AVAILABLE);
            }
            let Some(chain) = ring.pop()? else {
                return Ok(Wait::AVAILABLE);
            };
            if chain.writable_length() > 0 {
                return Err(RingFault::Request("a transmit buffer must not be writable"));
            }
            match self.send(&chain) {
                Sent::Done(count) => {
                    packets += count;
                    ring.complete(chain, 0);
                }
                Sent::Blocked => {
                    ring.put_back(chain)?;
                    return Ok(self.pacer.blocked());
                }
            }
            frames += 1;
            if frames % PUBLISH_EVERY == 0 {
                ring.publish()?;
            }
        }
    }

    /// Judges a frame by its `head`, and makes the header there what the kernel may see.
    fn check(&self, head: &mut [u8], total: usize) -> Option<Cut> {
        let transmit = &self.counters.transmit;
        let Some((header, frame)) = head.split_first_chunk_mut::<HEADER_SIZE>() else {
            transmit.dropped(Drop::Header, &"shorter than a virtio-net header");
            return None;
        };
        let fields = NetHeader::read_from_bytes(header).ok()?;
        let clean = match TxHeader::check(fields, total - HEADER_SIZE, &self.offloads) {
            Ok(clean) => clean,
            Err(error) => {
                transmit.dropped(Drop::Header, &error);
                return None;
            }
        };
        header.copy_from_slice(clean.as_bytes());
        if let Some(guard) = &self.guard
            && let Err(refusal) = guard.check(frame, clean.checksum())
        {
            transmit.dropped(Drop::Guard, &refusal);
            return None;
        }
        Some(clean.cut())
    }

    fn sent(&mut self, result: io::Result<()>, length: usize, cut: Cut) -> Sent {
        match result {
            Ok(()) => {
                self.pacer.passed(length, cut);
                self.batch.passed(length);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Sent::Blocked,
            Err(error) if error.raw_os_error() == Some(Errno::E2BIG as i32) => {
                self.counters.transmit.dropped(Drop::Buffer, &"too many segments");
            }
            Err(error) => {
                self.link.suspect(&error);
                self.counters.transmit.dropped(Drop::Interface, &error);
            }
        }
        Sent::Done(cut.packets)
    }
}

fn write_retrying(pacer: &Pacer, buffers: &FrameBuffers<'_>) -> io::Result<()> {
    loop {
        match pacer.tap().write_frame(buffers) {
            Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
            result => return result,
        }
    }
}

impl QueueHandler for TransmitQueue {
    fn start(&mut self, features: u64) {
        self.offloads = Offloads::new(features);
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.pacer.source())
    }

    /// Or what the guest left there would never be given back.
    fn discards_when_disabled(&self) -> bool {
        true
    }

    fn process(&mut self, ring: &mut Ring) -> Result<Wait, RingFault> {
        let result = self.transmit(ring);
        self.counters.transmit.add(&mut self.batch);
        result
    }
}
