//! `isolated=NAME`: a segment that all VMs of one user that name it share, with no way out.
//!
//! The segment is a bridge in a network namespace that holds nothing else. Its *keeper* is started
//! by the first VM and ends with the last; each VM has a *member*, which asks the keeper for a TAP
//! and ends with the VM, or with the keeper, so that no VM believes itself on a segment that others
//! cannot join. They meet at an abstract socket, which leaves no path behind.
#![expect(unsafe_code, reason = "a fork")]

use super::holder::{Holder, Post, detach, enter_namespace, receive_taps, send_refusal, send_taps};
use super::settings::Nic;
use super::{NetError, interface};
use crate::launch::connect::connect_within;
use crate::sandbox::leave_paths;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::sockopt::{PeerCredentials, ReceiveTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, getsockopt, listen, recv,
    send, setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::{ForkResult, fork, geteuid};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

const BRIDGE: &str = "segment";
/// The kernel puts a number in its place.
const PORT: &str = "vm%d";
/// A keeper that ends and one that starts are waited out this many times.
const ATTEMPTS: usize = 16;
/// Between two of them.
const RETRY: Duration = Duration::from_millis(5);
/// Most VMs' NICs on one segment.
const MOST_MEMBERS: usize = 256;
/// How long a keeper may take to let a member in: it makes a TAP for one after the other.
const ENTRY: Duration = Duration::from_secs(5);
/// After each of these waits for that a member sees whether its launcher is there.
const LOOK: Duration = Duration::from_millis(200);
/// Who connects says at once what it wants. Also how long a keeper waits for its first member.
const PATIENCE_SECONDS: u16 = 2;

/// Starts a member, which gets the TAP from the keeper of segment `name`.
pub(super) fn start(field: &str, nic: &Nic, name: &str) -> Result<Holder, NetError> {
    let address = UnixAddr::new_abstract(format!("bulkhead/{}/{name}", geteuid()).as_bytes())
        .map_err(|e| NetError::Make("name the segment", e.into()))?;
    let wish = Wish {
        queues: nic.queues,
        mtu: nic.mtu.unwrap_or(0),
    };
    Holder::start(format!("{field}.isolated"), move |post: &Post| {
        let (keeper, taps) = join(post, &address, &wish)?;
        post.give(&taps)?;
        drop(taps);
        // It reads nothing that anyone sends: where the kernel refuses, it stays as it is.
        let _ = unshare(CloneFlags::CLONE_NEWUSER).map(|()| leave_paths());
        post.retire(&[keeper.as_raw_fd()]);
        let mut fds = [keeper.as_fd(), post.socket().as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        while poll(&mut fds, PollTimeout::NONE) == Err(Errno::EINTR) {}
        Ok(())
    })
}

/// What a member asks for.
struct Wish {
    queues: u16,
    /// 0: the kernel's default.
    mtu: u16,
}

impl Wish {
    fn to_bytes(&self) -> [u8; 4] {
        let ([a, b], [c, d]) = (self.queues.to_ne_bytes(), self.mtu.to_ne_bytes());
        [a, b, c, d]
    }

    fn from_bytes([a, b, c, d]: [u8; 4]) -> Self {
        Self {
            queues: u16::from_ne_bytes([a, b]).clamp(1, 8),
            mtu: u16::from_ne_bytes([c, d]),
        }
    }
}

fn seqpacket() -> nix::Result<OwnedFd> {
    let kind = SockType::SeqPacket;
    socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)
}

/// A connection to whoever listens, which may be anyone, who lets nobody in; `None`: nobody listens.
fn enter(post: &Post, address: &UnixAddr) -> Result<Option<OwnedFd>, NetError> {
    let end = Instant::now() + ENTRY;
    loop {
        match connect_within(SockType::SeqPacket, address, LOOK) {
            Ok(socket) => return Ok(Some(socket)),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::TimedOut && Instant::now() < end => {}
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                let why = format!("whoever listens at the segment's name has let nobody in within {ENTRY:?}");
                return Err(NetError::Holder(why));
            }
            Err(e) => return Err(NetError::Make("reach the segment's keeper", e)),
        }
        if post.is_left() {
            return Err(NetError::Left);
        }
    }
}

/// A connection to the keeper, which is started where there is none, and the TAP from it.
fn join(post: &Post, address: &UnixAddr, wish: &Wish) -> Result<(OwnedFd, Vec<OwnedFd>), NetError> {
    let failed = |e: Errno| NetError::Make("reach the segment's keeper", e.into());
    for _ in 0..ATTEMPTS {
        let Some(socket) = enter(post, address)? else {
            start_keeper(address).map_err(failed)?;
            continue;
        };
        check_peer(&socket)?;
        let asked = send(socket.as_raw_fd(), &wish.to_bytes(), MsgFlags::MSG_NOSIGNAL);
        match asked.map(|_| receive_taps(&socket, Some(post))) {
            Ok(Ok(taps)) => return Ok((socket, taps)),
            Ok(Err(refusal @ (NetError::Left | NetError::Lacking(_)))) => return Err(refusal),
            Ok(Err(refusal @ NetError::Holder(_))) if !ended(&refusal) => return Err(refusal),
            // It was about to end, and has.
            Ok(Err(_)) | Err(Errno::EPIPE | Errno::ECONNRESET) => {}
            Err(e) => return Err(failed(e)),
        }
    }
    Err(failed(Errno::ECONNREFUSED))
}

