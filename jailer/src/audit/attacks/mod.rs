//! The attacks themselves, in probes only. Each tries one thing by bare system calls, harmless
//! where it succeeds, and says whether it got through or with which errno it did not.
#![expect(unsafe_code, reason = "system calls as an intruder would make them")]

mod files;
mod kernel;
mod memory;
mod processes;
mod ring;
mod sockets;

use super::order::Order;
use super::wall::Wall;
use crate::audit::probe::stands;
use crate::sandbox::SEALS;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::ffi::CString;
use std::io;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicI32, Ordering};

/// Got through, or the errno.
type Outcome = Result<(), i32>;
/// Runs after lockdown: must not rely on any call that filters may forbid.
type Attempt = fn(&Order) -> Outcome;

/// A memfd that is sealed as guest memory is.
static MEMORY: AtomicI32 = AtomicI32::new(-1);
/// Its size.
const MEMORY_SIZE: libc::off_t = 1 << 20;

/// Makes what attacks need and confined code could not make. What fails here, the attack that
/// needs it fails without any wall, too, and is not counted.
pub(super) fn prepare(_order: &Order) {
    if MEMORY.load(Ordering::Relaxed) < 0
        && let Ok(memory) = make_memory()
    {
        MEMORY.store(memory.into_raw_fd(), Ordering::Relaxed);
    }
    if !stands(Wall::Limit)
        && let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
    {
        // Lowering or keeping the hard limit is always allowed.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn make_memory() -> nix::Result<OwnedFd> {
    let memory = memfd_create(c"guest-memory", MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&memory, MEMORY_SIZE)?;
    if stands(Wall::Seal) {
        fcntl(&memory, FcntlArg::F_ADD_SEALS(SEALS))?;
    }
    Ok(memory)
}

/// Tries the attack of `order`; one that no table holds is a mistake of ours.
pub(super) fn attempt(order: &Order) -> Outcome {
    find(&order.attack).map_or(Err(libc::ENOTSUP), |attempt| attempt(order))
}

fn find(name: &str) -> Option<Attempt> {
    [
        files::ALL,
        processes::ALL,
        sockets::ALL,
        kernel::ALL,
        memory::ALL,
        ring::ALL,
    ]
    .into_iter()
    .flatten()
    .find(|(known, _)| *known == name)
    .map(|(_, attempt)| *attempt)
}

/// One system call with up to six arguments; its result or errno.
fn call<const N: usize>(number: libc::c_long, arguments: [usize; N]) -> Result<usize, i32> {
    let at = |n: usize| arguments.get(n).copied().unwrap_or(0);
    // SAFETY: each caller passes what the call takes: numbers, or addresses of live values.
    let result = unsafe { libc::syscall(number, at(0), at(1), at(2), at(3), at(4), at(5)) };
    if result < 0 {
        Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    } else {
        Ok(result as usize)
    }
}

/// As [`call`], for what is of no further interest.
fn try_call<const N: usize>(number: libc::c_long, arguments: [usize; N]) -> Outcome {
    call(number, arguments).map(drop)
}

/// Succeeds on `errno`: the kernel would have done it, had the attack offered something real.
fn through_at(outcome: Outcome, errno: i32) -> Outcome {
    match outcome {
        Err(e) if e == errno => Ok(()),
        other => other,
    }
}

/// A path below the audit's folder. Without a zero byte, as it came in an argument.
fn below(order: &Order, name: &str) -> CString {
    CString::new(order.folder.join(name).as_os_str().as_bytes()).unwrap_or_default()
}

fn address(text: &CString) -> usize {
    text.as_ptr() as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::catalogue::ATTACKS;

    #[test]
    fn every_attack_of_the_catalogue_exists_once() {
        for attack in ATTACKS {
            assert!(find(attack.name).is_some(), "{}", attack.name);
            let same = ATTACKS.iter().filter(|other| other.name == attack.name);
            assert_eq!(same.count(), 1, "{}", attack.name);
        }
    }
}
