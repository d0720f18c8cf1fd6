//! The link as the driver sees it: the launcher may take it down, and a TAP that vanishes does.
//!
//! Queues' threads tell of a TAP that is gone and of what the driver changed; the session's thread reads
//! what the launcher wants from `--link-fd` and tells the driver by a change of the configuration space
//! (virtio 1.3, 5.1.4). It watches `--control-fd` by the same descriptor.

use crate::state::State;
use crate::tap::{Tap, is_gone};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vhost_daemon::Orders;
use vhost_daemon::event::{Happening, tell};
use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};

/// What one byte on `--link-fd` asks for.
const DOWN: u8 = b'0';
const UP: u8 = b'1';
const ANNOUNCE: u8 = b'a';
/// Bytes taken from `--link-fd` at a time; more stay in the pipe, which wakes again.
const MOST_BYTES: usize = 64;

/// State of the link, shared by the queues and the session.
pub struct Link {
    /// The launcher wants it up.
    wanted: AtomicBool,
    /// The TAP is gone for good.
    gone: AtomicBool,
    /// The driver is to send gratuitous packets and has not acknowledged (virtio 1.3, 5.1.6.5.4).
    announce: AtomicBool,
    wake: EventFd,
    /// The queue that is never detached.
    tap: Arc<Tap>,
    /// Keeps what is wanted.
    state: Arc<State>,
}

impl Link {
    /// The link of the interface whose first queue `tap` is: up, or as the latest order in `state` has
    /// it, on the host's side too.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new(tap: Arc<Tap>, state: Arc<State>) -> io::Result<Self> {
        let link = Self {
            wanted: AtomicBool::new(state.link().unwrap_or(true)),
            gone: AtomicBool::new(false),
            announce: AtomicBool::new(false),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            tap,
            state,
        };
        if !link.find_gone() {
            link.show_carrier();
        }
        Ok(link)
    }

    /// Frames may pass.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) && !self.gone.load(Ordering::Relaxed)
    }

    /// A queue met `error`. True for EBADFD: it is detached, or there is no TAP any more.
    pub fn suspect(&self, error: &io::Error) -> bool {
        let bad = is_gone(error);
        if bad && !self.gone.load(Ordering::Acquire) {
            self.find_gone();
        }
        bad
    }

    /// Whether there is no TAP any more.
    fn find_gone(&self) -> bool {
        // Asked of the queue that is never detached, with what is set already.
        let gone = self.set_carrier().is_err_and(|error| is_gone(&error));
        if gone && !self.gone.swap(true, Ordering::AcqRel) {
            tell(Happening::TapLost, "the TAP is gone: the guest's link is down");
            self.config_changed();
        }
        gone
    }

    /// The configuration space is another now: the session tells the front end, which keeps a copy.
    pub fn config_changed(&self) {
        // An eventfd at its limit wakes just as well.
        let _ = self.wake.write(1);
    }

    fn set_carrier(&self) -> io::Result<()> {
        self.tap.set_carrier(self.wanted.load(Ordering::Relaxed))
    }

    fn order(&self, up: bool) {
        self.state.set_link(up);
        self.wanted.store(up, Ordering::Relaxed);
        self.show_carrier();
    }

    fn show_carrier(&self) {
        if let Err(error) = self.set_carrier() {
            tracing::warn!(%error, "the host's side of the link does not follow");
        }
    }

    /// The driver has announced itself.
    pub fn announced(&self) {
        if self.announce.swap(false, Ordering::AcqRel) {
            self.config_changed();
        }
    }

    /// `status` of the configuration space.
    #[must_use]
    pub fn status(&self) -> u16 {
        let up = if self.is_up() { VIRTIO_NET_S_LINK_UP } else { 0 };
        let announce = self.is_up() && self.announce.load(Ordering::Acquire);
        (up | if announce { VIRTIO_NET_S_ANNOUNCE } else { 0 }) as u16
    }
}

/// The session's side: one fd that tells of every cause to look.
pub struct LinkWatch {
    link: Arc<Link>,
    epoll: Epoll,
    orders: Option<OwnedFd>,
    control: Orders,
    announces: bool,
}

impl LinkWatch {
    /// Watches `link`, what the launcher sends through `orders`, the read end of a pipe or a
    /// socket, and `control`. Before lockdown.
    ///
    /// # Errors
    /// When one of them cannot be waited for.
    pub fn new(link: Arc<Link>, orders: Option<OwnedFd>, control: Orders) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&link.wake, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        if let Some(orders) = &orders {
            let flags = OFlag::from_bits_retain(fcntl(orders, FcntlArg::F_GETFL)?);
            fcntl(orders, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
            epoll.add(orders, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        }
        if let Some(source) = control.source() {
            epoll.add(source, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        }
        Ok(Self {
            link,
            epoll,
            orders,
            control,
            announces: false,
        })
    }

    /// Readable when there is a cause.
    #[must_use]
    pub fn source(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// Whether the driver, another one, acknowledged VIRTIO_NET_F_GUEST_ANNOUNCE.
    pub fn set_announces(&mut self, announces: bool) {
        self.announces = announces;
        self.link.announce.store(false, Ordering::Release);
    }

    /// Takes all causes; whether the driver has to look at the configuration space.
    pub fn changed(&mut self) -> bool {
        let before = self.link.status();
        let told = self.link.wake.read().is_ok();
        let mut bytes = [0; MOST_BYTES];
        let taken = match &self.orders {
            Some(orders) => nix::unistd::read(orders, &mut bytes),
            None => Err(Errno::EAGAIN),
        };
        match taken {
            Ok(0) | Err(Errno::EIO | Errno::ECONNRESET) => self.forget_orders(),
            Ok(count) => bytes.iter().take(count).for_each(|byte| self.obey(*byte)),
            Err(_) => {}
        }
        told || self.link.status() != before
    }

    /// Takes orders that came by `--control-fd`; `metrics` is what one of them asks for.
    pub fn control(&mut self, metrics: impl Fn() -> String) {
        for order in self.control.take() {
            match order.words.trim_ascii() {
                "metrics" => self.control.answer_at_length(order.number, &metrics()),
                other => {
                    let error = format!("error: {other:?} is no order: write metrics\n");
                    self.control.answer(order.number, &error);
                }
            }
        }
        // Others have copies of it: to close this one does not end the watch.
        if let Some(socket) = self.control.take_over()
            && let Err(error) = self.epoll.delete(&socket)
        {
            tracing::warn!(%error, "cannot stop to watch --control-fd");
        }
    }

    fn obey(&self, order: u8) {
        match order {
            DOWN | UP => {
                self.link.order(order == UP);
                // Whoever was away tells the network where it is.
                self.link
                    .announce
                    .store(order == UP && self.announces, Ordering::Release);
            }
            ANNOUNCE => self.link.announce.store(self.announces, Ordering::Release),
            b'\n' => {}
            other => tracing::warn!(order = other, "--link-fd: not one of 0, 1 and a"),
        }
    }

    /// The other end is closed: nothing more comes.
    fn forget_orders(&mut self) {
        if let Some(orders) = self.orders.take()
            && let Err(error) = self.epoll.delete(&orders)
        {
            tracing::warn!(%error, "cannot stop to watch --link-fd");
        }
    }
}
