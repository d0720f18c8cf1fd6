//! What `--dry-run` prints.

use super::{Jail, Plan};
use crate::sandbox::landlock_level;
use std::fmt::Write as _;
use vm_spec::run_state::{FdLink, Kept, MadeFds};

impl Plan {
    /// Each process, with every descriptor that it holds; `identity` says who they are.
    pub(crate) fn describe(&self, identity: &str) -> String {
        let mut out = format!("vm {}\nidentity {identity}\n", self.name);
        let landlock = landlock_level().map_or("no Landlock on this host".to_owned(), |level| {
            format!("Landlock level {level}")
        });
        let walls = match self.jail {
            Jail::On => "user, mount, pid, net, ipc, uts, cgroup and time namespaces; empty read-only root; ",
            Jail::Off => "off; ",
        };
        for process in self.workers.iter().chain([&self.supervisor]) {
            let _ = writeln!(
                out,
                "process {}\n  execute {} {}\n  jail {walls}no capabilities; {landlock}\n  seccomp {} policy {}, until lockdown {}",
                process.name,
                process.binary,
                process.arguments.join(" "),
                self.seccomp,
                process.role.policy().unwrap_or("none"),
                process.startup,
            );
            for (number, fd) in process.descriptors.iter().enumerate() {
                let kept = match fd.kept {
                    Kept::Always => "",
                    Kept::UntilLockdown => ", until lockdown",
                    Kept::UntilEndOfFile => ", until its end",
                };
                let _ = writeln!(out, "  fd {number} {}{kept}", fd.what);
            }
            for fds in &process.made {
                let _ = writeln!(out, "  makes {}", describe(fds));
            }
        }
        out
    }
}

fn describe(fds: &MadeFds) -> String {
    let link = match &fds.link {
        FdLink::Named(name) => name.clone(),
        FdLink::SameAs { process, number } => format!("fd {number} of {process} again"),
    };
    let count = match (fds.least, fds.most) {
        (_, None) => "one or more a queue".to_owned(),
        (least, Some(most)) if least == most => least.to_string(),
        (least, Some(most)) => format!("{least} to {most}"),
    };
    format!("{link} ({count}): {}", fds.what)
}
