//! The vmm's process, and its first message.

use super::{Choices, ProcessPlan, Source, Table, any, exactly};
use crate::launch::machine::{self, Backend, Device};
use vm_spec::control::VmConfig;
use vm_spec::machine::MACHINE_VERSION;
use vm_spec::run_state::{Kept, MadeFds, ProcessRole};
use vm_spec::spec::{OnReboot, VmSpec};

/// The first of a VM's processes.
pub(super) fn plan(spec: &VmSpec, devices: &[Device], choices: &Choices<'_>) -> (ProcessPlan, VmConfig) {
    let made = made(spec, devices);
    let mut fds = Table::new(Source::LogWrite(0));
    fds.add(Source::SupervisorControl, "control socket to the supervisor");
    let kvm = fds.add_until(Kept::UntilLockdown, Source::Kvm, "/dev/kvm");
    let kernel = fds.add(Source::Kernel, spec.boot.kernel.display().to_string());
    let initrd = spec
        .boot
        .initrd
        .as_ref()
        .map(|path| fds.add(Source::Initrd, path.display().to_string()));
    let console = fds.add(Source::ConsoleGuest, "console socket to the supervisor");
    let configs = devices
        .iter()
        .enumerate()
        .map(|(n, device)| {
            device.config([
                fds.add(Source::FrontEnd(n), format!("vhost-user socket of {}", device.id)),
                fds.add_until(
                    // Someone else's back end may not want it.
                    match device.is_ours() {
                        true => Kept::Always,
                        false => Kept::UntilEndOfFile,
                    },
                    Source::Requests(n),
                    format!("request channel of {} (the vmm's end)", device.id),
                ),
                fds.add_until(
                    Kept::UntilLockdown,
                    Source::RequestsPeer(n),
                    format!("request channel of {} (the back end's end)", device.id),
                ),
            ])
        })
        .collect();
    let vm = VmConfig {
        machine_version: MACHINE_VERSION,
        cpus: spec.cpus,
        memory: spec.memory.0,
        huge_page_size: spec.huge_pages.map(|size| size.0),
        kvm,
        kernel,
        initrd,
        cmdline: choices.cmdline.clone(),
        console,
        devices: configs,
        spares: machine::spares(spec, devices),
        restart_on_reboot: spec.on_reboot == OnReboot::Restart && spec.boot.command.is_empty(),
        takes_status: !spec.boot.command.is_empty(),
    };
    let mut arguments = vec!["--control-fd=3".to_owned()];
    arguments.extend(choices.common_arguments());
    let process = ProcessPlan {
        name: "vmm".into(),
        role: ProcessRole::Vmm,
        binary: "bulkhead-vmm",
        arguments,
        descriptors: fds.0,
        made,
    };
    (process, vm)
}

fn made(spec: &VmSpec, devices: &[Device]) -> Vec<MadeFds> {
    let disks = |device: &&Device| matches!(device.backend, Backend::Disk(_));
    let others = |device: &&Device| !device.is_ours();
    let count = |which: &dyn Fn(&&Device) -> bool| devices.iter().filter(which).count() as u32;
    let later = u32::from(spec.hotplug);
    let copies = u32::from(!devices.is_empty() || later > 0);
    let mut made = vec![
        exactly(
            1 + copies,
            "/memfd:guest-ram",
            "guest RAM, and what back ends are given of it",
        ),
        exactly(1, "anon_inode:kvm-vm", "the VM"),
        MadeFds {
            least: if later > 0 { 0 } else { count(&disks) },
            ..exactly(
                count(&disks) + later,
                "/memfd:inflight",
                "in-flight regions of disks",
            )
        },
        exactly(1, "anon_inode:[timerfd]", "a partial console line's patience"),
        any("anon_inode:[eventfd]", "doorbells, interrupts, wake-ups"),
    ];
    for cpu in 0..spec.cpus {
        made.push(exactly(1, &format!("anon_inode:kvm-vcpu:{cpu}"), "a vCPU"));
    }
    made.push(MadeFds {
        least: 0,
        ..exactly(
            2 * later,
            "socket:[",
            "vhost-user sockets and request channels of devices that are attached",
        )
    });
    made.push(MadeFds {
        least: 0,
        ..exactly(
            count(&others) + later,
            "/memfd:",
            "in-flight regions of someone else's back ends",
        )
    });
    made.retain(|fds| fds.most != Some(0));
    made
}
