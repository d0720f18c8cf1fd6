//! `bulkhead attach` and `bulkhead detach`: devices that come and go while the VM runs.

use super::connection::{Connection, not_done, not_finished};
use super::flags::DeviceFlags;
use super::ps::{self, RunningVm};
use crate::failure::Failure;
use crate::launch::attach::{Ready, prepare};
use crate::launch::net::link;
use crate::tell::tell;
use std::os::fd::AsFd;
use std::time::Duration;
use vm_spec::client::{Answer, Refusal, Request};
use vm_spec::run_state::{FdLink, ProcessRole, RunState};

/// For the supervisor to say what there is.
const DEVICES_DEADLINE: Duration = Duration::from_secs(5);
/// For a device's process to be made, to open its image and to answer: more than the supervisor waits.
const ATTACH_DEADLINE: Duration = Duration::from_secs(120);
/// So many others may take the id that was free a moment ago; each attaches a device.
const MOST_OUTRUN: usize = 16;
/// For the guest to let go, and the process to flush and to end: more than the supervisor waits.
const DETACH_DEADLINE: Duration = Duration::from_secs(120);

/// Attaches the device that `flags` describe to the VM; one line that says where it is.
///
/// # Errors
/// A [`Failure`] when there is no such VM, or the device cannot be opened, or cannot be attached.
pub(super) fn attach(vm: &str, flags: &DeviceFlags) -> Result<String, Failure> {
    let running = ps::find(vm)?;
    let spec = flags.spec(cpus(&running.state))?;
    let ask = || -> Result<_, Failure> {
        let Ready {
            attachment,
            descriptors,
            link,
        } = prepare(&spec, &running.state.name, &taken_ids(&running)?, &running.folder)?;
        let id = attachment.device.id.clone();
        let fds: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let request = Request::Attach(Box::new(attachment));
        let answer = Connection::open(&running)?.ask_with(request, &fds, ATTACH_DEADLINE)?;
        Ok((id, link, answer))
    };
    let mut asked = ask()?;
    // What is inherited is taken once.
    let inherits = spec.disks.iter().any(|disk| disk.key_fd.is_some())
        || spec.nets.iter().any(|net| !net.tap_fd.is_empty());
    for _ in 0..if inherits { 0 } else { MOST_OUTRUN } {
        if asked.2 != Answer::Refused(Refusal::IdTaken) {
            break;
        }
        // Its pipe has the name that the next one's will have: it goes first.
        asked.1 = None;
        asked = ask()?;
    }
    let (id, link, answer) = asked;
    let (slot, pid) = match answer {
        Answer::Attached { slot, pid } => (slot, pid),
        answer => {
            let hint = "bulkhead logs says what its process said";
            return Err(not_finished(format!("{id} was not attached"), answer, hint));
        }
    };
    if let Some(Err(error)) = link.map(|link| link.name(&id)) {
        tell(format_args!(
            "bulkhead: warning: {id} is attached, but takes no orders for its link: {error}"
        ));
    }
    let served = pid.map_or_else(String::new, |pid| format!(", served by pid {pid}"));
    Ok(format!("{id}: in PCI slot {slot}{served}\n"))
}

/// Those of its devices, also of someone else's and of some that are on their way, and of its helpers.
fn taken_ids(running: &RunningVm) -> Result<Vec<String>, Failure> {
    let mut taken = match Connection::open(running)?.ask(Request::Devices, None, DEVICES_DEADLINE)? {
        Answer::Devices(taken) => taken,
        answer => return Err(not_done("cannot tell which ids are taken", answer)),
    };
    let processes = running.state.processes.iter();
    taken.extend(processes.map(|process| process.name.clone()));
    Ok(taken)
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
        Answer::Refused(Refusal::NoDevice) => {
            let what = format!("the VM '{vm}' has no device '{device}'");
            Err(running.naming(Failure::usage(what)))
        }
        answer => {
            let hint = "its guest must have a driver for ACPI PCI hot-plug, and use the device no more";
            Err(not_finished(format!("{device} was not detached"), answer, hint))
        }
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
