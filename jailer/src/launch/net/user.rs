//! `user`: outbound connections, DHCP and DNS without root, by passt.
//!
//! passt looks at what crosses it, and opens the host's own sockets in the guest's place. Where it
//! cannot serve the guest's queues itself, vhost-user-net keeps its TAP, in a namespace that has
//! nothing else: a bridge joins it to a second one, which the relay reads for passt.
//!
//! ```text
//!  guest -- vhost-user-net -- TAP -- bridge -- TAP -- relay -- passt -- the host's sockets
//! ```
//! The bridge, as the kernel's, cuts UDP super-frames, which a stream of frames cannot express.

use super::holder::{Holder, Post, enter_namespace};
use super::passt::{Passt, Speech};
use super::relay::Relay;
use super::settings::{Nic, Publish};
use super::{NetError, interface, not_made};
use crate::failure::Failure;
use crate::launch::{Jail, Options};
use crate::sandbox::{Role, leave_paths, lockdown};
use crate::tell::tell;
use std::os::fd::{AsRawFd, OwnedFd};

const GUEST_TAP: &str = "guest";
const PASST_TAP: &str = "passt";
const BRIDGE: &str = "wire";
/// passt offers the guest this one by DHCP unless it is told another.
const MTU: u16 = 65520;

/// Starts the making of the TAP, passt and the relay, which is given another passt over `line`.
pub(super) fn start(
    field: &str,
    nic: &Nic,
    publish: &[Publish],
    options: &Options,
    line: Option<OwnedFd>,
) -> Result<Holder, Failure> {
    let field = format!("{field}.user");
    let passt = find(&field)?;
    let (queues, mtu) = (nic.queues, nic.mtu);
    let name = field.clone();
    Holder::start(field.clone(), move |post: &Post| {
        // In the host's network namespace.
        let stream = passt.start(Speech::Stream, publish, mtu)?;
        let (taps, inner) = make(queues, mtu.unwrap_or(MTU))?;
        // It reads what the guest writes: before there is a guest it is where the jailed are.
        let jailed = options.jail == Jail::On;
        if jailed {
            leave_paths().map_err(|e| NetError::Make("leave the host's paths", e))?;
        }
        post.give(&taps)?;
        drop(taps);
        let others = [&inner, &stream].into_iter().chain(&line).map(AsRawFd::as_raw_fd);
        post.retire(&others.chain([libc::STDERR_FILENO]).collect::<Vec<_>>());
        let relay = Relay::new(&inner, stream, line);
        let locked = jailed.then(|| lockdown(Role::Relay, options.seccomp)).transpose();
        match locked {
            Ok(locked) => relay.run(post.socket(), locked.as_ref()),
            Err(e) => {
                let why = crate::tell::chain(&e);
                tell(format_args!(
                    "bulkhead: the relay of {name} cannot be confined: {why}"
                ));
                Ok(())
            }
        }
    })
    .map_err(|e| not_made(&field, &e))
}

/// Starts a passt that serves the guest's queues; our end of its socket.
pub(crate) fn serve(
    field: &str,
    passt: &Passt,
    publish: &[Publish],
    mtu: Option<u16>,
) -> Result<OwnedFd, Failure> {
    passt
        .start(Speech::VhostUser, publish, mtu)
        .map_err(|e| Failure::host(format!("{field}.user: cannot start passt")).because(&e))
}

/// Starts a passt for a relay that has lost its own; our end of its socket.
pub(super) fn start_again(field: &str, nic: &Nic, publish: &[Publish]) -> Result<OwnedFd, Failure> {
    let field = format!("{field}.user");
    find(&field)?
        .start(Speech::Stream, publish, nic.mtu)
        .map_err(|e| Failure::host(format!("{field}: cannot start passt")).because(&e))
}

pub(super) fn find(field: &str) -> Result<Passt, Failure> {
    Passt::find().ok_or_else(|| {
        Failure::host(format!("{field}: passt is not installed")).hint("sudo apt install passt")
    })
}

fn make(queues: u16, mtu: u16) -> Result<(Vec<OwnedFd>, OwnedFd), NetError> {
    enter_namespace()?;
    interface::keep_quiet();
    let (_, taps) = interface::attach(GUEST_TAP, queues)?;
    let (_, inner) = interface::attach(PASST_TAP, 1)?;
    let inner = inner.into_iter().next().ok_or(NetError::NotPermitted)?;
    interface::take_unfinished_tcp(&inner)?;
    let interfaces = interface::Interfaces::open()?;
    interfaces.make_bridge(BRIDGE)?;
    for name in [GUEST_TAP, PASST_TAP] {
        interfaces.set_mtu(name, mtu.into())?;
        interfaces.add_port(BRIDGE, name)?;
        interfaces.up(name)?;
    }
    interfaces.up(BRIDGE)?;
    Ok((taps, inner))
}
