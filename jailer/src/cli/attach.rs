//! `bulkhead attach` and `bulkhead detach`: devices that come and go while the VM runs.

use super::connection::Connection;
use super::flags::DeviceFlags;
use super::ps;
use crate::failure::Failure;
use crate::launch::attach::{Ready, prepare};
use crate::launch::net::link;
use std::os::fd::AsFd;
use std::time::Duration;
use vm_spec::client::{Answer, Request};
use vm_spec::run_state::{FdLink, ProcessRole, RunState};

/// For a device's process to be made, to open its image and to answer: more than the supervisor waits.
const ATTACH_DEADLINE: Duration = Duration::from_secs(120);
/// For the guest to let go, and the process to flush and to end: more than the supervisor waits.
const DETACH_DEADLINE: Duration = Duration::from_secs(120);

/// Attaches the device that `flags` describe to the VM; one line that says where it is.
///
/// # Errors
/// A [`Failure`] when there is no such VM, or the device cannot be opened, or cannot be attached.
pub(super) fn attach(vm: &str, flags: &DeviceFlags) -> Result<String, Failure> {
    let running = ps::find(vm)?;
    let spec = flags.spec(cpus(&running.state))?;
    let Ready {
        attachment,
        descriptors,
    } = prepare(&spec, &running.state, &running.folder)?;
    let id = attachment.device.id.clone();
    let fds: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let answered = Connection::open(&running).and_then(|mut connection| {
        connection.ask_with(Request::Attach(Box::new(attachment)), &fds, ATTACH_DEADLINE)
    });
    let failure = match answered {
        Ok(Answer::Attached { slot, pid: Some(pid) }) => {
            return Ok(format!("{id}: in PCI slot {slot}, served by pid {pid}\n"));
        }
        Ok(Answer::Attached { slot, pid: None }) => return Ok(format!("{id}: in PCI slot {slot}\n")),
        Ok(Answer::Failed(why)) => Failure::host(format!("{id} was not attached"))
            .cause(why)
            .hint("bulkhead logs says what its process said"),
        Ok(_) => Failure::host("the supervisor gave no answer to the request"),
        Err(failure) => failure,
    };
    link::remove(&running.folder, &id);
    Err(failure)
}

/// Has the VM's guest let go of a device, and ends its process.
///
/// # Errors
/// A [`Failure`] when there is no such VM or device, or the guest does not let go of it.
pub(super) fn detach(vm: &str, device: &str) -> Result<String, Failure> {
    let running = ps::find(vm)?;
    let request = Request::Detach {
        device: device.to_owned(),
    };
    match Connection::open(&running)?.ask(request, None, DETACH_DEADLINE)? {
        Answer::Detached => {
            link::remove(&running.folder, device);
            Ok(String::new())
        }
        Answer::Failed(why) => Err(Failure::host(format!("{device} was not detached"))
            .cause(why)
            .hint("its guest must have a driver for ACPI PCI hot-plug, and use the device no more")),
        _ => Err(Failure::host("the supervisor gave no answer to the request")),
    }
}

/// The VM's vCPUs, by what its vmm holds.
fn cpus(state: &RunState) -> u8 {
    let vmm = state
        .processes
        .iter()
        .find(|process| process.role == ProcessRole::Vmm);
    let is_vcpu =
        |link: &FdLink| matches!(link, FdLink::Named(name) if name.starts_with("anon_inode:kvm-vcpu"));
    let count = vmm.map_or(1, |vmm| {
        vmm.made.iter().filter(|made| is_vcpu(&made.link)).count()
    });
    u8::try_from(count.max(1)).unwrap_or(u8::MAX)
}
