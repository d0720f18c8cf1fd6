//! `bulkhead inspect VM`: all that is known of a running VM.

use super::ps::{self, RunningVm};
use crate::failure::Failure;
use crate::launch::plan::print::held;
use std::fmt::Write as _;
use vm_spec::run_state::{Identity, ProcessState};

/// As text, or with `json` as an object: what the VM's `state.json` holds, with `state` and `since` as
/// `bulkhead ps` says them.
///
/// # Errors
/// A [`Failure`] when no such VM runs.
pub(super) fn show(name: &str, json: bool) -> Result<String, Failure> {
    let vm = ps::find(name)?;
    match json {
        true => to_json(&vm),
        false => Ok(to_text(&vm)),
    }
}

fn to_json(vm: &RunningVm) -> Result<String, Failure> {
    let failed = |e: serde_json::Error| Failure::host("the VM's state").because(&e);
    let mut all = serde_json::to_value(&vm.state).map_err(failed)?;
    all["state"] = vm.phase().into();
    all["since"] = vm.state.launched_unix.into();
    all["folder"] = vm.folder.to_string_lossy().into();
    Ok(format!("{all:#}\n"))
}

fn to_text(vm: &RunningVm) -> String {
    let identity = match vm.state.identity {
        Identity::Own => "those of the user who started it",
        Identity::Subordinate => "each process its own, of the user's subordinate ids",
        Identity::Range => "each process its own, of a range of root's",
    };
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "vm {}\nstate {} for {}\nfolder {}\nidentity {identity}",
        vm.name(),
        vm.phase(),
        ps::in_words(vm.up()),
        vm.folder.display()
    );
    if let Some(at) = vm.state.first_instruction_ns {
        let took = at.saturating_sub(vm.state.launched_ns) as f64 / 1e6;
        let _ = writeln!(out, "launch {took:.1} ms to the guest's first instruction");
    }
    for process in &vm.state.processes {
        describe(process, &mut out);
    }
    out
}

fn describe(process: &ProcessState, out: &mut String) {
    let id = process.id.map_or(String::new(), |id| format!(", id {id}"));
    let jail = match process.jailed {
        true => "namespaces of its own",
        false => "no namespaces of its own",
    };
    let policy = process.role.policy().unwrap_or("none");
    let _ = writeln!(
        out,
        "process {}\n  pid {}{id}\n  jail {jail}; policy {policy}",
        process.name, process.pid
    );
    let fds = process.fds.iter();
    held(out, fds.map(|fd| (fd.number, &*fd.what, fd.kept)), &process.made);
}
