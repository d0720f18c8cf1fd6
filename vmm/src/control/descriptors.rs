//! Descriptors inherited at exec become owned, each once.

#![expect(unsafe_code, reason = "takes ownership of descriptors named by number")]

use crate::error::Error;
use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd};
use vm_spec::control::{FdNumber, VmConfig};

/// Takes ownership of inherited descriptor `number`. To be called before the process opens
/// anything of its own, once for each number.
///
/// # Errors
/// [`Error::Config`] for a standard stream or a number that is not open.
pub fn adopt(number: FdNumber, what: &str) -> Result<OwnedFd, Error> {
    if number.0 <= 2 {
        return Err(Error::Config(format!(
            "{what}: {} is no inherited descriptor",
            number.0
        )));
    }
    // SAFETY: F_SETFD reads and writes no memory.
    if unsafe { libc::fcntl(number.0, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(Error::Config(format!(
            "{what}: descriptor {} is not open",
            number.0
        )));
    }
    // SAFETY: the descriptor is open, and by the protocol (`VmConfig`, the command line) it was
    // passed to be owned by this process; nothing else here refers to it.
    Ok(unsafe { OwnedFd::from_raw_fd(number.0) })
}

/// Takes ownership of every descriptor that `config` names, by number.
///
/// # Errors
/// [`Error::Config`] as [`adopt`], and for a number named twice.
pub fn adopt_config(config: &VmConfig, control: i32) -> Result<BTreeMap<i32, OwnedFd>, Error> {
    let mut named = vec![
        ("kvm", config.kvm),
        ("kernel", config.kernel),
        ("console", config.console),
    ];
    named.extend(config.initrd.map(|fd| ("initrd", fd)));
    for device in &config.devices {
        let fds = [device.socket, device.requests, device.requests_peer];
        named.extend(fds.map(|fd| (device.id.as_str(), fd)));
    }
    let mut owned = BTreeMap::new();
    for (what, number) in named {
        if number.0 == control || owned.contains_key(&number.0) {
            return Err(Error::Config(format!(
                "{what}: descriptor {} is named twice",
                number.0
            )));
        }
        owned.insert(number.0, adopt(number, what)?);
    }
    Ok(owned)
}
