//! Sockets of every kind.

use super::{Attempt, MEMORY, Outcome, below, call, try_call};
use crate::audit::order::Order;
use libc as l;
use std::sync::atomic::Ordering;

pub(super) const ALL: &[(&str, Attempt)] = &[
    ("connect-inet", |o| {
        let socket = socket(l::AF_INET, l::SOCK_STREAM)?;
        named(l::SYS_connect, socket, &inet(o.port))
    }),
    ("udp", |_| socket(l::AF_INET, l::SOCK_DGRAM).map(drop)),
    ("listen-inet", |_| {
        let socket = socket(l::AF_INET, l::SOCK_STREAM)?;
        named(l::SYS_bind, socket, &inet(0))?;
        try_call(l::SYS_listen, [socket, 1])
    }),
    ("connect-inet6", |_| socket(l::AF_INET6, l::SOCK_STREAM).map(drop)),
    ("connect-unix", |o| {
        let path = below(o, "socket");
        connect_unix(path.as_bytes_with_nul())
    }),
    ("connect-abstract", |o| {
        connect_unix(format!("\0{}", Order::abstract_name(o.port)).as_bytes())
    }),
    ("send-fd", send_fd),
    ("netlink", |_| socket(l::AF_NETLINK, l::SOCK_RAW).map(drop)),
    ("vsock", |_| socket(l::AF_VSOCK, l::SOCK_STREAM).map(drop)),
    ("packet", |_| socket(l::AF_PACKET, l::SOCK_RAW).map(drop)),
    ("raw-icmp", |_| {
        try_call(
            l::SYS_socket,
            [
                l::AF_INET as usize,
                l::SOCK_RAW as usize,
                l::IPPROTO_ICMP as usize,
            ],
        )
    }),
    ("socketpair", |_| {
        let mut pair = [0i32; 2];
        let (family, kind) = (l::AF_UNIX as usize, l::SOCK_STREAM as usize);
        try_call(l::SYS_socketpair, [family, kind, 0, pair.as_mut_ptr() as usize])
    }),
];

fn socket(family: i32, kind: i32) -> Result<usize, i32> {
    call(l::SYS_socket, [family as usize, kind as usize, 0])
}

/// `struct sockaddr_in` of 127.0.0.1.
fn inet(port: u16) -> [u8; 16] {
    let mut out = [0; 16];
    out[..2].copy_from_slice(&(l::AF_INET as u16).to_ne_bytes());
    out[2..4].copy_from_slice(&port.to_be_bytes());
    out[4..8].copy_from_slice(&[127, 0, 0, 1]);
    out
}

/// connect(2) or bind(2) to a raw socket address.
fn named(number: l::c_long, socket: usize, name: &[u8]) -> Outcome {
    try_call(number, [socket, name.as_ptr() as usize, name.len()])
}

fn connect_unix(path: &[u8]) -> Outcome {
    let socket = socket(l::AF_UNIX, l::SOCK_STREAM)?;
    let name = [&(l::AF_UNIX as u16).to_ne_bytes(), path].concat();
    named(l::SYS_connect, socket, &name)
}

/// The sealed memory, to the audit's own listener.
fn send_fd(o: &Order) -> Outcome {
    let socket = socket(l::AF_UNIX, l::SOCK_STREAM)?;
    let path = below(o, "socket");
    let name = [&(l::AF_UNIX as u16).to_ne_bytes(), path.as_bytes_with_nul()].concat();
    named(l::SYS_connect, socket, &name)?;
    // struct cmsghdr: length, level and kind, then the descriptor.
    let kind = u64::from(l::SOL_SOCKET as u32) | u64::from(l::SCM_RIGHTS as u32) << 32;
    let control = [20u64, kind, MEMORY.load(Ordering::Relaxed) as u64];
    let byte = [b"x".as_ptr() as usize, 1];
    // struct msghdr: name, its length, parts, their count, control, its length, flags.
    let message = [0, 0, byte.as_ptr() as usize, 1, control.as_ptr() as usize, 24, 0];
    try_call(
        l::SYS_sendmsg,
        [socket, message.as_ptr() as usize, l::MSG_NOSIGNAL as usize],
    )
}
