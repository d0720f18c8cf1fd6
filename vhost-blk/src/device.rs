//! The block device: features and configuration space (virtio 1.3, 5.2.3 and 5.2.4).

use crate::control::Order;
use crate::counters::{Counters, QueueCounters};
use crate::files::Files;
use crate::flusher::Flusher;
use crate::growth::Growth;
use crate::image::{self, Image, SECTOR};
use crate::io::RestrictedRing;
use crate::options::{Options, Place, USAGE};
use crate::queue::BlkQueue;
use crate::request::{MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, told_sectors};
use crate::settings::Settings;
use jailer::sandbox::{Role, make_no_more_rings};
use std::error::Error;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use vhost_daemon::device::Errands;
use vhost_daemon::{ConfigError, Device, OrderNumber, Orders, Program, QueueHandler, QueueLimits};
use virtio_bindings::virtio_blk::*;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

/// Most data segments in one request. Leaves room for header and status in a ring of 128, the
/// smallest that front ends use.
const MAX_SEGMENTS: u32 = 126;
/// Physical block size of the host's file systems, as a power of two of logical blocks.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// Why the device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// A flag is missing.
    #[error("{0}")]
    Missing(&'static str),
    /// The image's file, or one below it, cannot be opened.
    #[error("cannot open {0}")]
    Open(Place, #[source] io::Error),
    /// What is in the file is refused.
    #[error("cannot use {0} as a disk image")]
    Image(Place, #[source] image::ImageError),
    /// The passphrase cannot be read.
    #[error("cannot read the passphrase")]
    Key(#[source] io::Error),
    /// `--control-fd` is no descriptor of this process.
    #[error("--control-fd")]
    Control(#[source] io::Error),
    /// The kernel makes no eventfd.
    #[error("cannot make an eventfd")]
    Event(#[source] io::Error),
    /// `--io=uring` on a host without it.
    #[error("the host refuses an io_uring (see kernel.io_uring_disabled); use --io=auto or --io=sync")]
    Uring(#[source] io::Error),
}

/// `vhost-user-blk`.
pub struct BlkProgram;

impl Program for BlkProgram {
    const NAME: &'static str = "vhost-user-blk";
    const KIND: &'static str = "block";
    const CAPABILITIES: &'static [&'static str] = &["read-only", "blk-file"];
    const ROLE: Role = Role::Disk;
    const USAGE: &'static str = USAGE;
    const QUEUES: QueueLimits = QueueLimits {
        default: 1,
        most: 32,
        multiple: 1,
    };

    type Options = Options;

    fn option(options: &mut Options, name: &str, parser: &mut lexopt::Parser) -> Result<bool, lexopt::Error> {
        options.take(name, parser)
    }

    fn check(options: &Options) -> Result<(), lexopt::Error> {
        options.check()
    }

    fn open(options: Options, num_queues: u16) -> Result<Box<dyn Device>, Box<dyn Error + Send + Sync>> {
        let files = Files::open(&options)?;
        let (engine, rings) = files.engine(&options, num_queues)?;
        let waits = files.wait();
        // What is in the image is nobody's word, and this process may still make a ring that opens files.
        if let Err(error) = make_no_more_rings() {
            tracing::warn!(%error, "this process may make io_urings until it is confined");
        }
        let image = files.into_image(&options, engine)?;
        // A life that is bounded begins when there is something to serve.
        vhost_daemon::faults::arm(&options.serial);
        tracing::info!(image = image.describe(), "disk image is open");
        let growth = options.control.map(|_| Growth::new()).transpose();
        let growth = growth.map_err(BlkError::Control)?;
        let flushes_aside = !options.read_only && waits;
        let flusher = flushes_aside.then(|| Flusher::new(num_queues)).transpose();
        let flusher = flusher.map_err(BlkError::Event)?;
        let orders = options.control.map(vhost_daemon::inherited).transpose();
        let orders = orders.and_then(Orders::new).map_err(BlkError::Control)?;
        let settings = Settings {
            serial: options.serial.into(),
            limits: options.limits.limiter(),
            on_error: options.on_error,
            trouble: Arc::default(),
        };
        // Never freed: it lives as long as the process, and the queues' transfers refer to it.
        let image: &'static Arc<dyn Image> = Box::leak(Box::new(image));
        Ok(Box::new(BlkDevice {
            image: &**image,
            features: features(&**image, num_queues),
            settings,
            counters: Counters::new(num_queues),
            rings,
            orders,
            growth,
            flusher,
            grows_for: OrderNumber::default(),
            told: image.capacity(),
        }))
    }
}

/// `struct virtio_blk_config` as far as this device has fields.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// What is offered for an image.
fn features(image: &dyn Image, num_queues: u16) -> u64 {
    let mut features = (1 << VIRTIO_BLK_F_SEG_MAX)
        | (1 << VIRTIO_BLK_F_BLK_SIZE)
        | (1 << VIRTIO_BLK_F_FLUSH)
        | (1 << VIRTIO_BLK_F_TOPOLOGY);
    if num_queues > 1 {
        features |= 1 << VIRTIO_BLK_F_MQ;
    }
    if image.read_only() {
        return features | 1 << VIRTIO_BLK_F_RO;
    }
    if image.can_discard() {
        features |= 1 << VIRTIO_BLK_F_DISCARD;
    }
    features | 1 << VIRTIO_BLK_F_WRITE_ZEROES
}

/// A disk.
pub struct BlkDevice {
    image: &'static dyn Image,
    /// As it was opened: one that is found damaged turns read-only, and a guest that starts again takes what it was
    /// offered before.
    features: u64,
    settings: Settings,
    counters: Counters,
    /// One for each queue, or none.
    rings: Vec<RestrictedRing>,
    orders: Orders,
    /// Where there may be orders.
    growth: Option<Growth>,
    /// Where flushes take their time.
    flusher: Option<Flusher>,
    /// The latest order that it carries out.
    grows_for: OrderNumber,
    /// The capacity that the driver was last told of.
    told: u64,
}

impl BlkDevice {
    fn num_queues(&self) -> u16 {
        // As many as were asked for with a number of this type.
        self.counters.queues().len() as u16
    }

    fn obey(&mut self, given: &vhost_daemon::Order) {
        let (line, number) = (&given.words, given.number);
        match Order::parse(line) {
            Order::Metrics => {
                let metrics = self.counters.prometheus(self.image.capacity());
                self.orders.answer_at_length(number, &metrics);
            }
            Order::Size(capacity) => {
                // The answer follows when it has grown.
                if self.growth.as_ref().is_some_and(|growth| growth.begin(capacity)) {
                    self.grows_for = number;
                } else {
                    let error = "error: another order to grow is under way\n";
                    self.orders.answer(number, error);
                }
            }
            Order::Unknown => {
                let error = format!("error: {line:?} is no order: write size BYTES or metrics\n");
                self.orders.answer(number, &error);
            }
        }
    }

    /// Answers the order to grow the disk, once that has ended.
    fn answer_growth(&mut self) {
        if let Some(answer) = self.growth.as_ref().and_then(Growth::answer) {
            self.orders.answer(self.grows_for, &answer);
        }
    }
}

impl Device for BlkDevice {
    fn features(&self) -> u64 {
        self.features
    }

    fn set_features(&mut self, _features: u64) {}

    fn config(&self) -> Vec<u8> {
        let optimal = self.image.optimal_io_size() / SECTOR;
        let cluster = self.image.discard_granularity();
        let config = Config {
            capacity: (self.image.capacity() / SECTOR).into(),
            size_max: 0.into(),
            seg_max: MAX_SEGMENTS.into(),
            cylinders: 0.into(),
            heads: 0,
            sectors: 0,
            blk_size: (SECTOR as u32).into(),
            physical_block_exp: PHYSICAL_BLOCK_EXPONENT,
            alignment_offset: 0,
            min_io_size: (1 << PHYSICAL_BLOCK_EXPONENT).into(),
            opt_io_size: u32::try_from(optimal).unwrap_or(0).into(),
            writeback: 0,
            unused0: 0,
            num_queues: self.num_queues().into(),
            max_discard_sectors: told_sectors(MAX_DISCARD_SECTORS, cluster).into(),
            max_discard_seg: MAX_DISCARD_SEGMENTS.into(),
            discard_sector_alignment: u32::try_from(cluster / SECTOR).unwrap_or(1).into(),
            max_write_zeroes_sectors: told_sectors(MAX_WRITE_ZEROES_SECTORS, cluster).into(),
            max_write_zeroes_seg: MAX_DISCARD_SEGMENTS.into(),
            write_zeroes_may_unmap: u8::from(self.image.can_discard()),
            unused1: [0; 3],
        };
        config.as_bytes().to_vec()
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) -> Result<(), ConfigError> {
        // Only `writeback` could be written, with VIRTIO_BLK_F_CONFIG_WCE, which is not offered.
        Err(ConfigError)
    }

    fn records_inflight(&self) -> bool {
        true
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        let mut rings = std::mem::take(&mut self.rings).into_iter();
        let mut flushes = self.flusher.iter().flat_map(Flusher::queues);
        let mut queue = |(index, counters): (usize, &Arc<QueueCounters>)| -> Box<dyn QueueHandler> {
            Box::new(BlkQueue::new(
                index,
                self.image,
                self.settings.clone(),
                Arc::clone(counters),
                rings.next(),
                flushes.next(),
            ))
        };
        self.counters
            .queues()
            .iter()
            .enumerate()
            .map(&mut queue)
            .collect()
    }

    fn config_source(&self) -> Option<BorrowedFd<'_>> {
        self.orders.source()
    }

    fn take_errands(&mut self) -> Vec<(&'static str, Errands)> {
        let growth = self.growth.iter();
        let growth = growth.map(|growth| ("growth", growth.errands(self.image)));
        let flushes = self.flusher.iter();
        let flushes = flushes.map(|flusher| ("flushes", flusher.errands(self.image)));
        growth.chain(flushes).collect()
    }

    fn errand_source(&self) -> Option<BorrowedFd<'_>> {
        self.growth.as_ref().and_then(Growth::source)
    }

    fn config_changed(&mut self) -> bool {
        self.answer_growth();
        for order in self.orders.take() {
            self.obey(&order);
        }
        let capacity = self.image.capacity();
        std::mem::replace(&mut self.told, capacity) != capacity
    }

    fn reset(&mut self) {}

    fn flush(&mut self) -> io::Result<()> {
        self.counters.log();
        if let Some(growth) = &self.growth {
            growth.finish();
        }
        self.answer_growth();
        self.image.close()
    }
}

#[cfg(test)]
mod tests;
