//! The jail, from both sides: what the spawner does to a child before it executes, and what each
//! process does to itself as the last step before it serves.
//!
//! [`lockdown`] returns the token that serving loops take, so that serving unconfined does not
//! compile.

#[cfg(feature = "launcher")]
mod anchor;
pub mod caps;
#[cfg(feature = "launcher")]
pub mod cgroup;
pub mod child;
mod cpu;
mod end;
mod landlock;
mod line;
mod memory;
mod mounts;
mod rings;
mod rlimit;
mod role;
mod seals;
mod seccomp;
mod step;
mod trap;
mod userns;
mod verdict;
#[cfg(feature = "launcher")]
mod witness;

use crate::audit::wall::Wall;
#[cfg(feature = "launcher")]
pub use anchor::{Anchor, Root};
#[cfg(feature = "launcher")]
pub use cpu::share_cores_within;
pub use end::{end, end_on_panic};
pub use landlock::landlock_level;
pub use memory::{EXIT_NO_MEMORY, OrEnd};
pub use rings::make_no_more_rings;
#[cfg(feature = "launcher")]
pub(crate) use rlimit::MAX_OPEN_FILES;
pub use rlimit::most_open_files;
pub use role::{ParseRoleError, Role, SeccompMode};
pub use seals::SEALS;
pub use seccomp::{Opcode, Rule, opcodes, rules};
pub use step::{SpawnError, Step};
pub use verdict::{Verdict, syscall_name};
#[cfg(feature = "launcher")]
pub use witness::Witness;

/// What a device process exits with that found a thread of its own spinning: it is not broken by its
/// image or its host, and a successor may do better.
pub const EXIT_HUNG: u8 = 75;

/// Proof that this process has locked itself down. Only [`lockdown`] and [`lockdown_main`] make
/// one.
#[derive(Debug)]
pub struct Locked(());

/// What stopped a lockdown. The process must not serve.
#[derive(Debug, thiserror::Error)]
pub enum LockdownError {
    /// Making the process non-dumpable.
    #[error("cannot make the process non-dumpable")]
    Dumpable(#[source] std::io::Error),
    /// Setting a resource limit.
    #[error("cannot set the limit {0}")]
    Limit(&'static str, #[source] std::io::Error),
    /// Dropping capabilities.
    #[error("cannot drop capabilities")]
    Capabilities(#[source] std::io::Error),
    /// Setting no_new_privs.
    #[error("cannot set no_new_privs")]
    NoNewPrivs(#[source] std::io::Error),
    /// Denying paths by Landlock, on a kernel that has it.
    #[error("cannot restrict paths with Landlock")]
    Landlock(#[source] ::landlock::RulesetError),
    /// Installing the handler that names forbidden calls.
    #[error("cannot prepare to name forbidden system calls")]
    Trap(#[source] nix::Error),
    /// Installing the filter.
    #[error("cannot install the system call filter of role {0}")]
    Seccomp(Role, #[source] seccompiler::Error),
}

/// Locks the whole process down: not dumpable, resource limits, no capabilities, no_new_privs,
/// no paths (Landlock), then `role`'s system call filter on every thread.
///
/// Capabilities and Landlock are properties of a thread, which the threads it makes inherit: call
/// this before other threads exist, or accept that for them the filter alone stands.
///
/// # Errors
/// Any [`LockdownError`]; the process may be confined in part and must end.
pub fn lockdown(role: Role, mode: SeccompMode) -> Result<Locked, LockdownError> {
    confine(role)?;
    seccomp::install(role, mode, seccomp::Threads::All)?;
    audited(role);
    Ok(Locked(()))
}

/// As [`lockdown`], but the filter holds for the calling thread only (and threads it makes): for
/// a process whose threads have roles of their own.
///
/// # Errors
/// As [`lockdown`].
pub fn lockdown_main(role: Role, mode: SeccompMode) -> Result<Locked, LockdownError> {
    confine(role)?;
    seccomp::install(role, mode, seccomp::Threads::Calling)?;
    audited(role);
    Ok(Locked(()))
}

/// Gives the calling thread what is per thread: no capabilities, no paths, and `role`'s filter. A
/// vCPU thread calls it with [`Role::Vcpu`] as its last step before KVM_RUN.
///
/// # Errors
/// As [`lockdown`].
pub fn lockdown_thread(role: Role, mode: SeccompMode) -> Result<(), LockdownError> {
    confine_thread()?;
    seccomp::install(role, mode, seccomp::Threads::Calling)?;
    // Other roles' threads are like their main thread, which is the last to be confined.
    if role == Role::Vcpu {
        audited(role);
    }
    Ok(())
}

/// What the spawner, which opened everything and made every process, gives up once they run: all
/// capabilities in its namespace but that to end them, and all calls but its policy's.
///
/// # Errors
/// As [`lockdown`].
#[cfg(feature = "launcher")]
pub fn lockdown_spawner(mode: SeccompMode) -> Result<(), LockdownError> {
    const CAP_KILL: u64 = 1 << 5;
    let kept = caps::effective().map_err(LockdownError::Capabilities)? & CAP_KILL;
    caps::keep_only(kept).map_err(LockdownError::Capabilities)?;
    nix::sys::prctl::set_no_new_privs().map_err(|e| LockdownError::NoNewPrivs(e.into()))?;
    end_on_panic("bulkhead");
    seccomp::install(Role::Spawner, mode, seccomp::Threads::Calling)
}

/// Leaves the calling process without a path: its root is empty and read-only from here on. It takes
/// CAP_SYS_ADMIN in its user namespace.
///
/// # Errors
/// When the kernel refuses; the process may see paths still.
#[cfg(feature = "launcher")]
pub fn leave_paths() -> std::io::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    Ok(mounts::enter_empty_root()?)
}

/// The forker's, before its first order: it has what capabilities making jails takes, and the calls of
/// `forker.policy`.
///
/// # Errors
/// [`LockdownError`] naming the step.
pub fn lockdown_forker(mode: SeccompMode) -> Result<(), LockdownError> {
    end_on_panic("bulkhead");
    seccomp::install(Role::Forker, mode, seccomp::Threads::Calling)
}

fn confine(role: Role) -> Result<(), LockdownError> {
    prepare_audit();
    nix::sys::prctl::set_dumpable(false).map_err(|e| LockdownError::Dumpable(e.into()))?;
    cpu::keep_pages_apart();
    tracing::debug!(landlock = landlock_level(), "locking down");
    if stands(Wall::Limit) {
        rlimit::limit_self(role)?;
    }
    confine_thread()
}

fn confine_thread() -> Result<(), LockdownError> {
    prepare_audit();
    if stands(Wall::Capability) {
        caps::drop_all().map_err(LockdownError::Capabilities)?;
    }
    nix::sys::prctl::set_no_new_privs().map_err(|e| LockdownError::NoNewPrivs(e.into()))?;
    if stands(Wall::Landlock) {
        landlock::deny_paths().map_err(LockdownError::Landlock)?;
    }
    Ok(())
}

#[cfg(feature = "probe")]
use crate::audit::probe::{act as audited, prepare as prepare_audit, stands};

/// Only a probe of `bulkhead audit` leaves a wall out.
#[cfg(not(feature = "probe"))]
const fn stands(_: Wall) -> bool {
    true
}

/// Only a probe attacks.
#[cfg(not(feature = "probe"))]
const fn audited(_: Role) {}

/// Only a probe has something to attack with.
#[cfg(not(feature = "probe"))]
const fn prepare_audit() {}
