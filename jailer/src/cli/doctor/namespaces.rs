//! Whether this user can make the namespaces of a jail, and be someone in them.

use crate::launch::net::enter_namespace;
use crate::sandbox::leave_paths;
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};

/// Tries it.
pub(super) fn usable() -> bool {
    matches!(in_child(enter_namespaces), Ok(true))
}

/// Whether `job` succeeds in a process of its own: the launcher itself stays outside.
#[expect(unsafe_code, reason = "a fork to try namespaces in")]
fn in_child(job: impl FnOnce() -> bool) -> nix::Result<bool> {
    // SAFETY: this process has one thread; the child does its job and leaves.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => {
            let code = i32::from(!job());
            // SAFETY: leaves without running what the parent registered.
            unsafe { libc::_exit(code) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            Ok(waitpid(child, None)? == WaitStatus::Exited(child, 0))
        }
    }
}

/// All of a jail's: to be made is not enough, as AppArmor refuses whoever has made them the ids and mounts in them.
fn enter_namespaces() -> bool {
    let others = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    enter_namespace().is_ok() && unshare(others).is_ok() && leave_paths().is_ok()
}

#[cfg(test)]
mod tests {
    use super::super::{Level, user_namespaces};
    use super::*;

    #[test]
    fn namespaces_in_which_nobody_is_mapped_are_not_enough() {
        use nix::sys::resource::{Resource, setrlimit};
        // Not on every host.
        if !in_child(enter_namespaces).unwrap() {
            return;
        }
        // They are made, and no file is opened to map anyone.
        let unmapped = || setrlimit(Resource::RLIMIT_NOFILE, 0, 0).is_ok() && enter_namespaces();
        let finding = user_namespaces(in_child(unmapped).unwrap(), Some("1".to_owned()));
        assert_eq!(finding.level, Level::Missing);
        assert!(finding.what.contains("AppArmor"), "{}", finding.what);
    }
}
