//! The control queue (virtio 1.3, 5.1.6.5): pairs, what to receive, the MAC address, announcements.
//!
//! Each command is a class, a command and its data, then one writable byte for the answer. What is
//! unknown, too short, too long or out of range is answered by VIRTIO_NET_ERR. Only a table too long to
//! be read is taken for one that lets everything pass: a driver may need what it added.

use crate::address::MacAddress;
use crate::filter::Mode;
use crate::link::Link;
use crate::station::{Done, Station};
use crate::steering::Steering;
use std::sync::Arc;
use std::time::Instant;
use vhost_daemon::bucket::{Limiter, Rate};
use vhost_daemon::{Chain, QueueHandler, Ring, RingFault, Wait};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

/// Longest command that is read: two tables of some 300 addresses each.
const LONGEST: usize = 4096;
/// How often the driver may have the kernel asked, each time under its lock for all interfaces, and the front
/// end read the configuration anew. Far more than a driver needs that is not out to hold up its neighbours.
const ASKED: Rate = Rate {
    per_second: 100,
    burst: 32,
};
/// Bytes of an Ethernet address.
const ADDRESS: usize = 6;

/// A command that is whole and known.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Command {
    /// The driver uses so many pairs.
    Pairs(usize),
    /// A receive mode goes on or off.
    Receive(Mode, bool),
    /// Which addresses to receive, stations' and groups' together.
    Table(Vec<MacAddress>),
    /// More of them than are kept.
    LongTable,
    /// The guest's own address.
    Address(MacAddress),
    /// The guest has announced itself.
    Announced,
}

impl Command {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let [class, command, data @ ..] = bytes else {
            return None;
        };
        match (u32::from(*class), u32::from(*command), data) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, &[low, high]) => {
                Some(Self::Pairs(u16::from_le_bytes([low, high]).into()))
            }
            (VIRTIO_NET_CTRL_RX, _, &[on @ (0 | 1)]) => {
                Mode::from_command(*command).map(|mode| Self::Receive(mode, on == 1))
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, tables) => {
                let (mut addresses, rest) = table(tables)?;
                let (groups, rest) = table(rest)?;
                addresses.extend(groups);
                rest.is_empty().then_some(Self::Table(addresses))
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, address) => address
                .try_into()
                .ok()
                .map(|bytes| Self::Address(MacAddress(bytes))),
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, []) => Some(Self::Announced),
            _ => None,
        }
    }
}

/// The start of a command that goes on.
fn parse_long(bytes: &[u8]) -> Option<Command> {
    let table = [VIRTIO_NET_CTRL_MAC as u8, VIRTIO_NET_CTRL_MAC_TABLE_SET as u8];
    bytes.starts_with(&table).then_some(Command::LongTable)
}

/// One `struct virtio_net_ctrl_mac`, and what follows it.
fn table(bytes: &[u8]) -> Option<(Vec<MacAddress>, &[u8])> {
    let (count, rest) = bytes.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    // Before anything of that size is made: the count is the guest's.
    let (entries, rest) = rest.split_at_checked(count.checked_mul(ADDRESS)?)?;
    let (chunks, _) = entries.as_chunks::<ADDRESS>();
    Some((chunks.iter().copied().map(MacAddress).collect(), rest))
}

/// The control queue of one device.
pub struct ControlQueue {
    steering: Arc<Steering>,
    station: Arc<Station>,
    link: Arc<Link>,
    asked: Limiter,
}

impl ControlQueue {
    /// A control queue over these pairs, this station and this link.
    #[must_use]
    pub fn new(steering: Arc<Steering>, station: Arc<Station>, link: Arc<Link>) -> Self {
        Self {
            steering,
            station,
            link,
            asked: Limiter::new(Some(ASKED), None, Instant::now()),
        }
    }

    fn answer(&mut self, chain: &Chain) -> u32 {
        let mut bytes = [0; LONGEST];
        let whole = chain.readable_length() <= LONGEST;
        let length = chain.read_at(0, &mut bytes);
        let command = if whole {
            Command::parse(&bytes[..length])
        } else {
            parse_long(&bytes[..length])
        };
        let Some(command) = command else {
            return VIRTIO_NET_ERR;
        };
        let done = self.execute(command);
        // What is refused may have asked as well.
        for _ in 0..done.unwrap_or(1) {
            self.asked.passed(0);
        }
        if done.is_some() {
            VIRTIO_NET_OK
        } else {
            VIRTIO_NET_ERR
        }
    }

    /// Does what may change the configuration space. The front end's copy follows a moment after the answer,
    /// not before it as virtio 1.3, 5.1.6.5.2.1 has it: a wait for it would hold up the queue.
    fn with_station(&self, step: impl FnOnce(&Station) -> Done) -> Done {
        let before = self.station.mac();
        let done = step(&self.station);
        let changed = self.station.mac() != before;
        if changed {
            self.link.config_changed();
        }
        done.map(|asked| asked + usize::from(changed))
    }

    fn execute(&self, command: Command) -> Done {
        match command {
            Command::Pairs(pairs) => {
                let known = (1..=self.steering.pairs()).contains(&pairs);
                known.then(|| self.steering.set_active(pairs))
            }
            Command::Receive(mode, on) => self.station.set_mode(mode, on),
            Command::Table(addresses) => self.station.set_table(Some(addresses)),
            Command::LongTable => self.station.set_table(None),
            Command::Address(mac) => self.with_station(|station| station.set_mac(mac)),
            Command::Announced => {
                // As for the station: the front end's copy follows (5.1.6.5.4.2).
                self.link.announced();
                Some(0)
            }
        }
    }
}

impl QueueHandler for ControlQueue {
    fn start(&mut self, _features: u64) {}

    /// A driver starts with one pair and asks for more (virtio 1.3, 5.1.5), once.
    fn resume(&mut self, index: u16) {
        if index == 0 {
            self.steering.set_active(1);
            self.station.begin();
        } else {
            self.steering.resume();
            self.with_station(Station::resume);
        }
    }

    fn process(&mut self, ring: &mut Ring) -> Result<Wait, RingFault> {
        loop {
            if let Some(pause) = self.asked.wait(Instant::now) {
                return Ok(Wait {
                    available: false,
                    pause: Some(pause),
                    ..Wait::AVAILABLE
                });
            }
            let Some(chain) = ring.pop()? else {
                return Ok(Wait::AVAILABLE);
            };
            if chain.writable_length() == 0 {
                return Err(RingFault::Request("a control command has no room for its answer"));
            }
            let answer = self.answer(&chain) as u8;
            chain.write_at(0, &[answer]);
            ring.complete(chain, 1);
        }
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
