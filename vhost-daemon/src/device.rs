//! What a device crate implements.

use crate::ring::{Ring, RingFault};
use jailer::sandbox::Role;
use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// A device process: its name, its flags, and how its device is opened.
pub trait Program {
    /// The binary's name, such as `vhost-user-blk`.
    const NAME: &'static str;
    /// The `type` that `--print-capabilities` prints (vhost-user, "Backend program conventions"):
    /// `block` or `net`.
    const KIND: &'static str;
    /// The optional features that `--print-capabilities` lists, such as `blk-file`.
    const CAPABILITIES: &'static [&'static str];
    /// The policy that confines the process.
    const ROLE: Role;
    /// What `--help` prints below the shared flags, a line for each flag.
    const USAGE: &'static str;
    /// The most queues that `--num-queues` accepts, and the number without the flag.
    const QUEUES: QueueLimits;

    /// The flags that only this program has.
    type Options: Default;

    /// Takes one long flag that is not a shared one, `name` without its dashes; the value, if it has
    /// one, comes from `parser.value()`. Returns false for an unknown flag.
    ///
    /// # Errors
    /// When the flag's value is missing or wrong; the message says which values there are.
    fn option(
        options: &mut Self::Options,
        name: &str,
        parser: &mut lexopt::Parser,
    ) -> Result<bool, lexopt::Error>;

    /// Looks at the flags together, after the last one.
    ///
    /// # Errors
    /// When one is missing or excludes another: a usage error, exit code 2.
    fn check(options: &Self::Options) -> Result<(), lexopt::Error> {
        let _ = options;
        Ok(())
    }

    /// Opens what the flags name. Runs before lockdown, and nothing is opened afterwards.
    /// `num_queues` lies within [`Program::QUEUES`].
    ///
    /// # Errors
    /// Anything: printed with its sources, and the process ends with exit code 1.
    fn open(options: Self::Options, num_queues: u16)
    -> Result<Box<dyn Device>, Box<dyn Error + Send + Sync>>;
}

/// How many queues a program can have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueLimits {
    /// Without `--num-queues`.
    pub default: u16,
    /// At most, at least `default`.
    pub most: u16,
    /// The number must be a multiple of this (2 for pairs of receive and transmit queues).
    pub multiple: u16,
}

/// What a device does on a thread of its own, without an end. One that works for seconds, outside the kernel, between
/// two calls of [`progress`](crate::progress) is taken for one that spins: each errand begins with one.
pub type Errands = Box<dyn FnOnce() -> Infallible + Send>;

/// One virtio device. Its methods run on the session's thread; its queues have threads of their
/// own, see [`Device::take_handlers`].
pub trait Device: Send {
    /// Feature bits of the device type that are offered (virtio 1.3, 5.x.3). The shell adds
    /// VIRTIO_F_VERSION_1, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX and
    /// VHOST_USER_F_PROTOCOL_FEATURES.
    fn features(&self) -> u64;

    /// The driver's choice, a subset of what was offered, as SET_FEATURES brings it: before any
    /// queue starts. [`QueueHandler::start`] gets the same value.
    fn set_features(&mut self, features: u64);

    /// The whole device configuration space (virtio 1.3, 5.x.4), little-endian.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the configuration space; `offset` plus `data` lies within
    /// [`Device::config`].
    ///
    /// # Errors
    /// When these bytes are read-only to the driver.
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), ConfigError>;

    /// Whether requests are recorded in the in-flight region, so that a successor executes what
    /// this process took and did not finish. Only for devices whose requests may be executed twice.
    fn records_inflight(&self) -> bool;

    /// Largest ring that the device accepts, a power of two: by default what virtio has (virtio 1.3, 2.7).
    fn max_queue_size(&self) -> u16 {
        1 << 15
    }

    /// One handler for each queue, in the order of the queues. Called once, before lockdown; each
    /// handler then lives on one thread ([`Device::thread_of`]) until the process ends.
    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>>;

    /// Which thread serves queue `index` on a host with so many `processors`: queues with the same number share
    /// one, up to eight. For queues that would only contend for the processors; nothing in their handlers may wait.
    fn thread_of(&self, index: u16, processors: usize) -> u16 {
        let _ = processors;
        index
    }

    /// Readable when the configuration space may have changed (a link went down, a disk grew), or when
    /// somebody asks the device for something. Asked for before each wait.
    fn config_source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// What the device has done on threads of its own, which have these names, confined as its queues' are: what may
    /// wait for the host for longer than a front end or a queue should. Called once, before lockdown.
    fn take_errands(&mut self) -> Vec<(&'static str, Errands)> {
        Vec::new()
    }

    /// As [`Device::config_source`]: readable when a thread of [`Device::take_errands`] has done something.
    fn errand_source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Called when [`Device::config_source`] or [`Device::errand_source`] is readable: takes the event off the
    /// fd and says whether the driver has to be told.
    fn config_changed(&mut self) -> bool {
        false
    }

    /// The front end reset the device (RESET_DEVICE, or a new front end came): forget what the
    /// driver negotiated. All queues are stopped.
    fn reset(&mut self);

    /// Makes all that completed durable. Called at the end of each session, with all queues stopped.
    ///
    /// # Errors
    /// When the host fails to; the process then ends with exit code 1.
    fn flush(&mut self) -> io::Result<()>;
}

