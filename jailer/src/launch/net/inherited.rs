//! Descriptors of a TAP that whoever started us opened.
#![expect(unsafe_code, reason = "ioctls on TUN")]

use super::NetError;
use super::interface::{name_in, request_for, tun_get_iff};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use vm_spec::control::FdNumber;

nix::ioctl_read!(tun_get_filter, b'T', 219, libc::sock_fprog);
nix::ioctl_write_ptr!(tun_attach_filter, b'T', 213, libc::sock_fprog);
nix::ioctl_write_ptr!(tun_detach_filter, b'T', 214, libc::sock_fprog);

/// Takes them over: queues of one TAP.
pub(super) fn inherited(numbers: &[i32]) -> Result<Vec<OwnedFd>, NetError> {
    let taps: Vec<(String, OwnedFd)> = numbers
        .iter()
        .map(|number| take(*number))
        .collect::<Result<_, _>>()?;
    if let Some((first, _)) = taps.first()
        && let Some((other, _)) = taps.iter().find(|(name, _)| name != first)
    {
        return Err(NetError::TwoTaps(first.clone(), other.clone()));
    }
    Ok(taps.into_iter().map(|(_, tap)| tap).collect())
}

fn take(number: i32) -> Result<(String, OwnedFd), NetError> {
    let busy = |e: &io::Error| e.raw_os_error() == Some(libc::EBUSY);
    let tap = crate::inherit::take(FdNumber(number)).map_err(|e| match busy(&e) {
        true => NetError::BusyDescriptor,
        false => NetError::NotOpen(e),
    })?;
    let about = look_at(&tap).map_err(|e| NetError::NoTap(e.into()))?;
    let wanted = libc::IFF_TAP | libc::IFF_VNET_HDR;
    if flags(&about) & wanted != wanted || has_packet_information(&tap, &about) {
        return Err(NetError::OtherFrames);
    }
    Ok((name_in(&about), tap))
}

fn look_at(tap: &OwnedFd) -> nix::Result<libc::ifreq> {
    let mut about = request_for("");
    // SAFETY: `about` is a live ifreq, which TUNGETIFF fills in.
    unsafe { tun_get_iff(tap.as_raw_fd(), &raw mut about) }?;
    Ok(about)
}

fn flags(about: &libc::ifreq) -> libc::c_int {
    // SAFETY: TUNGETIFF fills in the flags.
    libc::c_int::from(unsafe { about.ifr_ifru.ifru_flags }.cast_unsigned())
}

/// Whether each frame follows four bytes about its protocol (no IFF_NO_PI). TUNGETIFF sets the same bit where
/// there is no filter (IFF_NOFILTER), so it is asked once more with one, which lets everything pass.
fn has_packet_information(tap: &OwnedFd, about: &libc::ifreq) -> bool {
    let is_set = |about: &libc::ifreq| flags(about) & libc::IFF_NO_PI != 0;
    let mut pass = libc::sock_filter {
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: u32::MAX,
    };
    let filter = libc::sock_fprog {
        len: 1,
        filter: &raw mut pass,
    };
    let mut present = libc::sock_fprog {
        len: 0,
        filter: std::ptr::null_mut(),
    };
    let fd = tap.as_raw_fd();
    // SAFETY: `present` is a live sock_fprog, which TUNGETFILTER fills in.
    let known = unsafe { tun_get_filter(fd, &raw mut present) };
    // A macvtap has no filter, and no such doubt.
    if known.is_err() || present.len > 0 || !is_set(about) {
        return !is_set(about);
    }
    // SAFETY: `filter` names one live instruction, which the kernel copies.
    if unsafe { tun_attach_filter(fd, &raw const filter) }.is_err() {
        return false;
    }
    let sure = look_at(tap);
    // SAFETY: as before; what it names is not looked at.
    let _ = unsafe { tun_detach_filter(fd, &raw const filter) };
    sure.is_ok_and(|about| !is_set(&about))
}
