//! No io_uring but those that were made: for a process that makes its rings and then looks at what it does not
//! trust, before its own filter stands.

use seccompiler::sock_filter;

/// `BPF_LD | BPF_W | BPF_ABS`, `BPF_JMP | BPF_JEQ | BPF_K`, `BPF_RET | BPF_K`.
const LOAD: u16 = 0x20;
const EQUALS: u16 = 0x15;
const RETURN: u16 = 0x06;

const fn step(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// Kills a process that makes a ring or changes one. Other architectures' calls are the business of the filter
/// that it started under.
const PROGRAM: [sock_filter; 5] = [
    step(LOAD, 0, 0, 0),
    step(EQUALS, 2, 0, libc::SYS_io_uring_setup as u32),
    step(EQUALS, 1, 0, libc::SYS_io_uring_register as u32),
    step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    step(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
];

/// Takes from the calling process, and the threads that it makes, the calls that make an io_uring or change what
/// one may be asked for. Lockdown, which forbids much more, need not have come.
///
/// # Errors
/// Where the kernel has no seccomp; lockdown fails there, too.
pub fn make_no_more_rings() -> std::io::Result<()> {
    seccompiler::apply_filter(&PROGRAM).map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests {
    #![expect(unsafe_code, reason = "children that make the calls")]

    use super::*;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    /// How a process ends that makes call `number` with no arguments of use.
    fn end_after(number: libc::c_long, forbidden: bool) -> WaitStatus {
        // SAFETY: the child makes system calls alone and ends without what its parent would do at an end.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => waitpid(child, None).unwrap(),
            ForkResult::Child => {
                let failed = forbidden && make_no_more_rings().is_err();
                // SAFETY: null where the call wants memory makes it fail.
                unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) };
                // SAFETY: ends this process, and nothing of what its parent has is run.
                unsafe { libc::_exit(i32::from(failed)) }
            }
        }
    }

    #[test]
    fn a_ring_is_neither_made_nor_changed_and_all_else_goes_on() {
        for number in [libc::SYS_io_uring_setup, libc::SYS_io_uring_register] {
            let killed = end_after(number, true);
            assert!(
                matches!(killed, WaitStatus::Signaled(_, Signal::SIGSYS, _)),
                "{number}: {killed:?}"
            );
            let ended = end_after(number, false);
            assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{number}: {ended:?}");
        }
        for number in [libc::SYS_io_uring_enter, libc::SYS_getpid] {
            let ended = end_after(number, true);
            assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{number}: {ended:?}");
        }
    }
}
