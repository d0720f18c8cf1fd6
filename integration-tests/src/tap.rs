//! TAP interfaces in the network namespace of the calling process.
#![expect(unsafe_code, reason = "TUNSETIFF is an ioctl that takes a struct ifreq")]

use nix::errno::Errno;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

/// Opens the TAP `name` with virtio-net headers. One that is made so goes when its last file descriptor is
/// closed.
///
/// # Errors
/// `/dev/net/tun` cannot be opened, someone else has the TAP, or the namespace is not this process's own.
pub fn open(name: &str) -> std::io::Result<OwnedFd> {
    open_as(name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
}

/// Opens or makes `name` as these flags have it.
///
/// # Errors
/// As [`open`].
pub fn open_as(name: &str, flags: i32) -> std::io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // The last byte stays 0: the name ends there at the latest.
    for (to, from) in ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let request = libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: flags as libc::c_short,
        },
    };
    // SAFETY: the request outlives the call and its name ends with a NUL.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) })?;
    Ok(file.into())
}
