//! TAP interfaces and bridges (`linux/if_tun.h`, `linux/sockios.h`), in the network namespace of
//! the caller.
#![expect(unsafe_code, reason = "ioctls on TUN and sockets")]

use super::NetError;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

/// `linux/sockios.h`.
const SIOCBRADDBR: libc::c_ulong = 0x89a0;
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
/// `_IO('T', 227)` of `linux/if_tun.h`.
const TUNGETDEVNETNS: libc::Ioctl = 0x54e3;
/// Longest name without its end.
const LONGEST_NAME: usize = libc::IFNAMSIZ - 1;
/// The kernel puts a number in its place.
const BRIDGED_NAME: &str = "bulkhead%d";

nix::ioctl_readwrite_bad!(tun_set_iff, libc::TUNSETIFF as libc::c_int, libc::ifreq);
nix::ioctl_read_bad!(tun_get_iff, libc::TUNGETIFF as libc::c_int, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD as libc::c_int);
nix::ioctl_write_ptr_bad!(set_address, libc::SIOCSIFADDR as libc::c_int, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_netmask, libc::SIOCSIFNETMASK as libc::c_int, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS as libc::c_int, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_mtu, libc::SIOCSIFMTU as libc::c_int, libc::ifreq);
nix::ioctl_read_bad!(get_mtu, libc::SIOCGIFMTU as libc::c_int, libc::ifreq);
nix::ioctl_read_bad!(
    get_hardware_address,
    libc::SIOCGIFHWADDR as libc::c_int,
    libc::ifreq
);
nix::ioctl_write_ptr_bad!(
    set_hardware_address,
    libc::SIOCSIFHWADDR as libc::c_int,
    libc::ifreq
);
nix::ioctl_write_ptr_bad!(add_port, SIOCBRADDIF as libc::c_int, libc::ifreq);
nix::ioctl_write_ptr_bad!(add_bridge, SIOCBRADDBR as libc::c_int, libc::c_char);

/// What ETHTOOL_GLINK reads and writes (`linux/ethtool.h`).
#[repr(C)]
struct EthtoolValue {
    command: u32,
    value: u32,
}

const ETHTOOL_GLINK: u32 = 0xa;

nix::ioctl_read_bad!(ethtool, libc::SIOCETHTOOL as libc::c_int, libc::ifreq);

/// Attaches `queues` descriptors to the interface `name`, which must exist and be nobody else's.
pub(super) fn open_existing(name: &str, queues: u16) -> Result<Vec<OwnedFd>, NetError> {
    check_name(name)?;
    // TUNSETIFF would make one that does not exist.
    if !exists(name) {
        return Err(NetError::Missing(name.to_owned()));
    }
    // Of one that was made for several queues the kernel lets anyone open more.
    let taken = Interfaces::open()?.has_carrier(name)?;
    let opened = match attach(name, queues) {
        // It was made for several queues, of which this NIC takes one.
        Err(NetError::Attach(e)) if queues == 1 && e.raw_os_error() == Some(libc::EINVAL) => {
            attach_one(name, true).map(|(_, tap)| vec![tap])
        }
        other => other.map(|(_, taps)| taps),
    };
    match taken && opened.is_ok() {
        true => Err(NetError::Busy(name.to_owned())),
        false => opened,
    }
}

/// The MTU of the interface `name`, as the host sees it.
pub(super) fn mtu_of(name: &str) -> Result<i32, NetError> {
    Interfaces::open()?.mtu(name)
}

/// Whether TAPs can be made, as far as can be seen without making one.
pub(super) fn look_at_device() -> Result<(), NetError> {
    open_device().map(drop)
}

/// Whether there is an interface `name`.
pub(super) fn look_at(name: &str) -> Result<(), NetError> {
    check_name(name)?;
    if !exists(name) {
        return Err(NetError::Missing(name.to_owned()));
    }
    look_at_device()
}

/// Makes a TAP and adds it to the bridge `bridge`.
pub(super) fn open_on_bridge(bridge: &str, queues: u16, mtu: Option<u16>) -> Result<Vec<OwnedFd>, NetError> {
    check_name(bridge)?;
    if !exists(bridge) {
        return Err(NetError::Missing(bridge.to_owned()));
    }
    let (name, taps) = attach(BRIDGED_NAME, queues)?;
    let interfaces = Interfaces::open()?;
    // A bridge takes the lowest address and the lowest MTU of its ports, unless it was given its own: a TAP
    // must lower neither.
    let mtu = match mtu {
        Some(mtu) => mtu.into(),
        None => interfaces.mtu(bridge)?,
    };
    interfaces.set_mtu(&name, mtu)?;
    interfaces.raise_address(&name)?;
    interfaces.add_port(bridge, &name)?;
    interfaces.up(&name)?;
    Ok(taps)
}

