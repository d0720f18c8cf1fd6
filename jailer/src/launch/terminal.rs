//! The person's terminal: raw while a guest has it, and as it was afterwards.

use nix::sys::termios::{LocalFlags, OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{dup2_stderr, dup2_stdout, getpgrp, tcgetpgrp};
use std::fs::OpenOptions;
use std::io::{IsTerminal, stderr, stdin, stdout};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;

/// What a terminal was before.
#[derive(Clone)]
pub(crate) struct Saved(Termios);

/// Whether input comes from someone: a terminal whose foreground we are, or a file or pipe. In
/// the background, reading would take from the shell.
pub(crate) fn has_input() -> bool {
    !stdin().is_terminal() || tcgetpgrp(stdin()).is_ok_and(|group| group == getpgrp())
}

/// The terminal as it is. `None` when input is no terminal of ours.
pub(crate) fn save() -> Option<Saved> {
    let ours = stdin().is_terminal() && has_input();
    ours.then(|| tcgetattr(stdin()).ok().map(Saved)).flatten()
}

/// Makes the terminal raw: each key goes to the guest, Ctrl-C among them.
pub(crate) fn make_raw(saved: &Saved) {
    let mut raw = saved.0.clone();
    cfmakeraw(&mut raw);
    // Our own lines still start at the left.
    raw.output_flags |= OutputFlags::OPOST | OutputFlags::ONLCR;
    raw.local_flags -= LocalFlags::ECHO;
    // A terminal that is gone is found by the supervisor.
    let _ = tcsetattr(stdin(), SetArg::TCSANOW, &raw);
}

/// Lets standard output and standard error, where they are terminals, be opened by us alone and non-blocking: a
/// terminal that is stopped polls writable with less room than is written, and stops who writes. What else has
/// the terminal open does not notice. One that may not be opened stays as it is.
pub(crate) fn never_wait() {
    let open = |fd: BorrowedFd<'_>| {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let own = fd
            .is_terminal()
            .then(|| OpenOptions::new().write(true).custom_flags(flags).open(path));
        own.and_then(Result::ok)
    };
    // The numbers are open: nothing else fails.
    let _ = open(stdout().as_fd()).map(dup2_stdout);
    let _ = open(stderr().as_fd()).map(dup2_stderr);
}

/// Undoes [`make_raw`]. A terminal that is gone needs nothing.
pub(crate) fn restore(saved: &Saved) {
    let _ = tcsetattr(stdin(), SetArg::TCSADRAIN, &saved.0);
}
