//! What the launcher orders of a probe: the text of its `argv[0]`, the one argument that no
//! binary interprets.

use super::wall::Removed;
use crate::sandbox::Role;
use std::path::PathBuf;

const MARK: &str = "bulkhead-probe";

/// One attack of one probe, and the things on the host that attacks aim at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Order {
    /// Who tries.
    pub role: Role,
    /// The attack's name in the catalogue.
    pub attack: String,
    /// Walls that the probe does not build.
    pub removed: Removed,
    /// Descriptor that the outcome is written to; the next one is a terminal of the audit's own.
    pub report: i32,
    /// A process that does nothing, by its id on the host.
    pub victim: i32,
    /// Address of a word in the victim's memory.
    pub secret: usize,
    /// TCP port on 127.0.0.1 where the audit listens; also in its abstract socket's name.
    pub port: u16,
    /// The audit's folder: `secret`, a file, and `socket`, a listener.
    pub folder: PathBuf,
}

impl Order {
    /// As `argv[0]`.
    pub fn to_argument(&self) -> String {
        format!(
            "{MARK}:{}:{}:{}:{}:{}:{}:{}:{}",
            self.role,
            self.attack,
            self.removed.bits(),
            self.report,
            self.victim,
            self.secret,
            self.port,
            self.folder.display()
        )
    }

    /// From `argv[0]`; `None` where it is a program's name.
    pub fn parse(argument: &str) -> Option<Self> {
        let mut parts = argument.splitn(9, ':');
        if parts.next() != Some(MARK) {
            return None;
        }
        Some(Self {
            role: parts.next()?.parse().ok()?,
            attack: parts.next()?.to_owned(),
            removed: Removed::from_bits(parts.next()?.parse().ok()?),
            report: parts.next()?.parse().ok()?,
            victim: parts.next()?.parse().ok()?,
            secret: parts.next()?.parse().ok()?,
            port: parts.next()?.parse().ok()?,
            folder: parts.next()?.into(),
        })
    }

    /// The name of the audit's abstract socket, without its leading zero byte.
    pub fn abstract_name(port: u16) -> String {
        format!("bulkhead-audit-{port}")
    }
}

/// First byte of a report: the attack is about to be tried.
pub const BEGUN: u8 = b'B';
/// Exit code of a host program that an attack managed to execute.
pub const EXECUTED: i32 = 42;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_survives_the_way() {
        let order = Order {
            role: Role::Vcpu,
            attack: "open".into(),
            removed: Removed::ALL,
            report: 9,
            victim: 77,
            secret: 0x7000_0000_1234,
            port: 65535,
            folder: "/tmp/a:b".into(),
        };
        assert_eq!(Order::parse(&order.to_argument()), Some(order));
        assert_eq!(Order::parse("vhost-user-blk"), None);
    }
}