/// The name of an inherited TAP's interface, if that is in this process's network namespace: another one's
/// may have an interface of the same name. Without CAP_NET_ADMIN the kernel does not tell.
pub(super) fn name_here(number: i32) -> Option<String> {
    // SAFETY: TUNGETDEVNETNS has no argument, and fails for what is no TAP or not open.
    let theirs = unsafe { libc::ioctl(number, TUNGETDEVNETNS) };
    if theirs < 0 {
        return None;
    }
    // SAFETY: the ioctl has just made this descriptor.
    let theirs = File::from(unsafe { OwnedFd::from_raw_fd(theirs) })
        .metadata()
        .ok()?;
    let ours = fs::metadata("/proc/self/ns/net").ok()?;
    if (theirs.dev(), theirs.ino()) != (ours.dev(), ours.ino()) {
        return None;
    }
    let mut about = request_for("");
    // SAFETY: `about` is a live ifreq, which TUNGETIFF fills in.
    unsafe { tun_get_iff(number, &raw mut about) }.ok()?;
    Some(name_in(&about))
}

pub(super) fn name_in(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().take_while(|c| **c != 0);
    bytes.map(|c| char::from(*c as u8)).collect()
}

fn check_name(name: &str) -> Result<(), NetError> {
    let bad = name.is_empty() || name.len() > LONGEST_NAME || name.starts_with('.');
    if bad || name.contains(['/', '%']) {
        return Err(NetError::Name(name.to_owned()));
    }
    Ok(())
}

/// Not looked for in /sys, which may be mounted in another network namespace than ours.
fn exists(name: &str) -> bool {
    nix::net::if_::if_nametoindex(name).is_ok()
}

/// Opens `queues` descriptors of the TAP `name`, which is made where there is none; its name is
/// returned, as the kernel may have filled in a number.
pub(super) fn attach(name: &str, queues: u16) -> Result<(String, Vec<OwnedFd>), NetError> {
    let (name, first) = attach_one(name, queues > 1)?;
    let mut taps = vec![first];
    for _ in 1..queues {
        taps.push(attach_one(&name, true)?.1);
    }
    Ok((name, taps))
}

fn open_device() -> Result<File, NetError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(NetError::Device)
}

fn attach_one(name: &str, multi_queue: bool) -> Result<(String, OwnedFd), NetError> {
    let tun = open_device()?;
    let mut request = request_for(name);
    let more = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: `request` is a live ifreq, which TUNSETIFF reads and writes.
    match unsafe { tun_set_iff(tun.as_raw_fd(), &raw mut request) } {
        Ok(_) => {}
        Err(Errno::EBUSY) => return Err(NetError::Busy(name.to_owned())),
        Err(Errno::EPERM) => return Err(NetError::NotPermitted),
        Err(e) => return Err(NetError::Attach(e.into())),
    }
    nonblocking(&tun).map_err(NetError::Attach)?;
    Ok((name_in(&request), tun.into()))
}

/// Lets the kernel hand over what `tap` sends with checksums still to be made and TCP segments
/// still to be cut.
pub(super) fn take_unfinished_tcp(tap: &OwnedFd) -> Result<(), NetError> {
    let offload = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    let done = unsafe { tun_set_offload(tap.as_raw_fd(), offload as libc::c_int) };
    done.map(drop)
        .map_err(|e| NetError::Make("set offloads", e.into()))
}

