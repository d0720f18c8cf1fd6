//! The host's side of a TAP: a packet socket that sees and sends frames with virtio-net headers.
#![expect(unsafe_code, reason = "packet sockets: bind and setsockopt")]

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// `struct virtio_net_hdr` of packet sockets: no `num_buffers`.
const HEADER: usize = 10;

/// One packet socket on one interface.
pub struct Host {
    socket: OwnedFd,
    own_mac: [u8; 6],
}

impl Host {
    /// Sees all frames of `interface` but those that its own side, `own_mac`, sends.
    pub fn new(interface: &str, own_mac: [u8; 6]) -> Result<Self> {
        // Without a protocol until it is bound: it would see every interface's frames.
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
        let index = nix::net::if_::if_nametoindex(interface)?;
        set(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20)
            .or_else(|_| set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, 64 << 20))?;
        // SAFETY: all-zero is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index as i32;
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address is valid for its length.
        let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        Errno::result(result).context("bind to the TAP")?;
        Ok(Self { socket, own_mac })
    }

    /// The next frame from the guest, with its header.
    pub fn receive(&self, deadline: Duration) -> Result<(Vec<u8>, Vec<u8>)> {
        let end = Instant::now() + deadline;
        let mut buffer = vec![0; 70_000];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX))?;
            ensure!(ready > 0, "no frame from the guest in time");
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
            let frame = &buffer[HEADER..length];
            if frame[6..12] != self.own_mac {
                return Ok((buffer[..HEADER].to_vec(), frame.to_vec()));
            }
        }
    }

    /// Sends a frame to the guest; `header` without `num_buffers`.
    pub fn send(&self, header: &[u8; HEADER], frame: &[u8]) -> Result<()> {
        let bytes = [header, frame].concat();
        let sent = send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
        ensure!(sent == bytes.len(), "short send");
        Ok(())
    }
}

fn set(socket: &OwnedFd, level: i32, option: i32, value: i32) -> nix::Result<()> {
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
}
