//! The person's terminal: raw while a guest has it, and as it was afterwards.

use nix::sys::termios::{LocalFlags, OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};
use std::io::{IsTerminal, stdin};

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

/// Undoes [`make_raw`]. A terminal that is gone needs nothing.
pub(crate) fn restore(saved: &Saved) {
    let _ = tcsetattr(stdin(), SetArg::TCSADRAIN, &saved.0);
}
