//! Network interfaces: what a [`NetSpec`](vm_spec::net::NetSpec) asks for, and the TAPs that it
//! needs.
//!
//! | mode | TAP | beside the VM's own processes |
//! |---|---|---|
//! | `tap`, `tap-fd` | existing | |
//! | `bridge` | made here, in the host's namespace | |
//! | `private` | made in a namespace of its own | its holder |
//! | `user` | the same, bridged to another that the relay reads | the relay; passt |
//! | `isolated` | made in the segment's namespace | a member; the segment's keeper |
//!
//! None is persistent: each goes with its last descriptor.

mod holder;
mod inherited;
mod interface;
mod isolated;
pub(crate) mod line;
pub(crate) mod link;
mod passt;
mod private;
mod relay;
mod settings;
mod user;

pub(super) use holder::detach;
pub(crate) use holder::{Holder, enter_namespace};
pub(crate) use passt::Passt;
pub(crate) use settings::{Nic, Publish, Wire, check};
pub(crate) use user::serve;

use super::Options;
use super::machine::{Backend, Device};
use crate::failure::Failure;
use crate::tell::tell;
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A NIC's TAP that can be given to its device process: a descriptor for each pair of queues.
pub(crate) enum Opened {
    /// An open one.
    Ready(Vec<OwnedFd>),
    /// One that its holder is making: half a millisecond in which others start.
    Making(Holder),
}

