//! `--seccomp=trap`: what the policy forbids is not done either, but the process lives long enough
//! to say what it was. For finding out why a process was killed: a kill leaves no time for words.
#![expect(unsafe_code, reason = "a signal handler and what the kernel tells it")]

use super::line::Line;
use super::{Role, Verdict, end};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::cell::Cell;
use std::fmt::Write as _;

thread_local! {
    /// Whose filter this thread has. Constant at first and never dropped, so that a signal
    /// handler may look at it.
    static ROLE: Cell<Option<Role>> = const { Cell::new(None) };
}

/// The calling thread's filter is `role`'s from here on; forbidden calls are told.
pub(super) fn prepare(role: Role) -> nix::Result<()> {
    ROLE.set(Some(role));
    let action = SigAction::new(
        SigHandler::SigAction(tell),
        SaFlags::SA_SIGINFO | SaFlags::SA_NODEFER,
        SigSet::empty(),
    );
    // SAFETY: the handler calls only functions that are allowed in one, and does not return.
    unsafe { sigaction(Signal::SIGSYS, &action) }.map(drop)
}

/// The start of `siginfo_t` as the kernel fills it for SYS_SECCOMP (`asm-generic/siginfo.h`).
#[repr(C)]
struct Info {
    signal: i32,
    errno: i32,
    code: i32,
    padding: i32,
    address: usize,
    number: i32,
}

extern "C" fn tell(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t, of which `Info` is the start.
    let number = unsafe { &*info.cast::<Info>() }.number;
    let mut line = Line::default();
    let _ = match ROLE.get() {
        Some(role) => {
            let verdict = Verdict {
                role,
                number: number.into(),
            };
            writeln!(line, "stopped by seccomp: {role}: {verdict}")
        }
        None => writeln!(line, "stopped by seccomp: system call {number}"),
    };
    line.tell();
    end(vm_spec::control::exit_code::SECCOMP)
}
