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

/// Takes ownership of descriptors that a message brought.
pub(super) fn received(numbers: &[i32]) -> Vec<OwnedFd> {
    numbers
        .iter()
        // SAFETY: the kernel made these descriptors for this process in recvmsg, a moment ago.
        .map(|&number| unsafe { OwnedFd::from_raw_fd(number) })
        .collect()
}

/// Closes what came with a message of which not all came. `ancillary` is zeroed but for what the kernel wrote: at
/// most one header of 16 bytes (its length, SOL_SOCKET, SCM_RIGHTS) with numbers behind it.
pub(super) fn close_truncated(ancillary: &[u8]) {
    const HEADER: usize = 16;
    let word = |at: usize| Some(i32::from_ne_bytes(*ancillary.get(at..)?.first_chunk()?));
    let length = word(0).and_then(|length| usize::try_from(length).ok());
    let numbers = ancillary.get(HEADER..length.unwrap_or(0)).unwrap_or_default();
    if word(12) == Some(libc::SCM_RIGHTS) {
        let numbers: Vec<_> = numbers
            .as_chunks()
            .0
            .iter()
            .map(|four| i32::from_ne_bytes(*four))
            .collect();
        drop(received(&numbers));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::IntoRawFd;

    #[test]
    fn what_came_of_a_truncated_message_is_closed() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        close_truncated(&[0; 40]);
        let header = [
            20_u64.to_ne_bytes(),
            [1_i32, libc::SCM_RIGHTS]
                .map(i32::to_ne_bytes)
                .concat()
                .try_into()
                .unwrap(),
        ];
        let number = writer.into_raw_fd().to_ne_bytes();
        close_truncated(&[header.as_flattened(), &number, &[0; 20]].concat());
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
}