/// Why there is no TAP.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetError {
    #[error("there is no interface '{0}'")]
    Missing(String),
    #[error("'{0}' is no bridge")]
    NoBridge(String),
    #[error("the interface '{0}' is busy")]
    Busy(String),
    #[error("this needs CAP_NET_ADMIN in the host's network namespace")]
    NotPermitted,
    #[error("'{0}' is no interface name: at most 15 characters, and no '/'")]
    Name(String),
    #[error("cannot open /dev/net/tun")]
    Device(#[source] io::Error),
    #[error("cannot attach to the interface")]
    Attach(#[source] io::Error),
    #[error("cannot {0}")]
    Make(&'static str, #[source] io::Error),
    #[error("{0}")]
    Holder(String),
    /// As `Holder`, of what [`NetError::is_of_the_host`].
    #[error("{0}")]
    Lacking(String),
    #[error("the launcher is gone")]
    Left,
    #[error("it is not open")]
    NotOpen(#[source] io::Error),
    #[error("it is busy: another NIC of this VM has it")]
    BusyDescriptor,
    #[error("it is no TAP with an interface")]
    NoTap(#[source] io::Error),
    #[error("it is no TAP of bare frames behind virtio-net headers")]
    OtherFrames,
    #[error("they belong to two interfaces, '{0}' and '{1}'")]
    TwoTaps(String, String),
}

/// Opens a NIC's TAP, or starts its making; `line` is for a relay.
pub(crate) fn open(
    device: &Device,
    nic: &Nic,
    options: &Options,
    line: Option<OwnedFd>,
) -> Result<Opened, Failure> {
    let field = &device.field;
    let queues = nic.queues;
    match &nic.wire {
        Wire::Name(name) => interface::open_existing(name, queues)
            .inspect(|_| warn_of_mtu(field, name, nic.mtu))
            .map(Opened::Ready)
            .map_err(|e| no_existing_tap(field, name, &e)),
        Wire::Inherited(fds) => inherited::inherited(fds)
            .map(Opened::Ready)
            .map_err(|e| no_inherited_tap(field, fds, &e)),
        Wire::Bridge(bridge) => interface::open_on_bridge(bridge, queues, nic.mtu)
            .map(Opened::Ready)
            .map_err(|e| no_port(field, bridge, &e)),
        Wire::Private(address, prefix) => private::start(field, nic, *address, *prefix)
            .map(Opened::Making)
            .map_err(|e| not_made(&format!("{field}.private"), &e)),
        Wire::User(publish) => user::start(field, nic, publish, options, line).map(Opened::Making),
        Wire::Isolated(name) => isolated::start(field, nic, name)
            .map(Opened::Making)
            .map_err(|e| not_made(&format!("{field}.isolated"), &e)),
    }
}

/// The host may send longer frames than the guest is told of; its process drops those.
fn warn_of_mtu(field: &str, name: &str, mtu: Option<u16>) {
    if let Some(mtu) = mtu
        && let Ok(of_tap) = interface::mtu_of(name)
        && of_tap > mtu.into()
    {
        tell(format_args!(
            "bulkhead: warning: {field}.mtu: {mtu} is below that of the TAP, {of_tap}: longer packets do not \
             reach the guest; hint: ip link set {name} mtu {mtu}"
        ));
    }
}

/// Whether what a NIC needs is there, as far as that can be seen without making anything.
pub(crate) fn look(device: &Device, nic: &Nic) -> Result<(), Failure> {
    let field = &device.field;
    if let Some(path) = &nic.pcap {
        look_at_pcap(field, path)?;
    }
    let device_for = |mode| interface::look_at_device().map_err(|e| not_made(&format!("{field}.{mode}"), &e));
    match &nic.wire {
        Wire::Name(name) => interface::look_at(name).map_err(|e| no_existing_tap(field, name, &e)),
        Wire::Inherited(fds) => inherited::inherited(fds)
            .map(drop)
            .map_err(|e| no_inherited_tap(field, fds, &e)),
        Wire::Bridge(bridge) => match interface::look_at(bridge) {
            Ok(()) if !may_change_host_network() => Err(NetError::NotPermitted),
            looked => looked,
        }
        .map_err(|e| no_port(field, bridge, &e)),
        Wire::Private(..) => device_for("private"),
        Wire::User(_) => user::find(&format!("{field}.user")).and_then(|_| device_for("user")),
        Wire::Isolated(_) => device_for("isolated"),
    }
}

impl Nic {
    /// Its TAP is in the host's network, where others may delete it and make it again; no process stays for it.
    pub(crate) fn is_of_the_host(&self) -> bool {
        matches!(self.wire, Wire::Name(_) | Wire::Bridge(_) | Wire::Inherited(_))
    }

    /// A relay carries its frames to a passt that may die.
    pub(crate) fn has_relay(&self) -> bool {
        matches!(self.wire, Wire::User(_))
    }

    /// Starts another passt for its relay; our end of its socket. `None`: it has none.
    pub(crate) fn start_passt_again(&self, field: &str) -> Option<Result<OwnedFd, Failure>> {
        match &self.wire {
            Wire::User(publish) => Some(user::start_again(field, self, publish)),
            _ => None,
        }
    }

    /// The same NIC, without need of the descriptors that were inherited.
    pub(crate) fn by_name(mut self) -> Self {
        if let Wire::Inherited(fds) = &self.wire
            && let Some(name) = fds.first().and_then(|fd| interface::name_here(*fd))
        {
            self.wire = Wire::Name(name);
        }
        self
    }

    /// Opens the TAP of that name once more, or makes another on its bridge. `None`: nothing tells of an
    /// inherited one where it would be.
    pub(crate) fn open_again(&self) -> Option<Result<Vec<OwnedFd>, NetError>> {
        match &self.wire {
            Wire::Name(name) => Some(interface::open_existing(name, self.queues)),
            Wire::Bridge(bridge) => Some(interface::open_on_bridge(bridge, self.queues, self.mtu)),
            _ => None,
        }
    }
}

/// Where passt itself serves the NIC's queues, says so in `devices`.
pub(crate) fn choose_servers(devices: &mut [Device]) {
    for device in devices {
        if let Backend::Net(nic) = &device.backend
            && let Wire::User(publish) = &nic.wire
            && nic.asks_nothing_of_us()
            && let Some(passt) = Passt::find()
            && passt.has_vhost_user()
        {
            device.backend = Backend::Passt {
                passt,
                publish: publish.clone(),
                mtu: nic.mtu,
            };
        }
    }
}

/// Whether a TAP and a bridge can be made in a namespace of one's own.
///
/// # Errors
/// What cannot be made.
pub(crate) fn try_private_bridge() -> Result<(), NetError> {
    let holder = Holder::start("doctor", |post| {
        enter_namespace()?;
        let interfaces = interface::Interfaces::open()?;
        let (name, taps) = interface::attach("try", 1)?;
        interfaces.make_bridge("bridge")?;
        interfaces.add_port("bridge", &name)?;
        post.give(&taps)
    })?;
    holder.receive().map(drop)
}

/// Whether this process may add interfaces to the host's bridges.
pub(crate) fn may_change_host_network() -> bool {
    /// `linux/capability.h`.
    const CAP_NET_ADMIN: u32 = 12;
    crate::sandbox::caps::effective().is_ok_and(|set| set & (1 << CAP_NET_ADMIN) != 0)
}

/// What a TAP that could not be made is reported as.
pub(crate) fn not_made(field: &str, error: &NetError) -> Failure {
    let failure = Failure::host(format!("{field}: cannot make a TAP")).because(error);
    match error.is_of_the_host() {
        true => failure.hint("bulkhead doctor tells what is missing"),
        false => failure,
    }
}

impl NetError {
    /// The same in words, for who keeps the error.
    fn to_be_told(&self) -> Self {
        let words = crate::tell::chain(self);
        match self.is_of_the_host() {
            true => Self::Lacking(words),
            false => Self::Holder(words),
        }
    }

    /// Whether the host lacks, or does not permit, what every such TAP needs. (Else it may be what this one was
    /// to be: a number that the kernel does not take, a port that is taken.)
    fn is_of_the_host(&self) -> bool {
        match self {
            Self::Device(_) | Self::NotPermitted | Self::Lacking(_) => true,
            Self::Attach(e) | Self::Make(_, e) => !matches!(
                e.raw_os_error().map(Errno::from_raw),
                Some(Errno::EINVAL | Errno::ERANGE | Errno::EADDRNOTAVAIL | Errno::EADDRINUSE)
            ),
            _ => false,
        }
    }
}

fn no_existing_tap(field: &str, name: &str, error: &NetError) -> Failure {
    let hint = match error {
        NetError::Missing(_) => {
            "make it: sudo ip tuntap add NAME mode tap user \"$USER\"; or use user, which needs none"
        }
        NetError::Busy(_) => "another VM uses it: stop that, or give another TAP",
        _ => {
            "allow /dev/net/tun, or make the TAP with user \"$USER\" (with several queues: and \
             multi_queue)"
        }
    };
    Failure::host(format!("{field}.tap: cannot use the TAP '{name}'"))
        .because(error)
        .hint(hint)
}

fn no_inherited_tap(field: &str, fds: &[i32], error: &NetError) -> Failure {
    let hint = match error {
        NetError::BusyDescriptor => "give each NIC a TAP of its own",
        NetError::OtherFrames => "open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR",
        NetError::TwoTaps(..) => "give the queues of one TAP (IFF_MULTI_QUEUE)",
        _ => "start bulkhead with an open TAP at this number (TUNSETIFF done)",
    };
    let numbers: Vec<String> = fds.iter().map(i32::to_string).collect();
    Failure::host(format!(
        "{field}.tap-fd: cannot use descriptor {}",
        numbers.join(", ")
    ))
    .because(error)
    .hint(hint)
}

fn no_port(field: &str, bridge: &str, error: &NetError) -> Failure {
    let failure = Failure::host(format!("{field}.bridge: cannot add a TAP to '{bridge}'")).because(error);
    let hint = match error {
        NetError::NotPermitted => {
            "run as root, or grant it: sudo setcap cap_net_admin+ep bulkhead; user, \
             private and isolated need no root"
        }
        NetError::Device(_) => "sudo chmod 0666 /dev/net/tun, or run as root",
        NetError::Missing(_) | NetError::NoBridge(_) => {
            "make it: sudo ip link add BRIDGE type bridge && sudo ip link set BRIDGE up"
        }
        _ => return failure,
    };
    failure.hint(hint)
}

/// Opens the file of a capture, which keeps what it holds until [`Inputs::begin_captures`](super::inputs::Inputs::begin_captures).
pub(crate) fn open_pcap(field: &str, path: &Path) -> Result<File, Failure> {
    open_capture(OpenOptions::new().create(true).mode(0o600), path).map_err(|e| no_pcap(field, path, &e))
}

/// Whether it could be opened.
fn look_at_pcap(field: &str, path: &Path) -> Result<(), Failure> {
    match open_capture(&mut OpenOptions::new(), path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let modes = AccessFlags::W_OK | AccessFlags::X_OK;
            access(folder.unwrap_or(Path::new(".")), modes).map_err(Into::into)
        }
        opened => opened.map(drop),
    }
    .map_err(|e| no_pcap(field, path, &e))
}

fn open_capture(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    options
        .append(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
    let file = options.open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is not a regular file")),
    }
}

fn no_pcap(field: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::host(format!("{field}.pcap: cannot write {}", path.display())).because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_host_lacks_is_a_doctors_matter() {
        let make = |errno: Errno| NetError::Make("set the MTU", errno.into());
        for error in [make(Errno::EPERM), make(Errno::ENOSPC), NetError::NotPermitted] {
            assert!(not_made("net[0].private", &error).to_string().contains("doctor"));
        }
        let refused = NetError::Holder("passt refused: Failed to bind port 80".into());
        for error in [make(Errno::EINVAL), make(Errno::ERANGE), refused] {
            assert!(!not_made("net[0].private", &error).to_string().contains("hint"));
        }
    }
}
