//! The network device: features, configuration space, and its queues (virtio 1.3, 5.1).

use crate::capture::Capture;
use crate::control::ControlQueue;
use crate::counters::Counters;
use crate::guard::Guard;
use crate::link::{Link, LinkWatch};
use crate::offload::{Offloads, TCP_FEATURES, TunOffload, USO_FEATURES};
use crate::options::{Options, OptionsError};
use crate::pacer::{Flow, Pacer};
use crate::rx::ReceiveQueue;
use crate::state::State;
use crate::station::Station;
use crate::steering::{Running, Steering};
use crate::tap::{Tap, TapError};
use crate::third::ThirdQueue;
use crate::tx::TransmitQueue;
use jailer::sandbox::Role;
use std::error::Error;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use vhost_daemon::device::QueueLimits;
use vhost_daemon::{ConfigError, Device, Orders, Program, QueueHandler, SharedLimiter};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
};

/// Most pairs of queues.
pub const MAX_PAIRS: u16 = 8;

/// Why the device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The flags contradict each other.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// There is no TAP to serve.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// `--tap-fd` names no fd that this process was given.
    #[error("--tap-fd")]
    Fd(#[source] io::Error),
    /// `--state-fd` names no page that can be kept.
    #[error("--state-fd")]
    State(#[source] io::Error),
    /// `--pcap-fd` names no file that can be written.
    #[error("--pcap-fd")]
    Pcap(#[source] io::Error),
    /// `--link-fd` names nothing that can be waited for.
    #[error("--link-fd")]
    Link(#[source] io::Error),
    /// `--control-fd` names no socket.
    #[error("--control-fd")]
    Control(#[source] io::Error),
    /// No timer, eventfd or epoll instance.
    #[error("cannot make a timer and an epoll instance")]
    Events(#[source] io::Error),
}

/// `vhost-user-net`.
pub struct NetProgram;

impl Program for NetProgram {
    const NAME: &'static str = "vhost-user-net";
    const KIND: &'static str = "net";
    const CAPABILITIES: &'static [&'static str] = &[
        "tap-name",
        "tap-fd",
        "link-fd",
        "control-fd",
        "state-fd",
        "pcap-fd",
    ];
    const ROLE: Role = Role::Net;
    const USAGE: &'static str = crate::options::USAGE;
    const QUEUES: QueueLimits = QueueLimits {
        default: 2,
        most: 2 * MAX_PAIRS,
        multiple: 2,
    };

    type Options = Options;

    fn option(options: &mut Options, name: &str, parser: &mut lexopt::Parser) -> Result<bool, lexopt::Error> {
        options.take(name, parser)
    }

    fn check(options: &Options) -> Result<(), lexopt::Error> {
        let guard = options.guard().map(drop);
        let taps = match options.tap_name.is_some() == options.tap_fds.is_empty() {
            true => Ok(()),
            false => Err(OptionsError::Tap),
        };
        taps.and(guard).map_err(|error| error.to_string().into())
    }

    fn open(options: Options, num_queues: u16) -> Result<Box<dyn Device>, Box<dyn Error + Send + Sync>> {
        let device = NetDevice::open(options, num_queues / 2)?;
        Ok(Box::new(device))
    }
}

/// One NIC.
pub struct NetDevice {
    taps: Vec<Arc<Tap>>,
    parts: Parts,
    watch: LinkWatch,
    handlers: Vec<Box<dyn QueueHandler>>,
    features: u64,
    mtu: Option<u16>,
}

/// What queues and session share.
#[derive(Clone)]
struct Parts {
    steering: Arc<Steering>,
    station: Arc<Station>,
    link: Arc<Link>,
    counters: Arc<Counters>,
    guard: Option<Arc<Guard>>,
}

impl NetDevice {
    fn open(options: Options, pairs: u16) -> Result<Self, OpenError> {
        let taps = open_taps(&options, pairs)?;
        Self::on(options, taps)
    }

    /// A NIC on open TAPs, one for each pair.
    pub(crate) fn on(options: Options, taps: Vec<Arc<Tap>>) -> Result<Self, OpenError> {
        let guard = options.guard()?.map(Arc::new);
        let Some(first) = taps.first() else {
            return Err(OptionsError::Tap.into());
        };
        let state = Arc::new(open_state(&options)?);
        // Asked once: for a moment it leaves frames unfinished that the driver may not take. Of a TAP that is
        // gone a predecessor knew; another takes over once there is one again.
        let uso = state
            .uso()
            .or_else(|| first.supports_uso())
            .ok_or(TapError::Gone)?;
        state.set_uso(uso);
        let station = Station::new(
            Arc::clone(first),
            options.mac,
            guard.is_some(),
            Arc::clone(&state),
        );
        let parts = Parts {
            steering: Arc::new(Steering::new(&taps, Arc::clone(&state)).map_err(OpenError::Events)?),
            station: Arc::new(station),
            link: Arc::new(Link::new(Arc::clone(first), state).map_err(OpenError::Events)?),
            counters: Arc::new(Counters::default()),
            guard,
        };
        let orders = options.link_fd.map(vhost_daemon::inherited).transpose();
        let orders = orders.map_err(OpenError::Link)?;
        let control = options.control_fd.map(vhost_daemon::inherited).transpose();
        let control = control.and_then(Orders::new).map_err(OpenError::Control)?;
        let watch = LinkWatch::new(Arc::clone(&parts.link), orders, control);
        let handlers = make_handlers(&options, &parts, &taps)?;
        tracing::info!(
            tap = first.name(),
            mac = options.mac.map(tracing::field::display),
            "serving"
        );
        Ok(Self {
            features: offered(&options, &taps, uso),
            watch: watch.map_err(OpenError::Link)?,
            taps,
            parts,
            handlers,
            mtu: options.mtu,
        })
    }

    fn set_offload(&self, offload: TunOffload) {
        // One queue speaks for the interface.
        if let Some(tap) = self.taps.first()
            && let Err(error) = tap.set_offload(offload)
        {
            tracing::warn!(%error, "the TAP refused the driver's offloads; frames come finished");
        }
    }
}

fn open_capture(fd: RawFd) -> Result<Arc<Capture>, OpenError> {
    let file = vhost_daemon::inherited(fd).map_err(OpenError::Pcap)?;
    let capture = Capture::new(file).map_err(|error| OpenError::Pcap(error.into()))?;
    Ok(Arc::new(capture))
}

fn open_state(options: &Options) -> Result<State, OpenError> {
    let kept = options.state_fd.map(vhost_daemon::inherited).transpose();
    kept.and_then(|fd| fd.map_or_else(State::private, State::kept))
        .map_err(OpenError::State)
}

fn open_taps(options: &Options, pairs: u16) -> Result<Vec<Arc<Tap>>, OpenError> {
    let capture = options.pcap_fd.map(open_capture).transpose()?;
    let taps = match (&options.tap_name, options.tap_fds.as_slice()) {
        (Some(name), []) => Tap::open(name, usize::from(pairs))?,
        (None, fds) if fds.len() == usize::from(pairs) => fds
            .iter()
            .map(|fd| Ok(Tap::adopt(vhost_daemon::inherited(*fd).map_err(OpenError::Fd)?)?))
            .collect::<Result<_, OpenError>>()?,
        (None, [_, ..]) => return Err(OptionsError::TapFds(2 * pairs, pairs).into()),
        _ => return Err(OptionsError::Tap.into()),
    };
    let with_capture = |mut tap: Tap| {
        tap.set_capture(capture.clone());
        Arc::new(tap)
    };
    Ok(taps.into_iter().map(with_capture).collect())
}

/// Receive and transmit queues in turn, then the control queue, as virtio 1.3, 5.1.2 numbers them; the
/// third queue is one or the other.
fn make_handlers(
    options: &Options,
    parts: &Parts,
    taps: &[Arc<Tap>],
) -> Result<Vec<Box<dyn QueueHandler>>, OpenError> {
    let receive = options.receive_limit.limiter();
    let transmit = options.transmit_limit.limiter();
    let control = || {
        ControlQueue::new(
            Arc::clone(&parts.steering),
            Arc::clone(&parts.station),
            Arc::clone(&parts.link),
        )
    };
    let mut handlers: Vec<Box<dyn QueueHandler>> = Vec::with_capacity(2 * taps.len() + 1);
    for (pair, tap) in taps.iter().enumerate() {
        let pacer = |flow, limiter: &SharedLimiter, seat| {
            Pacer::new(Arc::clone(tap), flow, limiter.clone(), seat).map_err(OpenError::Events)
        };
        let seat = parts.steering.seat(pair).filter(|_| taps.len() > 1).cloned();
        let running = Running::new(Arc::clone(&parts.steering), pair);
        let pacer_in = pacer(Flow::Receive, &receive, seat)?;
        let receive_queue = ReceiveQueue::new(
            pacer_in,
            Arc::clone(&parts.counters),
            Arc::clone(&parts.link),
            running,
            options.mtu,
        );
        let receive_queue = receive_queue.map_err(OpenError::Events)?;
        if pair == 1 {
            handlers.push(Box::new(ThirdQueue::new(receive_queue, control())));
        } else {
            handlers.push(Box::new(receive_queue));
        }
        let pacer_out = pacer(Flow::Transmit, &transmit, None)?;
        handlers.push(Box::new(TransmitQueue::new(
            pacer_out,
            Arc::clone(&parts.counters),
            Arc::clone(&parts.link),
            parts.guard.clone(),
        )));
    }
    handlers.push(Box::new(control()));
    Ok(handlers)
}

/// The features that these TAPs, of which `uso` is known, and these flags allow.
fn offered(options: &Options, taps: &[Arc<Tap>], uso: bool) -> u64 {
    let several = taps.len() > 1;
    let when = |condition: bool, features: u64| if condition { features } else { 0 };
    TCP_FEATURES
        | 1 << VIRTIO_NET_F_MRG_RXBUF
        | 1 << VIRTIO_NET_F_STATUS
        | 1 << VIRTIO_NET_F_CTRL_VQ
        | 1 << VIRTIO_NET_F_CTRL_RX
        | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
        | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
        | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
        | when(uso, USO_FEATURES)
        | when(several, 1 << VIRTIO_NET_F_MQ)
        | when(options.mac.is_some(), 1 << VIRTIO_NET_F_MAC)
        | when(options.mtu.is_some(), 1 << VIRTIO_NET_F_MTU)
}

impl Device for NetDevice {
    fn features(&self) -> u64 {
        self.features
    }

    fn set_features(&mut self, features: u64) {
        let offload = Offloads::new(features).tun();
        self.set_offload(offload);
        self.parts.steering.set_offload(offload);
        self.watch
            .set_announces(features & (1 << VIRTIO_NET_F_GUEST_ANNOUNCE) != 0);
    }

    /// `struct virtio_net_config` up to `mtu`.
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(12);
        config.extend(self.parts.station.mac().map_or([0; 6], |mac| mac.0));
        config.extend(self.parts.link.status().to_le_bytes());
        config.extend((self.taps.len() as u16).to_le_bytes());
        config.extend(self.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    fn write_config(&mut self, _: u32, _: &[u8]) -> Result<(), ConfigError> {
        // A virtio 1.x driver has nothing to write here (virtio 1.3, 5.1.4.2).
        Err(ConfigError)
    }

    fn records_inflight(&self) -> bool {
        // Frames complete in order: a successor goes on at the used index.
        false
    }

    fn config_source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.watch.source())
    }

    fn config_changed(&mut self) -> bool {
        let Parts { counters, link, .. } = &self.parts;
        self.watch.control(|| counters.prometheus(link.is_up()));
        self.watch.changed()
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        std::mem::take(&mut self.handlers)
    }

    /// With more pairs than processors each frame would wake a thread: there are as many threads for either
    /// direction as processors, and the control queue's.
    fn thread_of(&self, index: u16, processors: usize) -> u16 {
        let pairs = self.taps.len();
        if usize::from(index) == 2 * pairs {
            return index;
        }
        index % (2 * pairs.min(processors)) as u16
    }

    fn reset(&mut self) {
        // Until a control queue says otherwise: a front end may have one of its own.
        self.parts.steering.reset();
        self.parts.station.reset();
        self.watch.set_announces(false);
        self.set_offload(TunOffload::default());
    }

    fn flush(&mut self) -> io::Result<()> {
        self.parts.counters.log();
        self.parts.station.leave();
        Ok(())
    }
}