fn nonblocking(file: &File) -> io::Result<()> {
    fcntl(file, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// An ifreq for `name`, which is shorter than IFNAMSIZ.
pub(super) fn request_for(name: &str) -> libc::ifreq {
    // SAFETY: every field of ifreq may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name[..LONGEST_NAME].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// A socket by which interfaces are configured.
pub(super) struct Interfaces(OwnedFd);

impl Interfaces {
    pub(super) fn open() -> Result<Self, NetError> {
        let kind = SockType::Datagram;
        socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None)
            .map(Self)
            .map_err(|e| NetError::Make("open a socket", e.into()))
    }

    /// Gives `name` an IPv4 address.
    pub(super) fn set_address(&self, name: &str, address: Ipv4Addr, prefix: u8) -> Result<(), NetError> {
        let fd = self.0.as_raw_fd();
        let mask = Ipv4Addr::from_bits(u32::MAX << (32 - u32::from(prefix)));
        let mut request = request_for(name);
        request.ifr_ifru.ifru_addr = socket_address(address);
        // SAFETY: `request` is a live ifreq with an address in it.
        let set = unsafe { set_address(fd, &raw const request) };
        set.map_err(|e| NetError::Make("set the TAP's address", e.into()))?;
        request.ifr_ifru.ifru_addr = socket_address(mask);
        // SAFETY: as above.
        let set = unsafe { set_netmask(fd, &raw const request) };
        set.map(drop)
            .map_err(|e| NetError::Make("set the TAP's netmask", e.into()))
    }

    /// Whether the interface is up and has a carrier, as a TAP does of which someone has a queue open.
    fn has_carrier(&self, name: &str) -> Result<bool, NetError> {
        let mut link = EthtoolValue {
            command: ETHTOOL_GLINK,
            value: 0,
        };
        let mut request = request_for(name);
        request.ifr_ifru.ifru_data = (&raw mut link).cast();
        // SAFETY: `request` is a live ifreq, and what it points to is as ETHTOOL_GLINK wants it.
        match unsafe { ethtool(self.0.as_raw_fd(), &raw mut request) } {
            Ok(_) => Ok(link.value != 0),
            // It has no such thing, as no TAP.
            Err(Errno::EOPNOTSUPP) => Ok(false),
            Err(e) => Err(NetError::Make("ask for an interface's carrier", e.into())),
        }
    }

    fn mtu(&self, name: &str) -> Result<i32, NetError> {
        let mut request = request_for(name);
        // SAFETY: `request` is a live ifreq, which SIOCGIFMTU fills in.
        unsafe { get_mtu(self.0.as_raw_fd(), &raw mut request) }
            .map_err(|e| NetError::Make("read an interface's MTU", e.into()))?;
        // SAFETY: SIOCGIFMTU has just written this member.
        Ok(unsafe { request.ifr_ifru.ifru_mtu })
    }

    /// Gives the TAP `name` a locally administered address with the highest first byte; the guest's is another.
    fn raise_address(&self, name: &str) -> Result<(), NetError> {
        let failed = |e: Errno| NetError::Make("set the TAP's address", e.into());
        let fd = self.0.as_raw_fd();
        let mut request = request_for(name);
        // SAFETY: `request` is a live ifreq, which SIOCGIFHWADDR fills in.
        unsafe { get_hardware_address(fd, &raw mut request) }.map_err(failed)?;
        // SAFETY: SIOCGIFHWADDR has just written this member.
        unsafe { request.ifr_ifru.ifru_hwaddr.sa_data[0] = 0xfe_u8 as libc::c_char };
        // SAFETY: `request` is a live ifreq with a hardware address in it.
        let set = unsafe { set_hardware_address(fd, &raw const request) };
        set.map(drop).map_err(failed)
    }

    pub(super) fn set_mtu(&self, name: &str, mtu: i32) -> Result<(), NetError> {
        let mut request = request_for(name);
        request.ifr_ifru.ifru_mtu = mtu;
        // SAFETY: `request` is a live ifreq with an MTU in it.
        let set = unsafe { set_mtu(self.0.as_raw_fd(), &raw const request) };
        set.map(drop).map_err(|e| NetError::Make("set the MTU", e.into()))
    }

    pub(super) fn up(&self, name: &str) -> Result<(), NetError> {
        let mut request = request_for(name);
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        // SAFETY: `request` is a live ifreq with flags in it.
        let set = unsafe { set_flags(self.0.as_raw_fd(), &raw const request) };
        set.map(drop)
            .map_err(|e| NetError::Make("bring an interface up", e.into()))
    }

    pub(super) fn make_bridge(&self, name: &str) -> Result<(), NetError> {
        let request = request_for(name);
        // SAFETY: SIOCBRADDBR reads a name of IFNAMSIZ bytes with its end.
        let made = unsafe { add_bridge(self.0.as_raw_fd(), request.ifr_name.as_ptr()) };
        made.map(drop)
            .map_err(|e| NetError::Make("make a bridge (is the module 'bridge' loaded?)", e.into()))
    }

    pub(super) fn add_port(&self, bridge: &str, port: &str) -> Result<(), NetError> {
        let failed = |e: Errno| match e {
            Errno::EPERM => NetError::NotPermitted,
            Errno::EOPNOTSUPP => NetError::NoBridge(bridge.to_owned()),
            e => NetError::Make("add the TAP to the bridge", e.into()),
        };
        let index = nix::net::if_::if_nametoindex(port).map_err(failed)?;
        let mut request = request_for(bridge);
        request.ifr_ifru.ifru_ifindex = index as libc::c_int;
        // SAFETY: `request` is a live ifreq with an interface's index in it.
        let added = unsafe { add_port(self.0.as_raw_fd(), &raw const request) };
        added.map(drop).map_err(failed)
    }
}

/// Keeps this network namespace from sending frames of its own: its bridge is a wire, and no station.
pub(super) fn keep_quiet() {
    for which in ["all", "default"] {
        // A kernel without IPv6 has no such file.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1");
    }
    // A bridge that snoops joins the group of those that do (RFC 4286), and would report it.
    let _ = fs::write("/proc/sys/net/ipv4/igmp_link_local_mcast_reports", "0");
}

/// A sockaddr_in as a sockaddr: family, port 0, address.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data,
    }
}
