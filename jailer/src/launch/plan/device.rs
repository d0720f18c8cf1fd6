//! The process of a device of ours.

use super::{Choices, Kept, ProcessPlan, Source, Table, another, any, exactly};
use crate::launch::disk::Disk;
use crate::launch::machine::{Backend, Device};
use crate::launch::net::Nic;
use vm_spec::control::FdNumber;
use vm_spec::run_state::{MadeFds, ProcessRole};
use vm_spec::spec::ImageFormat;

/// The process of device `n`, which logs to pipe `log`.
pub(in crate::launch) fn plan(
    n: usize,
    device: &Device,
    choices: &Choices<'_>,
    log: usize,
) -> Option<ProcessPlan> {
    let mut fds = Table::new(Source::LogWrite(log));
    let socket = fds.add(Source::BackEnd(n), "vhost-user socket to the vmm");
    let mut arguments = vec![format!("--fd={}", socket.0)];
    let mut made = vec![
        another(
            &device.id,
            socket,
            "the vhost-user socket, to be shut down from elsewhere",
        ),
        exactly(1, "anon_inode:[signalfd]", "the signal to end"),
        any("anon_inode:[eventfd]", "doorbells, interrupts, wake-ups"),
    ];
    let (role, binary) = match &device.backend {
        Backend::External(_) | Backend::Passt { .. } => return None,
        Backend::Disk(disk) => {
            let (flags, orders) = plan_disk(n, disk, &choices.chains[n], &mut fds);
            arguments.extend(flags);
            made.push(another(
                &device.id,
                orders,
                "the same, while a front end is served",
            ));
            arguments.extend(device.num_queues.map(|q| format!("--num-queues={q}")));
            made.push(exactly(1, "/memfd:inflight", "in-flight region"));
            made.push(MadeFds {
                most: device.num_queues.map(u32::from),
                ..exactly(0, "anon_inode:[io_uring]", "a queue's restricted ring")
            });
            (ProcessRole::Disk, "vhost-user-blk")
        }
        Backend::Net(nic) => {
            arguments.extend(plan_nic(n, nic, &mut fds));
            made.push(any("anon_inode:[eventpoll]", "waiting"));
            made.push(any(
                "anon_inode:[timerfd]",
                "a rate limit's pause, a frame's patience",
            ));
            (ProcessRole::Net, "vhost-user-net")
        }
    };
    // Behind those that are told by what they link to.
    made.push(exactly(1, "socket:[", "request channel, sent by the vmm"));
    arguments.extend(choices.device_arguments());
    Some(ProcessPlan {
        name: device.id.clone(),
        role,
        binary,
        arguments,
        descriptors: fds.0,
        made,
    })
}

/// The flags, and where orders come from. `formats` are those of the image chain, the top first.
fn plan_disk(n: usize, disk: &Disk, formats: &[ImageFormat], fds: &mut Table) -> (Vec<String>, FdNumber) {
    let image = fds.add(Source::Image(n, 0), disk.path.display().to_string());
    let mut arguments = vec![
        format!("--blk-fd={}", image.0),
        format!("--format={}", disk.format.name()),
    ];
    if disk.past_cache {
        let what = format!("{}, past the page cache", disk.path.display());
        let direct = fds.add(Source::DirectImage(n), what);
        arguments.push(format!("--blk-direct-fd={}", direct.0));
        arguments.push("--cache=none".into());
    }
    for (layer, format) in formats.iter().enumerate().skip(1) {
        let fd = fds.add(Source::Image(n, layer), format!("backing file {layer}"));
        arguments.push(format!("--backing-fd={}:{}", format.name(), fd.0));
    }
    if let Some(path) = &disk.data_file {
        let fd = fds.add(Source::DataFile(n), format!("data file {}", path.display()));
        arguments.push(format!("--data-file-fd={}", fd.0));
    }
    if disk.key.is_some() {
        let fd = fds.add_until(Kept::UntilLockdown, Source::Key(n), "passphrase of the image");
        arguments.push(format!("--key-fd={}", fd.0));
    }
    if disk.read_only {
        arguments.push("--read-only".into());
    }
    let orders = fds.add(Source::Orders(n), "orders by the supervisor: a new size, metrics");
    arguments.push(format!("--control-fd={}", orders.0));
    arguments.extend(disk.flags.iter().cloned());
    (arguments, orders)
}

fn plan_nic(n: usize, nic: &Nic, fds: &mut Table) -> Vec<String> {
    let mut arguments = vec![format!("--mac={}", nic.mac)];
    for queue in 0..usize::from(nic.queues) {
        let tap = fds.add(Source::Tap(n, queue), "TAP");
        arguments.push(format!("--tap-fd={}", tap.0));
    }
    arguments.push(format!("--num-queues={}", 2 * nic.queues));
    arguments.extend(nic.mtu.map(|mtu| format!("--mtu={mtu}")));
    let orders = fds.add(Source::Orders(n), "orders by the supervisor: metrics");
    arguments.push(format!("--control-fd={}", orders.0));
    let link = fds.add(Source::Link(n), "pipe with orders for the link");
    arguments.push(format!("--link-fd={}", link.0));
    let state = fds.add(Source::NicState(n), "what a successor must know");
    arguments.push(format!("--state-fd={}", state.0));
    if let Some(path) = &nic.pcap {
        let pcap = fds.add(Source::Pcap(n), path.display().to_string());
        arguments.push(format!("--pcap-fd={}", pcap.0));
    }
    arguments.extend(nic.flags.iter().cloned());
    arguments
}
