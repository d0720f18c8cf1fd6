//! System call filters: stops a taken-over process from asking the kernel for what its role
//! never needs.

use super::{LockdownError, Role, SeccompMode, trap};
use seccompiler::sock_filter;

/// One line of a policy, as embedded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rule {
    /// The system call's name.
    pub syscall: &'static str,
    /// The condition on its arguments, in the policy's language; empty: none.
    pub condition: &'static str,
    /// Why it is allowed.
    pub reason: &'static str,
    /// `FILE:LINE` in `jailer/policy`.
    pub place: &'static str,
}

/// What a role's io_uring may be asked for: a filter does not see it, so the ring is restricted to it.
#[derive(Clone, Copy, Debug)]
pub struct Opcode {
    /// As `enum io_uring_op` spells it.
    pub name: &'static str,
    /// Its number there.
    pub number: u8,
    /// Why it is allowed.
    pub reason: &'static str,
    /// `FILE:LINE` in `jailer/policy`.
    pub place: &'static str,
}

/// A role's programs.
struct Compiled {
    enforce: &'static [sock_filter],
    trap: &'static [sock_filter],
    log: &'static [sock_filter],
}

mod compiled {
    use super::{Compiled, Opcode, Rule};
    use crate::sandbox::Role;
    use seccompiler::sock_filter;

    include!(concat!(env!("OUT_DIR"), "/policies.rs"));
}

/// The rules of `role`, in the order of its policy file.
pub fn rules(role: Role) -> &'static [Rule] {
    compiled::rules(role)
}

/// What a ring of a role's may be asked for; empty where it has none.
#[must_use]
pub fn opcodes(role: Role) -> &'static [Opcode] {
    compiled::opcodes(role)
}

/// Which threads a filter is installed on.
pub(super) enum Threads {
    /// All of the process, at once.
    All,
    /// The caller.
    Calling,
}

/// Puts the calling process, which is about to execute a program, under the filter of `role` for its
/// start. Async-signal-safe.
pub(super) fn install_before_exec(role: Role, mode: SeccompMode) -> Result<(), seccompiler::Error> {
    let programs = compiled::compiled(role);
    match mode {
        SeccompMode::Enforce => seccompiler::apply_filter(programs.enforce),
        // Later, under both filters, the stricter answer would win over the handler.
        SeccompMode::Trap => seccompiler::apply_filter(programs.trap),
        SeccompMode::Log => seccompiler::apply_filter(programs.log),
        SeccompMode::Off => Ok(()),
    }
}

pub(super) fn install(role: Role, mode: SeccompMode, threads: Threads) -> Result<(), LockdownError> {
    let programs = compiled::compiled(role);
    let program = match mode {
        SeccompMode::Enforce => programs.enforce,
        SeccompMode::Trap => {
            trap::prepare(role).map_err(LockdownError::Trap)?;
            programs.trap
        }
        SeccompMode::Log => programs.log,
        SeccompMode::Off => return Ok(()),
    };
    match threads {
        Threads::All => seccompiler::apply_filter_all_threads(program),
        Threads::Calling => seccompiler::apply_filter(program),
    }
    .map_err(|e| LockdownError::Seccomp(role, e))
}
