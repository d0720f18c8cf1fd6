//! The host's side: a network namespace, a TAP, a packet socket that sends to it, and the floor: bare
//! loops of one system call a frame.
#![expect(unsafe_code, reason = "packet sockets, TUN ioctls, io_uring")]

use crate::process::ip;
use anyhow::{Context, Result, ensure};
use io_uring::{IoUring, opcode, types};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::{getgid, getuid};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use std::time::Duration;

/// Frames in one call of the generator.
pub(super) const BATCH: usize = 64;

/// Moves this process, which has one thread, into a network namespace of its own.
pub(super) fn enter() -> Result<()> {
    if getuid().is_root() {
        unshare(CloneFlags::CLONE_NEWNET)?;
    } else {
        let (user, group) = (getuid(), getgid());
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).context("no user namespaces here")?;
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
        fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    }
    ip("link set lo up")
}

/// A TAP of this name, up, on which the host's own stack says nothing.
pub(super) fn make_tap(name: &str, pairs: u16) -> Result<()> {
    let several = if pairs > 1 { " multi_queue" } else { "" };
    ip(&format!("tuntap add {name} mode tap vnet_hdr{several}"))?;
    fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1")?;
    ip(&format!("link set {name} up"))
}

/// Removes it.
pub(super) fn remove_tap(name: &str) -> Result<()> {
    ip(&format!("link delete {name}"))
}

/// Opens a TAP as the floor does: blocking or not, with all offloads.
pub(super) fn open_tap(name: &str) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: the request is an ifreq that lives on.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Errno::result(result).context("TUNSETIFF")?;
    let size: libc::c_int = 12;
    // SAFETY: the request reads one int.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
    Errno::result(result).context("TUNSETVNETHDRSZ")?;
    // SAFETY: the request takes its argument by value.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, 0x0f as libc::c_ulong) };
    Errno::result(result).context("TUNSETOFFLOAD")?;
    Ok(file)
}

/// The generator: sends the same few frames to a TAP's reader.
pub(super) struct Host {
    socket: OwnedFd,
    frames: Vec<Vec<u8>>,
    next: usize,
}

impl Host {
    /// A socket on `tap` that sends `frames` in turn, each behind the ten-byte virtio-net header. With `hears`,
    /// it sees what the guest sends.
    pub(super) fn new(tap: &str, frames: Vec<Vec<u8>>, hears: bool) -> Result<Self> {
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        let set = |level, option, value: libc::c_int| {
            let length = size_of_val(&value) as libc::socklen_t;
            // SAFETY: the value is valid for its length.
            let result = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    level,
                    option,
                    (&raw const value).cast(),
                    length,
                )
            };
            Errno::result(result).map(drop)
        };
        set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        set(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 64 << 20)
            .or_else(|_| set(libc::SOL_SOCKET, libc::SO_SNDBUF, 64 << 20))?;
        // SAFETY: all-zero is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = if hears {
            (libc::ETH_P_ALL as u16).to_be()
        } else {
            0
        };
        address.sll_ifindex = nix::net::if_::if_nametoindex(tap)? as i32;
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address is valid for its length.
        let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        Errno::result(result).context("bind to the TAP")?;
        Ok(Self {
            socket,
            frames,
            next: 0,
        })
    }

    /// Sends up to `count` frames, no more than [`BATCH`]; how many the kernel took.
    pub(super) fn send(&mut self, count: usize) -> Result<usize> {
        let count = count.min(BATCH);
        let mut parts: Vec<libc::iovec> = (0..count)
            .map(|index| {
                let frame = &self.frames[(self.next + index) % self.frames.len()];
                libc::iovec {
                    iov_base: frame.as_ptr().cast_mut().cast(),
                    iov_len: frame.len(),
                }
            })
            .collect();
        let message = |part: &mut libc::iovec| {
            // SAFETY: all-zero is a valid mmsghdr.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            message.msg_hdr.msg_iov = part;
            message.msg_hdr.msg_iovlen = 1;
            message
        };
        let mut messages: Vec<libc::mmsghdr> = parts.iter_mut().map(message).collect();
        // SAFETY: the messages name parts, and those name frames, that outlive the call.
        let sent = unsafe {
            libc::sendmmsg(
                self.socket.as_raw_fd(),
                messages.as_mut_ptr(),
                count as u32,
                libc::MSG_DONTWAIT as _,
            )
        };
        match Errno::result(sent) {
            Ok(sent) => {
                self.next += sent as usize;
                Ok(sent as usize)
            }
            Err(Errno::EAGAIN | Errno::ENOBUFS) => Ok(0),
            Err(error) => Err(error).context("sendmmsg"),
        }
    }

    /// Waits for the next frame from the guest, asleep or spinning.
    pub(super) fn receive(&self, spin: bool) -> Result<()> {
        let mut buffer = [0; 2048];
        loop {
            match nix::unistd::read(&self.socket, &mut buffer) {
                Ok(_) => return Ok(()),
                Err(Errno::EAGAIN) if spin => std::hint::spin_loop(),
                Err(Errno::EAGAIN) => {
                    let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
                    let ready = poll(&mut fds, PollTimeout::from(2000_u16))?;
                    ensure!(ready > 0, "no frame came back");
                }
                Err(error) => return Err(error).context("read from the TAP's socket"),
            }
        }
    }

    /// Makes [`Host::receive`] able to wait.
    pub(super) fn nonblocking(self) -> Result<Self> {
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&self.socket, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        Ok(self)
    }
}

