//! KVM's side of interrupts and doorbells, without KVM.

use crate::frontend::SharedEvent;
use crate::platform::{Doorbells, Gsi, Interrupts, MsiMessage};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex};

/// Where a test may put a signal between two steps of the code under test.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Point {
    Route,
    BeforeAttach,
    AfterAttach,
    BeforeDetach,
    AfterDetach,
}

type Hook = Box<dyn FnMut(Point) + Send>;

/// What a strict fake adds to a count that it finds at attach, to know it again.
const MARK: u64 = 1 << 32;

struct Irqfd {
    gsi: u32,
    event: SharedEvent,
    /// The marked count at attach that no signal has woken the irqfd for; 0 for none.
    unseen: u64,
}

#[derive(Default)]
struct State {
    gsis: u32,
    freed: Vec<u32>,
    routes: BTreeMap<u32, MsiMessage>,
    route_calls: usize,
    attached: BTreeMap<RawFd, Irqfd>,
    injected: BTreeMap<u32, u64>,
    undelivered: u64,
}

impl State {
    /// Takes signals of attached eventfds, as an irqfd does at the moment of the signal.
    fn pump(&mut self) {
        for irqfd in self.attached.values_mut() {
            let count = irqfd.event.take();
            if count == 0 {
                continue;
            }
            if count == irqfd.unseen {
                add(&irqfd.event, count);
                continue;
            }
            irqfd.unseen = 0;
            match self.routes.contains_key(&irqfd.gsi) {
                true => *self.injected.entry(irqfd.gsi).or_default() += 1,
                false => self.undelivered += 1,
            }
        }
    }
}

/// Interrupts that are counted. As with KVM, attaching looks at what an eventfd counted before; a
/// strict fake does not, because the contract does not promise it (one thread only).
#[derive(Default)]
pub(crate) struct FakeInterrupts {
    strict: bool,
    limit: Option<usize>,
    state: Mutex<State>,
    hook: Mutex<Option<Hook>>,
}

impl FakeInterrupts {
    pub(crate) fn strict() -> Self {
        Self {
            strict: true,
            ..Self::default()
        }
    }

    /// Of so many at a time.
    pub(crate) fn limited(limit: usize) -> Self {
        Self {
            limit: Some(limit),
            ..Self::default()
        }
    }

    pub(crate) fn hook(&self, hook: impl FnMut(Point) + Send + 'static) {
        *self.hook.lock().unwrap() = Some(Box::new(hook));
    }

    pub(crate) fn injected(&self, gsi: u32) -> u64 {
        let mut state = self.state.lock().unwrap();
        state.pump();
        assert_eq!(state.undelivered, 0, "an interrupt met no route");
        state.injected.get(&gsi).copied().unwrap_or(0)
    }

    pub(crate) fn route(&self, gsi: u32) -> Option<MsiMessage> {
        self.state.lock().unwrap().routes.get(&gsi).copied()
    }

    pub(crate) fn route_calls(&self) -> usize {
        self.state.lock().unwrap().route_calls
    }

    pub(crate) fn freed(&self) -> usize {
        self.state.lock().unwrap().freed.len()
    }

    pub(crate) fn attached(&self) -> usize {
        self.state.lock().unwrap().attached.len()
    }

    fn at(&self, point: Point) {
        if let Some(hook) = self.hook.lock().unwrap().as_mut() {
            hook(point);
        }
    }
}

impl Interrupts for FakeInterrupts {
    fn allocate(&self) -> io::Result<Gsi> {
        let mut state = self.state.lock().unwrap();
        let taken = state.gsis as usize - state.freed.len();
        if self.limit.is_some_and(|limit| taken >= limit) {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        state.gsis += 1;
        Ok(Gsi(state.gsis - 1))
    }

    fn free(&self, gsi: Gsi) {
        self.state.lock().unwrap().freed.push(gsi.0);
    }

    fn set_route(&self, gsi: Gsi, message: Option<MsiMessage>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.route_calls += 1;
        match message {
            Some(message) => state.routes.insert(gsi.0, message),
            None => state.routes.remove(&gsi.0),
        };
        drop(state);
        self.at(Point::Route);
        Ok(())
    }

    fn attach(&self, gsi: Gsi, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        self.at(Point::BeforeAttach);
        let event = SharedEvent::from(eventfd.try_clone_to_owned()?);
        let mut unseen = 0;
        if self.strict && event.is_signalled() {
            unseen = event.take() + MARK;
            add(&event, unseen);
        }
        let irqfd = Irqfd {
            gsi: gsi.0,
            event,
            unseen,
        };
        let mut state = self.state.lock().unwrap();
        let old = state.attached.insert(eventfd.as_raw_fd(), irqfd);
        drop(state);
        assert!(old.is_none(), "attached twice");
        self.at(Point::AfterAttach);
        Ok(())
    }

    fn detach(&self, _gsi: Gsi, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        self.at(Point::BeforeDetach);
        let mut state = self.state.lock().unwrap();
        state.pump();
        let old = state.attached.remove(&eventfd.as_raw_fd());
        drop(state);
        self.at(Point::AfterDetach);
        old.map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// Doorbells that are noted.
#[derive(Default)]
pub(crate) struct FakeDoorbells(Mutex<BTreeSet<u64>>);

impl FakeDoorbells {
    pub(crate) fn attached(&self) -> Vec<u64> {
        self.0.lock().unwrap().iter().copied().collect()
    }
}

impl Doorbells for FakeDoorbells {
    fn attach(&self, address: u64, _eventfd: BorrowedFd<'_>) -> io::Result<()> {
        match self.0.lock().unwrap().insert(address) {
            true => Ok(()),
            false => Err(io::ErrorKind::AlreadyExists.into()),
        }
    }

    fn detach(&self, address: u64, _eventfd: BorrowedFd<'_>) -> io::Result<()> {
        match self.0.lock().unwrap().remove(&address) {
            true => Ok(()),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// An eventfd.
pub(crate) fn event() -> Arc<SharedEvent> {
    Arc::new(SharedEvent::new().unwrap())
}

/// Signals as whoever has a copy does, which is no matter of emptying first.
pub(crate) fn add(event: &SharedEvent, count: u64) {
    nix::unistd::write(event.as_fd(), &count.to_ne_bytes()).unwrap();
}
