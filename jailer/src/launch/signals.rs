//! Signals that end us, and how the launcher's commands take them.

use crate::inherit;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Signals that end a VM.
pub(super) const ENDING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// Signals that end a command which has something to undo first: a console's terminal, a half-made file.
pub(crate) const LEAVING: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

/// Blocks the signals that the loop takes from a descriptor. Before any process is made: they
/// unblock them again.
pub(crate) fn block_signals() -> nix::Result<SignalFd> {
    let all = ENDING.into_iter().chain([Signal::SIGCHLD]);
    take_by_descriptor(all)
}

/// Blocks `signals`: they come by the descriptor. Not those of a terminal that whoever started us had ignored, as
/// `nohup` and a shell's `&` do: a descriptor would bring them all the same.
pub(crate) fn take_by_descriptor(signals: impl IntoIterator<Item = Signal>) -> nix::Result<SignalFd> {
    let terminals = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP];
    let wanted = |signal: &Signal| !(terminals.contains(signal) && inherit::is_ignored(*signal));
    let set: SigSet = signals.into_iter().filter(wanted).collect();
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

/// Carries out `wait`, which may take as long as someone else likes, with the signals that end a VM ending this
/// process at once. The reaper then removes what there is.
pub(crate) fn interruptibly<T>(wait: impl FnOnce() -> T) -> T {
    let ending: SigSet = ENDING.into_iter().collect();
    let before = ending.thread_swap_mask(SigmaskHow::SIG_UNBLOCK);
    let result = wait();
    if let Ok(before) = before {
        // Of the masks that there are none is refused.
        let _ = before.thread_set_mask();
    }
    result
}
