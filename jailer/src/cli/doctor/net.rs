//! What the network modes need.

use super::{Finding, Level};
use crate::launch::net::{self, Passt};

/// `user`.
pub(super) fn passt() -> Finding {
    let name = "passt";
    match Passt::find() {
        Some(passt) => {
            let how = if passt.has_vhost_user() {
                "serves a guest's queues itself (vhost-user)"
            } else {
                "by its stream socket, as this version has no --vhost-user"
            };
            let place = passt.path().display();
            Finding::good(name, format!("{place}, {}: {how}", passt.version()))
        }
        None => Finding::bad(
            name,
            Level::Note,
            "not installed: no NIC with user",
            "sudo apt install passt",
        ),
    }
}

/// `private`, `isolated` and `user`: a TAP and a bridge in a namespace of one's own.
pub(super) fn private_bridge() -> Finding {
    let name = "private networks";
    match net::try_private_bridge() {
        Ok(()) => Finding::good(name, "a TAP and a bridge can be made without root"),
        Err(error) => Finding::bad(
            name,
            Level::Note,
            format!(
                "{}: no NIC with user, isolated or private",
                crate::tell::chain(&error)
            ),
            "sudo modprobe tun && sudo modprobe bridge && sudo chmod 0666 /dev/net/tun",
        ),
    }
}

/// `bridge`.
pub(super) fn host_bridge() -> Finding {
    let name = "host bridges";
    if net::may_change_host_network() {
        Finding::good(name, "a TAP can be added to a bridge of the host")
    } else {
        Finding::bad(
            name,
            Level::Note,
            "not permitted: no NIC with bridge",
            "run as root, or: sudo setcap cap_net_admin+ep \"$(command -v bulkhead)\"",
        )
    }
}
