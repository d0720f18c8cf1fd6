//! The other end of a guest's wire: a TAP in a network namespace of its own, and a thread that
//! echoes the guest's test frames under the host's seed.

use crate::suite::Skip;
use anyhow::{Context, Result, anyhow, bail, ensure};
use guest_contract::{
    Checksum, FRAME_LENGTH, FRAME_PATTERN, GUEST_FRAMES, HOST_FRAMES, frame_number, write_frame,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
    sys::{
        eventfd::{EfdFlags, EventFd},
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
            sockopt,
        },
    },
};
use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// A TAP with vnet headers, up, in a network namespace of its own; not persistent.
#[derive(Debug)]
pub struct Tap {
    /// The TAP, for the device process.
    pub fd: OwnedFd,
    /// A packet socket on its other side.
    wire: OwnedFd,
}

impl Tap {
    /// Makes one; needs root.
    ///
    /// # Errors
    /// [`Skip`] where the host does not let us.
    pub fn new() -> Result<Self> {
        // The namespace belongs to the thread that made it and to what was opened in it.
        let made = thread::spawn(|| {
            // Without root it would take a user namespace, which a process with threads cannot
            // enter.
            if !nix::unistd::geteuid().is_root() {
                bail!(Skip("a TAP for this test needs root".to_owned()));
            }
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|error| Skip(format!("no network namespace: {error}")))?;
            make()
        });
        made.join().map_err(|_| anyhow!("making a TAP panicked"))?
    }

    /// Sends the guest with that address the test frame `number`, and waits for its answer.
    ///
    /// # Errors
    /// None comes within `deadline`, or the wire broke.
    pub fn ask(&self, guest: [u8; 6], number: u64, deadline: Duration) -> Result<()> {
        let wire = self.wire.as_raw_fd();
        let mut frame = [0; FRAME_LENGTH];
        write_frame(&mut frame, guest, [2, 0, 0, 0, 0, 1], GUEST_FRAMES, number);
        send(wire, &frame, MsgFlags::empty()).context("the wire refuses a frame")?;
        let (end, mut frame) = (Instant::now() + deadline, [0; 2048]);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut polled = [PollFd::new(self.wire.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut polled, PollTimeout::try_from(left)?)?;
            ensure!(ready > 0, "no answer to frame {number}");
            let length = recv(wire, &mut frame, MsgFlags::MSG_DONTWAIT).unwrap_or(0);
            if frame_number(&frame[..length], HOST_FRAMES) == Some(number) {
                return Ok(());
            }
        }
    }

    /// Starts to echo. The guest's test frames that came are counted until [`Echo::stop`].
    ///
    /// # Errors
    /// When the system has no eventfd left.
    pub fn echo(&self) -> Result<Echo> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let wire = self.wire.try_clone()?;
        let stopped = stop.clone();
        Ok(Echo {
            stop,
            thread: thread::spawn(move || echo(&wire, &stopped)),
        })
    }
}

/// A running echo.
#[derive(Debug)]
pub struct Echo {
    stop: Arc<EventFd>,
    thread: JoinHandle<Result<(u64, u64)>>,
}

impl Echo {
    /// Stops; test frames that came, and the sum of their checksums.
    ///
    /// # Errors
    /// When the wire broke.
    pub fn stop(self) -> Result<(u64, u64)> {
        self.stop.write(1)?;
        self.thread.join().map_err(|_| anyhow!("the echo panicked"))?
    }
}

fn echo(wire: &OwnedFd, stop: &EventFd) -> Result<(u64, u64)> {
    let mut frame = [0; 2048];
    let (mut count, mut sum) = (0, 0_u64);
    loop {
        let mut polled = [
            PollFd::new(wire.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut polled, PollTimeout::NONE)?;
        if polled[1].any() == Some(true) {
            return Ok((count, sum));
        }
        let length = recv(wire.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT).unwrap_or(0);
        let Some(number) = frame_number(&frame[..length], GUEST_FRAMES) else {
            continue;
        };
        let mut checksum = Checksum::default();
        checksum.update(&frame[FRAME_PATTERN..FRAME_LENGTH]);
        count += 1;
        sum = sum.wrapping_add(checksum.0);
        let mut guest = [0; 6];
        guest.copy_from_slice(&frame[6..12]);
        let mut answer = [0; FRAME_LENGTH];
        write_frame(&mut answer, guest, [2, 0, 0, 0, 0, 1], HOST_FRAMES, number);
        send(wire.as_raw_fd(), &answer, MsgFlags::empty()).context("the wire refuses a frame")?;
    }
}

/// In this thread's network namespace.
#[expect(unsafe_code, reason = "TUNSETIFF, SIOCSIFFLAGS and a packet socket's address")]
fn make() -> Result<Tap> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun");
    let tun = tun.map_err(|error| Skip(format!("/dev/net/tun: {error}")))?;
    // SAFETY: all zeros is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tiny0") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } < 0 {
        bail!(Skip(format!("no TAP: {}", std::io::Error::last_os_error())));
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
    let flags = SockFlag::SOCK_CLOEXEC;
    let wire =
        socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).context("packet socket")?;
    // SAFETY: SIOCSIFFLAGS reads one ifreq.
    if unsafe { libc::ioctl(wire.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut request) } < 0 {
        return Err(std::io::Error::last_os_error()).context("the TAP does not come up");
    }
    // SAFETY: SIOCGIFINDEX reads and writes one ifreq.
    if unsafe { libc::ioctl(wire.as_raw_fd(), libc::SIOCGIFINDEX as _, &raw mut request) } < 0 {
        return Err(std::io::Error::last_os_error()).context("the TAP has no index");
    }
    // SAFETY: all zeros is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: SIOCGIFINDEX has just written this member.
    address.sll_ifindex = unsafe { request.ifr_ifru.ifru_ifindex };
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the address is a sockaddr_ll of that length.
    if unsafe { libc::bind(wire.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
        return Err(std::io::Error::last_os_error()).context("binding the packet socket");
    }
    setsockopt(&wire, sockopt::RcvBuf, &(4 << 20))?;
    Ok(Tap { fd: tun.into(), wire })
}