/// The socket was closed before anything came.
fn ended(refusal: &NetError) -> bool {
    matches!(refusal, NetError::Holder(why) if why == super::holder::DIED)
}

/// Another user's process may have taken the name.
fn check_peer(socket: &OwnedFd) -> Result<(), NetError> {
    match getsockopt(socket, PeerCredentials) {
        Ok(peer) if peer.uid() == geteuid().as_raw() => Ok(()),
        _ => Err(NetError::Holder("the segment's name is another user's".into())),
    }
}

/// Takes the name and forks a keeper with it; someone else may have been first.
fn start_keeper(address: &UnixAddr) -> nix::Result<()> {
    let listener = seqpacket()?;
    match bind(listener.as_raw_fd(), address) {
        Ok(()) => {}
        Err(Errno::EADDRINUSE) => {
            // Of another launcher, between its two calls: no event tells of the second.
            std::thread::sleep(RETRY);
            return Ok(());
        }
        Err(e) => return Err(e),
    }
    listen(&listener, Backlog::new(64).unwrap_or(Backlog::MAXCONN))?;
    // SAFETY: this process has one thread, so the child may do whatever the parent might.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => Ok(()),
        ForkResult::Child => {
            detach(&[listener.as_raw_fd()]);
            keep(&listener);
            // SAFETY: ends the child without running what the parent registered for its exit.
            unsafe { libc::_exit(0) }
        }
    }
}

/// The life of the keeper: its capabilities reach its own namespace only.
fn keep(listener: &OwnedFd) {
    let made = enter_namespace().and_then(|()| {
        let _ = nix::sys::prctl::set_no_new_privs();
        interface::keep_quiet();
        let interfaces = interface::Interfaces::open()?;
        interfaces.make_bridge(BRIDGE)?;
        interfaces.up(BRIDGE)?;
        Ok(interfaces)
    });
    let mut members: Vec<OwnedFd> = Vec::new();
    loop {
        let mut fds = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        fds.extend(
            members
                .iter()
                .map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)),
        );
        let timeout = match members.len() {
            0 => PollTimeout::from(PATIENCE_SECONDS * 1000),
            _ => PollTimeout::NONE,
        };
        match poll(&mut fds, timeout) {
            Ok(0) => return,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        drop(fds);
        let had = members.len();
        let mut gone = ready.iter().skip(1);
        members.retain(|_| !gone.next().copied().unwrap_or(false));
        if ready.first().copied().unwrap_or(false) {
            members.extend(admit(listener, &made, had));
        } else if members.is_empty() && had > 0 {
            // Whoever connects from now on finds the socket closed, and starts another keeper.
            return;
        }
    }
}

/// Gives the next one who connects a TAP, and returns its connection.
fn admit(
    listener: &OwnedFd,
    made: &Result<interface::Interfaces, NetError>,
    members: usize,
) -> Option<OwnedFd> {
    let number = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).ok()?;
    // SAFETY: the kernel has just made this descriptor for us.
    let member = unsafe { OwnedFd::from_raw_fd(number) };
    check_peer(&member).ok()?;
    setsockopt(
        &member,
        ReceiveTimeout,
        &TimeVal::seconds(PATIENCE_SECONDS.into()),
    )
    .ok()?;
    let mut bytes = [0; 4];
    if recv(number, &mut bytes, MsgFlags::empty()) != Ok(bytes.len()) {
        return None;
    }
    let taps = match made {
        Err(error) => Err(error.to_be_told()),
        Ok(_) if members >= MOST_MEMBERS => Err(NetError::Holder("the segment is full".into())),
        Ok(interfaces) => plug_in(interfaces, &Wish::from_bytes(bytes)),
    };
    match taps.and_then(|taps| send_taps(&member, &taps)) {
        Ok(()) => Some(member),
        Err(error) => {
            send_refusal(&member, &error);
            None
        }
    }
}

fn plug_in(interfaces: &interface::Interfaces, wish: &Wish) -> Result<Vec<OwnedFd>, NetError> {
    let (name, taps) = interface::attach(PORT, wish.queues)?;
    if wish.mtu != 0 {
        interfaces.set_mtu(&name, wish.mtu.into())?;
    }
    interfaces.add_port(BRIDGE, &name)?;
    interfaces.up(&name)?;
    Ok(taps)
}
