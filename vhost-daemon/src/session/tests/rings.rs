//! When a ring's chains are taken: what starts, enables and resets it.

use crate::memory::tests::{sealed, spec};
use crate::memory::{GuestAddress, GuestMemory, Sealing};
use crate::ring::{Ring, RingFault};
use crate::session::Session;
use crate::wait::{is_ready, wait};
use crate::worker::Worker;
use crate::{ConfigError, Device, QueueHandler, Wait};
use jailer::sandbox::{Role, SeccompMode};
use nix::poll::{PollFd, PollFlags};
use nix::sys::eventfd::EventFd;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use vhost::vhost_user::message::{
    VhostUserProtocolFeatures, VhostUserVirtioFeatures, VhostUserVringAddrFlags,
};
use vhost::vhost_user::{Error, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

const LONG: Duration = Duration::from_secs(20);
/// For what must not happen.
const SHORT: Duration = Duration::from_millis(100);
const BASE: u64 = 0x10_0000;
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// A handler that says when it is asked, and then is as slow as the test wants.
struct Slow {
    asked: Sender<()>,
    go_on: Receiver<()>,
    discards: bool,
}

impl Slow {
    fn new(discards: bool) -> (Self, Receiver<()>, Sender<()>) {
        let ((asked, seen), (go_on, wait)) = (channel(), channel());
        let slow = Self {
            asked,
            go_on: wait,
            discards,
        };
        (slow, seen, go_on)
    }
}

impl QueueHandler for Slow {
    fn start(&mut self, _features: u64) {}

    fn discards_when_disabled(&self) -> bool {
        self.discards
    }

    fn process(&mut self, _ring: &mut Ring) -> Result<Wait, RingFault> {
        let _ = self.asked.send(());
        // An error: the test is over.
        let _ = self.go_on.recv();
        Ok(Wait::AVAILABLE)
    }
}

/// Its queues share a thread.
struct Fake(Vec<Slow>);

impl Device for Fake {
    fn features(&self) -> u64 {
        0
    }
    fn set_features(&mut self, _features: u64) {}
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn write_config(&mut self, _offset: u32, _data: &[u8]) -> Result<(), ConfigError> {
        Err(ConfigError)
    }
    fn records_inflight(&self) -> bool {
        false
    }
    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        let handlers = self.0.drain(..);
        handlers.map(|handler| Box::new(handler) as _).collect()
    }
    fn thread_of(&self, _index: u16, _processors: usize) -> u16 {
        0
    }
    fn reset(&mut self) {}
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A session with a queue or two, and the test's side of the first one's handler.
struct Rig {
    session: Session,
    asked: Receiver<()>,
    go_on: Sender<()>,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
}

impl Rig {
    fn new(features: u64) -> Self {
        Self::with(features, false)
    }

    fn with(features: u64, discards: bool) -> Self {
        Self::of(features, discards, None)
    }

    fn of(features: u64, discards: bool, second: Option<Slow>) -> Self {
        let (slow, asked, go_on) = Slow::new(discards);
        let mut device = Fake([slow].into_iter().chain(second).collect());
        let workers = Worker::spawn_all(&mut device, Role::Disk, SeccompMode::Off, Duration::ZERO);
        let mut session = Session::new(Box::new(device), workers.unwrap(), Sealing::Required, None);
        let region = spec(BASE, 0x4000, BASE, 0);
        let memory = GuestMemory::default().with_region(region, sealed(0x4000), Sealing::Required);
        session.replace_memory(memory.unwrap()).unwrap();
        session.set_features(1 << VIRTIO_F_VERSION_1 | features).unwrap();
        Self {
            session,
            asked,
            go_on,
            kick: EventFd::new().unwrap(),
            call: EventFd::new().unwrap(),
            error: EventFd::new().unwrap(),
        }
    }

    /// What a front end says about a ring that it starts.
    fn start(&mut self) {
        self.place(0);
        self.run().unwrap();
    }

    /// Where it lies.
    fn place(&mut self, index: u32) {
        let flags = VhostUserVringAddrFlags::empty();
        let [table, available, used] = [0, 0x1000, 0x2000].map(|at| BASE + at);
        self.session.set_vring_num(index, 8).unwrap();
        let addresses = self
            .session
            .set_vring_addr(index, flags, table, used, available, 0);
        addresses.unwrap();
    }

    fn run(&mut self) -> vhost::vhost_user::Result<()> {
        let [kick, call, error] = [&self.kick, &self.call, &self.error].map(|event| {
            let copy = event.as_fd().try_clone_to_owned();
            Some(File::from(copy.unwrap()))
        });
        self.session.set_vring_call(0, call).unwrap();
        self.session.set_vring_err(0, error).unwrap();
        self.session.set_vring_kick(0, kick)
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let memory = &self.session.memory;
        let segment = memory.segment(GuestAddress(BASE + at), bytes.len());
        memory.slice(&segment.unwrap()).unwrap().copy_from(bytes);
    }

    /// Makes a chain of one buffer available, the first one.
    fn offer(&self) {
        let buffer = BASE + 0x3000;
        self.write(0, &buffer.to_le_bytes());
        self.write(8, &64u64.to_le_bytes());
        self.write(0x1002, &1u16.to_le_bytes());
        self.kick.write(1).unwrap();
    }

    /// Whether the guest hears of a chain that was given back.
    fn interrupts(&self, limit: Duration) -> bool {
        is_signalled(&self.call, limit)
    }

    /// Waits for the handler and lets it go.
    fn serves(&self) -> bool {
        let serves = self.asked.recv_timeout(LONG).is_ok();
        self.go_on.send(()).unwrap();
        serves
    }
}

fn is_signalled(event: &EventFd, limit: Duration) -> bool {
    let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    wait(&mut fds, Some(limit)).unwrap();
    is_ready(&fds[0])
}

fn copy_of(event: &EventFd) -> File {
    event.as_fd().try_clone_to_owned().unwrap().into()
}

#[test]
fn queues_of_one_thread_are_served_in_turn() {
    let (second, asked, go_on) = Slow::new(false);
    let mut rig = Rig::of(0, false, Some(second));
    rig.start();
    assert!(rig.serves(), "the first queue");
    let kick = EventFd::new().unwrap();
    rig.place(1);
    let fd = kick.as_fd().try_clone_to_owned().unwrap();
    rig.session.set_vring_kick(1, Some(fd.into())).unwrap();
    asked.recv_timeout(LONG).expect("the second queue");
    // While that one is at work the first waits, and is not forgotten.
    rig.kick.write(1).unwrap();
    assert!(rig.asked.recv_timeout(SHORT).is_err());
    go_on.send(()).unwrap();
    assert!(rig.serves(), "the first queue, after the second");
    // One stops, the other goes on.
    rig.session.get_vring_base(0).unwrap();
    rig.kick.write(1).unwrap();
    kick.write(1).unwrap();
    asked.recv_timeout(LONG).expect("the second queue, alone");
    go_on.send(()).unwrap();
    rig.session.get_vring_base(1).unwrap();
    assert!(rig.asked.try_recv().is_err(), "a stopped ring was served");
}

#[test]
fn a_ring_that_cannot_start_is_told_by_its_error_eventfd() {
    let no_version: fn(&mut Rig) = |rig| {
        rig.session.set_features(PROTOCOL_FEATURES).unwrap();
        rig.place(0);
    };
    let nowhere: fn(&mut Rig) = |_| {};
    let unaligned: fn(&mut Rig) = |rig| {
        rig.place(0);
        let flags = VhostUserVringAddrFlags::empty();
        let addresses = rig.session.set_vring_addr(0, flags, BASE + 1, BASE, BASE, 0);
        addresses.unwrap();
    };
    for break_it in [no_version, nowhere, unaligned] {
        let mut rig = Rig::new(PROTOCOL_FEATURES);
        break_it(&mut rig);
        assert!(rig.run().is_err());
        assert!(is_signalled(&rig.error, Duration::ZERO));
    }
}

#[test]
fn a_reset_disables_the_rings() {
    let mut rig = Rig::new(PROTOCOL_FEATURES);
    for _ in 0..2 {
        rig.start();
        assert!(
            rig.asked.recv_timeout(SHORT).is_err(),
            "served before it is enabled"
        );
        rig.session.set_vring_enable(0, true).unwrap();
        assert!(rig.serves());
        rig.session.reset_device().unwrap();
    }
}

#[test]
fn a_ring_that_is_enabled_is_enabled_again_without_its_thread() {
    let mut rig = Rig::new(PROTOCOL_FEATURES);
    rig.session.set_vring_enable(0, true).unwrap();
    rig.start();
    rig.asked.recv_timeout(LONG).unwrap();
    // The thread is with its handler until it may go on.
    rig.session.set_vring_enable(0, true).unwrap();
    rig.go_on.send(()).unwrap();
    rig.session.get_vring_base(0).unwrap();
}

#[test]
fn rings_start_enabled_without_protocol_features() {
    let mut rig = Rig::new(0);
    for _ in 0..2 {
        rig.start();
        assert!(rig.serves());
        rig.session.reset_device().unwrap();
    }
}

#[test]
fn what_comes_on_a_disabled_ring_waits_or_is_discarded() {
    for discards in [false, true] {
        let mut rig = Rig::with(PROTOCOL_FEATURES, discards);
        rig.session.set_vring_enable(0, true).unwrap();
        rig.start();
        assert!(rig.serves());
        rig.session.set_vring_enable(0, false).unwrap();
        rig.offer();
        let limit = if discards { LONG } else { SHORT };
        assert_eq!(rig.interrupts(limit), discards);
        assert!(rig.asked.try_recv().is_err(), "served while it is disabled");
        rig.session.set_vring_enable(0, true).unwrap();
        assert!(rig.serves());
    }
}

#[test]
fn nothing_is_discarded_before_a_ring_is_enabled() {
    let mut rig = Rig::with(PROTOCOL_FEATURES, true);
    rig.offer();
    rig.start();
    assert!(!rig.interrupts(SHORT));
    rig.session.set_vring_enable(0, true).unwrap();
    assert!(rig.serves());
}

#[test]
fn who_cannot_hear_that_a_ring_is_refused_loses_the_session() {
    let refusals: [fn(&mut Session) -> vhost::vhost_user::Result<()>; 5] = [
        |session| session.set_vring_num(0, 3),
        |session| session.set_vring_base(0, 1 << 16),
        |session| {
            let flags = VhostUserVringAddrFlags::VHOST_VRING_F_LOG;
            session.set_vring_addr(0, flags, BASE, BASE, BASE, 0)
        },
        |session| session.set_vring_kick(0, Some(copy_of(&EventFd::new().unwrap()))),
        |session| session.set_features(1 << 50),
    ];
    for (at, refuse) in refusals.into_iter().enumerate() {
        let mut rig = Rig::new(0);
        let ends = |session: &mut Session| match refuse(session) {
            Err(Error::BackendInternalError) => true,
            Err(Error::ReqHandlerError(_)) => false,
            other => panic!("{at}: {other:?}"),
        };
        assert!(ends(&mut rig.session), "{at}: nobody hears of it");
        let error = copy_of(&rig.error);
        rig.session.set_vring_err(0, Some(error)).unwrap();
        assert_eq!(
            ends(&mut rig.session),
            at == 4,
            "{at}: by the eventfd of the ring's errors"
        );
        assert!(
            at == 4 || is_signalled(&rig.error, Duration::ZERO),
            "{at}: nobody signals the ring's errors"
        );
        rig.session.protocol_features |= VhostUserProtocolFeatures::REPLY_ACK.bits();
        assert!(!ends(&mut rig.session), "{at}: it is answered");
    }
}
