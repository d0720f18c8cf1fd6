//! `--state-fd`: what a driver and the launcher said once and do not repeat to a successor of this
//! process, and what a TAP that may be gone by then could do. A page that the launcher keeps, one byte for
//! each but the NIC's address; it names no place and no size.
//!
//! Whoever wrote it may have been taken over by its guest: what cannot be counts as never said.

use crate::address::MacAddress;
use crate::offload::TunOffload;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Bytes of the page.
const SIZE: usize = 4096;
/// The launcher's latest order on the link, as `--link-fd` has it.
const LINK: usize = 0;
const DOWN: u8 = b'0';
const UP: u8 = b'1';
/// Pairs that the driver uses.
const PAIRS: usize = 1;
/// Whether the kernel could segment UDP when the TAP was there.
const USO: usize = 2;
const NO: u8 = b'n';
const YES: u8 = b'y';
/// What the driver takes unfinished.
const OFFLOAD: usize = 3;
/// Whether the driver chose an address, and which.
const MAC: usize = 4;
const MAC_BYTES: std::ops::Range<usize> = MAC + 1..MAC + 7;

/// What outlives the process, if the launcher keeps it.
pub struct State {
    page: MmapRegion,
}

impl State {
    /// Nothing was said, and nobody keeps what will be.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn private() -> io::Result<Self> {
        let page = MmapRegion::new(SIZE).map_err(io::Error::other)?;
        Ok(Self { page })
    }

    /// Goes on with what `fd` holds. Before lockdown.
    ///
    /// # Errors
    /// When it is no file of a page at least that nobody can shorten: a look at it may not end the
    /// process.
    pub fn kept(fd: OwnedFd) -> io::Result<Self> {
        let refused = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why.to_owned()));
        let status = fstat(&fd)?;
        if SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return refused("is no file");
        }
        if status.st_size < SIZE as i64 {
            return refused("is shorter than a page");
        }
        // EINVAL: a file system without seals.
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_or(SealFlag::empty(), SealFlag::from_bits_truncate);
        if !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return refused("is not sealed with F_SEAL_SHRINK");
        }
        let file = FileOffset::new(File::from(fd), 0);
        let page = MmapRegion::from_file(file, SIZE).map_err(io::Error::other)?;
        Ok(Self { page })
    }

    /// Whether the launcher's latest order was to take the link up; none if it never gave one.
    #[must_use]
    pub fn link(&self) -> Option<bool> {
        match self.load(LINK) {
            UP => Some(true),
            DOWN => Some(false),
            _ => None,
        }
    }

    /// The launcher took the link up or down.
    pub fn set_link(&self, up: bool) {
        self.store(LINK, if up { UP } else { DOWN });
    }

    /// How many pairs of `most` the driver uses, if it said so.
    #[must_use]
    pub fn pairs(&self, most: usize) -> Option<usize> {
        let pairs = usize::from(self.load(PAIRS));
        (1..=most).contains(&pairs).then_some(pairs)
    }

    /// The driver uses so many pairs.
    pub fn set_pairs(&self, pairs: usize) {
        self.store(PAIRS, u8::try_from(pairs).unwrap_or(0));
    }

    /// Whether the TAP's kernel could segment UDP, as a process found that had a TAP.
    #[must_use]
    pub fn uso(&self) -> Option<bool> {
        match self.load(USO) {
            YES => Some(true),
            NO => Some(false),
            _ => None,
        }
    }

    /// The TAP's kernel can segment UDP, or cannot.
    pub fn set_uso(&self, uso: bool) {
        self.store(USO, if uso { YES } else { NO });
    }

    /// What the latest driver takes unfinished, as far as it is known.
    #[must_use]
    pub fn offload(&self) -> TunOffload {
        TunOffload::from_bits(self.load(OFFLOAD).into())
    }

    /// The driver takes this unfinished.
    pub fn set_offload(&self, offload: TunOffload) {
        self.store(OFFLOAD, u8::try_from(offload.bits()).unwrap_or(0));
    }

    /// The address that the driver chose, if it did and a station can have it.
    #[must_use]
    pub fn mac(&self) -> Option<MacAddress> {
        let mut mac = MacAddress([0; 6]);
        for (byte, at) in mac.0.iter_mut().zip(MAC_BYTES) {
            *byte = self.load(at);
        }
        (self.load(MAC) == YES && mac.is_station()).then_some(mac)
    }

    /// The driver has chosen an address, or has the one that was given.
    pub fn set_mac(&self, mac: Option<MacAddress>) {
        // A process that ends in between leaves none.
        self.store(MAC, NO);
        if let Some(mac) = mac {
            for (byte, at) in mac.0.into_iter().zip(MAC_BYTES) {
                self.store(at, byte);
            }
            self.store(MAC, YES);
        }
    }

    fn load(&self, at: usize) -> u8 {
        let page = self.page.as_volatile_slice();
        page.load(at, Ordering::Acquire).unwrap_or(0)
    }

    fn store(&self, at: usize, byte: u8) {
        // All offsets lie in the page.
        let _ = self.page.as_volatile_slice().store(byte, at, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::unix::fs::FileExt;

    fn page(length: usize, seals: SealFlag) -> OwnedFd {
        let fd = memfd_create("state", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&fd, length as i64).unwrap();
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        fd
    }

    #[test]
    fn a_successor_finds_what_was_said() {
        let fd = page(SIZE, SealFlag::F_SEAL_SHRINK);
        let first = State::kept(fd.try_clone().unwrap()).unwrap();
        assert_eq!((first.link(), first.pairs(8), first.uso()), (None, None, None));
        first.set_link(false);
        first.set_pairs(3);
        first.set_uso(true);
        let second = State::kept(fd).unwrap();
        let said = (second.link(), second.pairs(8), second.uso());
        assert_eq!(said, (Some(false), Some(3), Some(true)));
        second.set_link(true);
        assert_eq!(first.link(), Some(true));
        first.set_offload(TunOffload::TCP.with(TunOffload::USO));
        assert_eq!(second.offload(), TunOffload::TCP.with(TunOffload::USO));
        let mac = MacAddress([2, 3, 4, 5, 6, 7]);
        second.set_mac(Some(mac));
        assert_eq!(first.mac(), Some(mac));
        first.set_mac(None);
        assert_eq!(second.mac(), None);
        let private = State::private().unwrap();
        private.set_pairs(2);
        assert_eq!((private.link(), private.pairs(2)), (None, Some(2)));
    }

    #[test]
    fn what_cannot_be_was_never_said() {
        let fd = page(SIZE, SealFlag::F_SEAL_SHRINK);
        let file = File::from(fd.try_clone().unwrap());
        let state = State::kept(fd).unwrap();
        for bytes in [[b'2', 4, 1], [0xff, 0xff, 0xff], [1, 0, 0]] {
            file.write_all_at(&bytes, 0).unwrap();
            let said = (state.link(), state.pairs(3), state.uso());
            assert_eq!(said, (None, None, None), "{bytes:?}");
        }
        for mac in [[0; 7], [YES, 1, 2, 3, 4, 5, 6], [YES, 0, 0, 0, 0, 0, 0]] {
            file.write_all_at(&mac, MAC as u64).unwrap();
            assert_eq!(state.mac(), None, "{mac:?}");
        }
    }

    #[test]
    fn a_file_that_may_shrink_or_is_none_is_refused() {
        let refused = |fd: OwnedFd, why: &str| {
            let error = State::kept(fd).err().unwrap().to_string();
            assert!(error.contains(why), "{error}");
        };
        refused(page(SIZE - 1, SealFlag::F_SEAL_SHRINK), "shorter");
        refused(page(SIZE, SealFlag::F_SEAL_GROW), "F_SEAL_SHRINK");
        refused(File::open("/proc/self/exe").unwrap().into(), "F_SEAL_SHRINK");
        refused(File::open("/dev/null").unwrap().into(), "no file");
    }
}
