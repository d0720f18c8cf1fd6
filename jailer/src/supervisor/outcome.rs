//! How a VM ended: the exit code, and the line that says why.

use crate::sandbox::{EXIT_HUNG, EXIT_NO_MEMORY};
use vm_spec::control::{EndReason, exit_code};
use vm_spec::run_state::ProcessRole;
use vm_spec::supervise::{ExitStatus, SupervisedProcess};

/// `SIGSYS` on x86-64: what a filter kills with.
pub(super) const SIGSYS: u8 = 31;

/// An exit code and, where it is no success, what to tell.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Outcome {
    pub(super) code: u8,
    pub(super) line: Option<String>,
}

impl Outcome {
    pub(super) fn of_guest(reason: EndReason) -> Self {
        let (code, line) = match reason {
            EndReason::PowerOff => (exit_code::POWER_OFF, None),
            EndReason::Exited(status) => (status, None),
            EndReason::NoStatus => (
                exit_code::ERROR,
                Some("the guest powered off, and its command had told no exit status"),
            ),
            EndReason::Reset => (exit_code::RESET, Some("the guest reset")),
            EndReason::InstantReset => (
                exit_code::INSTANT_RESET,
                Some("the guest reset before it wrote to its console or drove a device"),
            ),
            EndReason::Panic => (exit_code::PANIC, Some("the guest's kernel panicked")),
            EndReason::TripleFault => (exit_code::TRIPLE_FAULT, Some("a vCPU shut down (triple fault)")),
            EndReason::KvmError => (exit_code::ERROR, Some("KVM could not go on")),
            EndReason::Stopped => (exit_code::ERROR, Some("the VM was stopped")),
        };
        Self {
            code,
            line: line.map(str::to_owned),
        }
    }

    /// A device has no back end any more.
    pub(super) fn of_loss(device: &str, reason: &str) -> Self {
        Self {
            code: exit_code::BACKEND_LOST,
            line: Some(format!("{device}: {reason}")),
        }
    }

    /// A process ended though the VM had not.
    pub(super) fn of_process(process: &SupervisedProcess, status: ExitStatus) -> Self {
        let SupervisedProcess { name, role, pid, .. } = process;
        let binary = match role {
            ProcessRole::Disk => "vhost-user-blk, ",
            ProcessRole::Net => "vhost-user-net, ",
            _ => "",
        };
        let policy = role.policy().unwrap_or("its");
        let what = match status {
            ExitStatus::Signal(SIGSYS) => format!(
                "was stopped by seccomp: policy jailer/policy/{policy}.policy; --seccomp=trap names \
                 the call"
            ),
            ExitStatus::Signal(signal) => format!("was killed by signal {signal}"),
            ExitStatus::OutOfMemory => "was killed by the kernel, out of memory: limits.memory is too small \
                                        for the guest's RAM and the processes beside it"
                .to_owned(),
            ExitStatus::Code(EXIT_HUNG) => "found that one of its threads spins, and gave up".to_owned(),
            ExitStatus::Code(EXIT_NO_MEMORY) => {
                "got no memory: the host, or the bound of its address space, \
                                                 refused it"
                    .to_owned()
            }
            ExitStatus::Code(code) => format!("exited with code {code}"),
        };
        let code = match (status, role) {
            (ExitStatus::Signal(SIGSYS), _) => exit_code::SECCOMP,
            (_, ProcessRole::Disk | ProcessRole::Net) => exit_code::BACKEND_LOST,
            _ => exit_code::ERROR,
        };
        Self {
            code,
            line: Some(format!("{name} ({binary}pid {pid}) {what}")),
        }
    }

    /// The same of a process that had not served yet: nothing is lost, it could not be started.
    pub(super) fn at_start(self, process: &SupervisedProcess) -> Self {
        let line = match (&process.serves, self.line) {
            (Some(serves), Some(line)) => Some(format!("{serves}: {line}")),
            (_, line) => line,
        };
        let code = match self.code {
            exit_code::BACKEND_LOST => exit_code::ERROR,
            code => code,
        };
        Self { code, line }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_spec::control::FdNumber;

    fn process(role: ProcessRole) -> SupervisedProcess {
        SupervisedProcess {
            name: "disk0".into(),
            role,
            serves: None,
            pid: 7,
            log: FdNumber(9),
            slot: None,
            tap: None,
            orders: None,
        }
    }

    #[test]
    fn a_lost_device_and_a_forbidden_call_are_told_apart() {
        let disk = process(ProcessRole::Disk);
        let lost = Outcome::of_process(&disk, ExitStatus::Signal(9));
        assert_eq!(lost.code, exit_code::BACKEND_LOST);
        assert_eq!(
            lost.line.as_deref(),
            Some("disk0 (vhost-user-blk, pid 7) was killed by signal 9")
        );
        let forbidden = Outcome::of_process(&disk, ExitStatus::Signal(SIGSYS));
        assert_eq!(forbidden.code, exit_code::SECCOMP);
        assert!(forbidden.line.unwrap().contains("stopped by seccomp"));
    }

    #[test]
    fn a_process_that_never_served_is_no_loss() {
        let disk = SupervisedProcess {
            serves: Some("disk[0].path: a.qcow2".into()),
            ..process(ProcessRole::Disk)
        };
        let at_start = |status| Outcome::of_process(&disk, status).at_start(&disk);
        let refused = at_start(ExitStatus::Code(1));
        assert_eq!(refused.code, exit_code::ERROR);
        assert_eq!(
            refused.line.as_deref(),
            Some("disk[0].path: a.qcow2: disk0 (vhost-user-blk, pid 7) exited with code 1")
        );
        assert_eq!(at_start(ExitStatus::Signal(SIGSYS)).code, exit_code::SECCOMP);
    }

    #[test]
    fn an_instant_reset_is_no_success() {
        assert_eq!(Outcome::of_guest(EndReason::InstantReset).code, 6);
        assert_eq!(Outcome::of_guest(EndReason::PowerOff).code, 0);
    }
}
