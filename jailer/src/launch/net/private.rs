//! A TAP in a network namespace of its own, which needs no root: whoever enters the namespace (its
//! holder's) reaches the guest.

use super::holder::{Holder, Post, enter_namespace};
use super::settings::Nic;
use super::{NetError, interface};
use crate::sandbox::leave_paths;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

/// The name of the TAP in its namespace.
const NAME: &str = "tap0";

/// Starts the making of a TAP whose host side has `address` and is up.
pub(super) fn start(field: &str, nic: &Nic, address: Ipv4Addr, prefix: u8) -> Result<Holder, NetError> {
    let (queues, mtu) = (nic.queues, nic.mtu);
    Holder::start(format!("{field}.private"), move |post: &Post| {
        post.give(&make(queues, mtu, address, prefix)?)?;
        // It reads nothing that anyone sends: where the kernel refuses, it stays as it is.
        let _ = leave_paths();
        post.retire(&[]);
        post.stay();
        Ok(())
    })
}

fn make(queues: u16, mtu: Option<u16>, address: Ipv4Addr, prefix: u8) -> Result<Vec<OwnedFd>, NetError> {
    enter_namespace()?;
    // Opened inside: a descriptor from outside belongs to the network namespace it came from.
    let (_, taps) = interface::attach(NAME, queues)?;
    let interfaces = interface::Interfaces::open()?;
    if let Some(mtu) = mtu {
        interfaces.set_mtu(NAME, mtu.into())?;
    }
    interfaces.set_address(NAME, address, prefix)?;
    interfaces.up(NAME)?;
    interfaces.up("lo")?;
    Ok(taps)
}