/// The floor of sending: one `writev` of header and frame; false when the kernel's queue is full.
pub(super) fn write_frame(tap: &mut File, bytes: &[u8]) -> Result<bool> {
    let (header, frame) = bytes.split_at(12);
    match tap.write_vectored(&[IoSlice::new(header), IoSlice::new(frame)]) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error).context("writev to the TAP"),
    }
}

/// The floor of receiving: `readv` until nothing is left, then a wait; how many frames there were.
pub(super) fn read_frames(tap: &mut File, buffer: &mut [u8], spin: bool, most: usize) -> Result<usize> {
    let mut count = 0;
    while count < most {
        let (header, frame) = buffer.split_at_mut(12);
        match tap.read_vectored(&mut [IoSliceMut::new(header), IoSliceMut::new(frame)]) {
            Ok(_) => count += 1,
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
            Err(_) if count > 0 => break,
            Err(_) if spin => std::hint::spin_loop(),
            Err(_) => {
                let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
                if poll(&mut fds, PollTimeout::try_from(Duration::from_millis(50))?)? == 0 {
                    break;
                }
            }
        }
    }
    Ok(count)
}

/// Frames through io_uring, a batch in one call, beside the floor's call a frame: a ring, and buffers that
/// live as long as it does.
pub(super) struct RingFrames {
    ring: IoUring,
    buffers: Vec<Vec<u8>>,
}

impl RingFrames {
    /// [`BATCH`] buffers that hold `bytes`.
    pub(super) fn new(bytes: &[u8]) -> Result<Self> {
        Ok(Self {
            ring: IoUring::new(BATCH as u32).context("io_uring")?,
            buffers: vec![bytes.to_vec(); BATCH],
        })
    }

    /// Sends every buffer in one call; how many the kernel took. Not for receiving: there a request waits
    /// for its frame, so that a batch does not end with what the queue has.
    pub(super) fn write(&mut self, tap: &File) -> Result<usize> {
        let fd = types::Fd(tap.as_raw_fd());
        for buffer in &self.buffers {
            let entry = opcode::Write::new(fd, buffer.as_ptr(), buffer.len() as u32).build();
            // SAFETY: every request is complete before this function returns, and the buffers stay
            // as they are meanwhile.
            unsafe { self.ring.submission().push(&entry) }?;
        }
        self.ring.submit_and_wait(self.buffers.len())?;
        let (mut done, mut count) = (0, 0);
        for completion in self.ring.completion() {
            done += 1;
            match completion.result() {
                0.. => count += 1,
                error if error == -(Errno::EAGAIN as i32) => {}
                error => return Err(Errno::from_raw(-error)).context("a frame through io_uring"),
            }
        }
        ensure!(done == self.buffers.len(), "{done} completions");
        Ok(count)
    }
}