/// The driver wrote where it may not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the driver cannot write this part of the configuration space")]
pub struct ConfigError;

/// What one queue does. All its methods run on the queue's thread.
///
/// Life of a queue: `start` and `resume`, then any number of `process` and `suspend`, then `drain`; and again. A
/// handler that completes each request before `process` returns has nothing to do in `drain`.
pub trait QueueHandler: Send {
    /// The ring is about to run with the negotiated `features`.
    fn start(&mut self, features: u64);

    /// Called after [`QueueHandler::start`]: the ring goes on at this available index, 0 with a driver
    /// that begins. One that is in the middle may not know that this process is a new one.
    fn resume(&mut self, index: u16) {
        let _ = index;
    }

    /// A file descriptor of the handler's own (a TAP, a completion eventfd) that is waited for when
    /// [`Wait`] says so. Asked for after each call of [`QueueHandler::process`]; level-triggered.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Readable when something that the handler has done elsewhere has ended: waited for whenever it is there.
    /// Asked for as [`QueueHandler::source`] is.
    fn ended_source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Whether what comes on a ring that was disabled is given back unread (vhost-user, "Ring states": a
    /// network device discards what is to be transmitted). Otherwise it waits until the ring is enabled.
    fn discards_when_disabled(&self) -> bool {
        false
    }

    /// Whether one of the handler's sources has something, found without sleeping: asked again and again
    /// while busy polling.
    fn is_ready(&mut self) -> bool {
        false
    }

    /// Takes what is available with [`Ring::pop`] and gives it back with [`Ring::complete`], now or
    /// in a later call. Called at start, after a kick, when one of its sources is ready, when
    /// [`Wait::pause`] is over, and without a cause: it must look for itself. What was completed is published, and the guest
    /// interrupted at most once, after it returns (or at [`Ring::publish`]).
    ///
    /// # Errors
    /// A [`RingFault`] from the ring's methods, or one of the handler's own when a request breaks
    /// the device's rules so that it cannot be answered. The ring is then broken until it is
    /// stopped and started again; the front end hears of it by the error eventfd.
    fn process(&mut self, ring: &mut Ring) -> Result<Wait, RingFault>;

    /// Ends the I/O under way on `ring`, which goes on later: it is disabled, or loses a part of its memory. Chains
    /// that wait for something may stay held; each keeps the memory that it lies in.
    ///
    /// # Errors
    /// As [`QueueHandler::process`].
    fn suspend(&mut self, ring: &mut Ring) -> Result<(), RingFault> {
        self.drain(ring)
    }

    /// Finishes everything taken from `ring`: afterwards the handler holds no [`Chain`](crate::Chain)
    /// and no I/O is under way. Called before the ring stops, also when it is broken.
    ///
    /// # Errors
    /// As [`QueueHandler::process`].
    fn drain(&mut self, ring: &mut Ring) -> Result<(), RingFault> {
        let _ = ring;
        Ok(())
    }

    /// As [`QueueHandler::drain`], at the end of a session that nobody asked to stop the ring, or of a ring whose
    /// front end has agreed (VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT): chains that wait for something may
    /// be dropped where [`Ring::is_recorded`]; whoever serves the ring next takes them.
    ///
    /// # Errors
    /// As [`QueueHandler::process`].
    fn leave(&mut self, ring: &mut Ring) -> Result<(), RingFault> {
        self.drain(ring)
    }
}

/// What has to happen before a handler can go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wait {
    /// The driver makes more buffers available. False tells the driver not to kick.
    pub available: bool,
    /// The handler's own fd is readable.
    pub readable: bool,
    /// The handler's own fd is writable.
    pub writable: bool,
    /// So much time has passed; whatever else is waited for ends the wait too.
    pub pause: Option<Duration>,
}

impl Wait {
    /// Only the driver can help.
    pub const AVAILABLE: Self = Self {
        available: true,
        readable: false,
        writable: false,
        pause: None,
    };
    /// There are buffers; the fd has nothing to read.
    pub const READABLE: Self = Self {
        available: false,
        readable: true,
        writable: false,
        pause: None,
    };
    /// There are requests; the fd takes no more.
    pub const WRITABLE: Self = Self {
        available: false,
        readable: false,
        writable: true,
        pause: None,
    };
    /// Either the driver or the fd.
    pub const AVAILABLE_OR_READABLE: Self = Self {
        available: true,
        readable: true,
        writable: false,
        pause: None,
    };
}
