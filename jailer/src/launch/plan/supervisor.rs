//! The supervisor's process, and its first message.

use super::{Choices, ProcessPlan, Source, Table, exactly};
use crate::launch::connector;
use crate::launch::machine::{self, Backend, Device};
use crate::supervisor::MOST_CLIENTS;
use crate::tell::printable;
use vm_spec::run_state::{Kept, MadeFds, ProcessRole};
use vm_spec::spec::VmSpec;
use vm_spec::supervise::{RemoteDevice, SupervisedProcess, SupervisorConfig};

/// The process that watches `workers`.
pub(super) fn plan(
    spec: &VmSpec,
    name: &str,
    devices: &[Device],
    workers: &[ProcessPlan],
    choices: &Choices<'_>,
) -> (ProcessPlan, SupervisorConfig) {
    let mut fds = Table::new(Source::Stderr);
    fds.add(Source::SpawnerControl, "control socket to the spawner");
    let vmm = fds.add(Source::VmmControl, "control socket to the vmm");
    let clients = fds.add(Source::Clients, "control socket of the VM (listens)");
    let console = fds.add(Source::ConsolePerson, "console socket to the vmm");
    let remotes: Vec<_> = connector::remotes(devices)
        .map(|device| RemoteDevice {
            name: device.id.clone(),
            slot: device.slot,
        })
        .collect();
    let connector =
        connector::is_needed(devices).then(|| fds.add(Source::Connector, "socket to the connector"));
    let input = choices
        .has_input
        .then(|| fds.add_until(Kept::UntilEndOfFile, Source::Input, "standard input of bulkhead"));
    let output = Some(fds.add(Source::Output, "standard output of bulkhead"));
    // The vmm is no device; a device of someone else's has no process of ours.
    let ours = devices.iter().filter(|device| device.is_ours());
    let slots = [None].into_iter().chain(ours.map(|device| Some(device.slot)));
    let processes = workers
        .iter()
        .zip(slots)
        .enumerate()
        .map(|(n, (worker, slot))| SupervisedProcess {
            name: worker.name.clone(),
            role: worker.role,
            serves: devices.iter().find(|device| device.id == worker.name).map(serves),
            pid: 0,
            log: fds.add(
                Source::LogRead(n),
                format!("log pipe of {} (read end)", worker.name),
            ),
            slot,
            tap: connector::tap_place(devices, &worker.name),
            orders: worker
                .role
                .is_device()
                .then(|| devices.iter().position(|device| device.id == worker.name))
                .flatten()
                .map(|n| fds.add(Source::OrdersPeer(n), format!("orders to {}", worker.name))),
        })
        .collect();
    let config = SupervisorConfig {
        name: name.to_owned(),
        vmm,
        clients,
        console,
        input,
        output,
        escape: choices.raw_terminal,
        processes,
        remotes,
        spares: machine::spares(spec, devices),
        connector,
        power_off_grace: spec.power_off_grace,
        log_json: choices.log_json,
        on_device_death: spec.on_device_death,
    };
    let process = ProcessPlan {
        name: "supervisor".into(),
        role: ProcessRole::Supervisor,
        binary: "bulkhead-supervisor",
        arguments: vec![format!("--seccomp={}", choices.seccomp)],
        descriptors: fds.0,
        made: made(spec),
    };
    (process, config)
}

/// The field of the spec that a process is for, with what it names.
fn serves(device: &Device) -> String {
    match &device.backend {
        Backend::Disk(disk) => printable(&format!("{}.path: {}", device.field, disk.path.display())),
        _ => device.field.clone(),
    }
}

fn made(spec: &VmSpec) -> Vec<MadeFds> {
    let later = u32::from(spec.hotplug);
    let some = |most, link, what| MadeFds {
        least: 0,
        ..exactly(most, link, what)
    };
    let clients = some(
        MOST_CLIENTS + later,
        "socket:[",
        "other commands of the VM's owner, and orders to devices that are attached",
    );
    let logs = some(
        later,
        "pipe:[",
        "log pipes of devices that are attached (read ends)",
    );
    let mut made = vec![clients, logs];
    made.retain(|fds| fds.most != Some(0));
    made
}
