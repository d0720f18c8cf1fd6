//! The probe's side: reads its order, leaves out the walls it is told to, and after its lockdown
//! tries one attack instead of serving.
#![expect(unsafe_code, reason = "reports by bare system calls under the role's filter")]

use super::attacks;
use super::order::{BEGUN, Order};
use super::wall::Wall;
use crate::sandbox::Role;
use nix::sys::signal::{SigSet, Signal};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// A thread carries out the order.
static TAKEN: AtomicBool = AtomicBool::new(false);
static ORDER: LazyLock<Option<Order>> = LazyLock::new(|| Order::parse(std::env::args_os().next()?.to_str()?));

/// Whether lockdown builds `wall`. Always, but for a probe that is told otherwise.
pub fn stands(wall: Wall) -> bool {
    ORDER.as_ref().is_none_or(|order| !order.removed.has(wall))
}

/// Called before anything of the process is confined: what an attack needs that confined code
/// could not make. An order for a process that starts is carried out here. Idempotent.
pub fn prepare() {
    if let Some(order) = ORDER.as_ref() {
        hold_kicks();
        attacks::prepare(order);
    }
    act(Role::Startup);
}

/// Called as the last step of a lockdown: with an order for `role`, tries its attack, reports and
/// ends the process. Another role's lockdown, or no order, changes nothing.
pub fn act(role: Role) {
    let Some(order) = ORDER.as_ref().filter(|order| order.role == role) else {
        return;
    };
    if TAKEN.swap(true, Ordering::Relaxed) {
        // Another thread has got here first, and ends the process.
        loop {
            std::thread::park();
        }
    }
    report(order.report, &[BEGUN]);
    let errno = match attacks::attempt(order) {
        Ok(()) => 0,
        Err(errno) => errno,
    };
    report(order.report, &errno.to_ne_bytes());
    // SAFETY: ends the process at once, as every role's filter allows.
    unsafe { libc::_exit(0) }
}

/// What a thread executes keeps the signals that were sent to it: a vCPU's kick would end it.
fn hold_kicks() {
    // All, since the set knows no real-time signals by name; but not those that attacks may raise.
    let mut held = SigSet::all();
    for raised in [Signal::SIGSYS, Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL] {
        held.remove(raised);
    }
    // Fails for no set.
    let _ = held.thread_block();
}

fn report(fd: i32, bytes: &[u8]) {
    // SAFETY: `bytes` is live and as long as said; a closed pipe is found by who reads it.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}
