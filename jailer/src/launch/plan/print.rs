//! What `--dry-run` prints.

use super::{Jail, Plan};
use crate::sandbox::child::time_namespaces;
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
            Jail::On if time_namespaces() => {
                "user, mount, pid, net, ipc, uts, cgroup and time namespaces; empty read-only root; "
            }
            Jail::On => "user, mount, pid, net, ipc, uts and cgroup namespaces; empty read-only root; ",
            Jail::Off => "off; ",
        };
        for process in self.processes() {
            let _ = writeln!(
                out,
                "process {}\n  execute {} {}\n  jail {walls}no capabilities; {landlock}\n  seccomp {} policy {}, until lockdown {}",
                process.name,
                process.binary,
                process.arguments.join(" "),
                self.seccomp,
                process.role.policy().unwrap_or("none"),
                process.startup(),
            );
            let fds = process.descriptors.iter().zip(0..);
            held(
                &mut out,
                fds.map(|(fd, n)| (n, &*fd.what, fd.kept)),
                &process.made,
            );
        }
        out
    }
}

/// The descriptors (number, what it is, how long it is kept) of a process.
pub(crate) fn held<'a>(
    out: &mut String,
    given: impl Iterator<Item = (i32, &'a str, Kept)>,
    made: &[MadeFds],
) {
    for (number, what, kept) in given {
        let kept = match kept {
            Kept::Always => "",
            Kept::UntilLockdown => ", until lockdown",
            Kept::UntilEndOfFile => ", until its end",
        };
        let _ = writeln!(out, "  fd {number} {what}{kept}");
    }
    for fds in made {
        let _ = writeln!(out, "  makes {}", describe(fds));
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
