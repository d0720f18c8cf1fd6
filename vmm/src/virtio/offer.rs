//! What the guest is offered: the back end's features, queues and configuration space, less what
//! this transport does not carry, plus what the VM's description gives.

use super::device_type::DeviceType;
use crate::frontend::{Error, MAX_QUEUES, Session};
use std::ops::Range;
use virtio_bindings::{virtio_blk, virtio_config, virtio_net, virtio_ring};
use vm_spec::control::DeviceConfig;
use vm_spec::machine::MAX_QUEUE_SIZE;

/// Transport features that need nothing of the transport (virtio 1.3, 6). Not offered:
/// ACCESS_PLATFORM, RING_PACKED, SR_IOV, NOTIFICATION_DATA, NOTIF_CONFIG_DATA, RING_RESET and
/// ADMIN_VQ, and the legacy bits.
const TRANSPORT: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1
    | 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC
    | 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX
    | 1 << virtio_config::VIRTIO_F_IN_ORDER
    | 1 << virtio_config::VIRTIO_F_ORDER_PLATFORM;
/// Feature bits of the device type (virtio 1.3, 2.2).
const DEVICE: u64 = 0xFF_FFFF | !0 << 50;

/// Queues of a block device, where its spec says none.
const DEFAULT_BLOCK_QUEUES: u16 = 4;

const NET_MQ: u64 = 1 << virtio_net::VIRTIO_NET_F_MQ;
const NET_CTRL_VQ: u64 = 1 << virtio_net::VIRTIO_NET_F_CTRL_VQ;
/// VIRTIO_NET_F_HASH_TUNNEL.
const NET_F_HASH_TUNNEL: u32 = 51;
/// Features that require VIRTIO_NET_F_CTRL_VQ (virtio 1.3, 5.1.3.1), or are of use by it alone.
const NET_NEED_CTRL_VQ: u64 = NET_MQ
    | 1 << virtio_net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | 1 << virtio_net::VIRTIO_NET_F_CTRL_RX
    | 1 << virtio_net::VIRTIO_NET_F_CTRL_RX_EXTRA
    | 1 << virtio_net::VIRTIO_NET_F_CTRL_VLAN
    | 1 << virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE
    | 1 << virtio_net::VIRTIO_NET_F_CTRL_MAC_ADDR
    | 1 << NET_F_HASH_TUNNEL
    | 1 << virtio_net::VIRTIO_NET_F_VQ_NOTF_COAL
    | 1 << virtio_net::VIRTIO_NET_F_NOTF_COAL
    | 1 << virtio_net::VIRTIO_NET_F_HASH_REPORT
    | 1 << virtio_net::VIRTIO_NET_F_RSS;
const BLK_MQ: u64 = 1 << virtio_blk::VIRTIO_BLK_F_MQ;

/// Fields of `struct virtio_net_config` with the feature that makes each valid (5.1.4).
const NET_MAC: u64 = 1 << virtio_net::VIRTIO_NET_F_MAC;
const NET_STATUS: u64 = 1 << virtio_net::VIRTIO_NET_F_STATUS;
const NET_FIELDS: [(u64, Range<usize>); 6] = [
    (NET_MAC, 0..6),
    (NET_STATUS, 6..8),
    (1 << virtio_net::VIRTIO_NET_F_MTU, 10..12),
    (1 << virtio_net::VIRTIO_NET_F_SPEED_DUPLEX, 12..17),
    (1 << virtio_net::VIRTIO_NET_F_RSS, 17..24),
    (1 << virtio_net::VIRTIO_NET_F_HASH_REPORT, 17..24),
];
const NET_MAX_PAIRS: usize = 8;
const BLK_NUM_QUEUES: usize = 34;
/// VIRTIO_CONSOLE_F_MULTIPORT.
const CONSOLE_MULTIPORT: u64 = 1 << 1;
const CONSOLE_MAX_PORTS: Range<usize> = 4..8;

/// A device as the guest sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Offer {
    /// Feature bits.
    pub(super) features: u64,
    /// Configuration space.
    pub(super) config: Vec<u8>,
    /// Feature bits of the back end itself.
    pub(super) own_features: u64,
    /// The back end keeps (part of) the configuration space.
    pub(super) own_config: bool,
    /// Queues that the guest sees.
    pub(super) queues: u16,
    /// Queues, from 0, that the back end serves.
    pub(super) served: u16,
    /// Entries of a queue at most.
    pub(super) queue_size: u16,
}

/// Works out the offer from a fresh session.
pub(super) fn make(session: &mut Session, spec: &DeviceConfig) -> Result<Offer, Error> {
    let kind = DeviceType(spec.device_type);
    let mut features = session.features() & (TRANSPORT | DEVICE);
    let base = read_config(session, spec)?;
    if kind == DeviceType::NET {
        features &= !net_features_of_no_field(base.as_deref(), spec);
    }
    let mut offer = Offer {
        features: features | spec.config_features & DEVICE,
        own_features: features,
        own_config: base.is_some(),
        config: config(base, features, spec, kind),
        queues: 0,
        served: 0,
        queue_size: queue_size(spec),
    };
    let limit = session.queue_limit();
    offer.queues = match kind {
        DeviceType::NET => net_queues(&mut offer, spec.ours, limit),
        DeviceType::BLOCK => block_queues(&mut offer, spec.num_queues, limit),
        DeviceType::CONSOLE => console_queues(&mut offer),
        _ => {
            let by_back_end = || limit.map(|limit| limit.min(MAX_QUEUES.into()) as u16);
            let own = kind.queues(offer.features, &offer.config).or(spec.num_queues);
            own.or_else(by_back_end).unwrap_or(1).clamp(1, MAX_QUEUES)
        }
    };
    offer.served = match kind {
        // A net back end counts pairs, or queues, as its authors read the protocol.
        DeviceType::NET => offer.queues,
        _ => kind.served(offer.queues, limit)?,
    };
    Ok(offer)
}

fn queue_size(spec: &DeviceConfig) -> u16 {
    let sound = |size: &u16| size.is_power_of_two() && *size <= MAX_QUEUE_SIZE;
    let default = DeviceType(spec.device_type).queue_size();
    spec.queue_size.filter(sound).unwrap_or(default)
}

/// The back end's configuration space, or nothing. Of a type that is not known it is as long as the spec's.
pub(super) fn read_config(session: &mut Session, spec: &DeviceConfig) -> Result<Option<Vec<u8>>, Error> {
    let of_spec = [spec.config.len()];
    let sizes = DeviceType(spec.device_type).config_sizes().unwrap_or(&of_spec);
    if session.has_config() {
        for size in sizes.iter().filter(|size| **size > 0) {
            if let Some(config) = session.read_config(*size)? {
                return Ok(Some(config));
            }
        }
    }
    Ok(None)
}

/// Features that make a field valid which neither the back end nor the spec gives: an MTU of 0, say, is none.
fn net_features_of_no_field(base: Option<&[u8]>, spec: &DeviceConfig) -> u64 {
    let length = base.map_or(0, <[u8]>::len);
    let nobody_gives =
        |(feature, field): &(u64, Range<usize>)| field.end > length && spec.config_features & feature == 0;
    let fields = NET_FIELDS.into_iter().filter(nobody_gives);
    fields.fold(0, |all, (feature, _)| all | feature)
}

/// Puts the spec's configuration in place of, or (net) over, the back end's. The link's state is the
/// back end's own where it has one: it changes. So is the address with one of ours, which was given the
/// spec's: a driver may choose another (5.1.6.5.2).
fn config(base: Option<Vec<u8>>, own_features: u64, spec: &DeviceConfig, kind: DeviceType) -> Vec<u8> {
    match base {
        None => spec.config.clone(),
        Some(mut config) if kind == DeviceType::NET => {
            let changing = if spec.ours {
                NET_STATUS | NET_MAC
            } else {
                NET_STATUS
            };
            let from_spec = spec.config_features & !(own_features & changing);
            for (feature, field) in NET_FIELDS {
                if from_spec & feature != 0
                    && let Some(value) = spec.config.get(field.clone())
                {
                    config.resize(config.len().max(field.end), 0);
                    config[field].copy_from_slice(value);
                }
            }
            config
        }
        Some(config) => config,
    }
}

/// What is left to offer once a back end of these features serves the device.
pub(super) fn narrow(old: &Offer, features: u64, spec: &DeviceConfig) -> u64 {
    let mut left = old.features & (features | spec.config_features);
    if DeviceType(spec.device_type) == DeviceType::NET && left & NET_CTRL_VQ == 0 {
        left &= !NET_NEED_CTRL_VQ;
    }
    left
}

/// receiveq and transmitq for each pair, then controlq (5.1.2).
fn net_queues(offer: &mut Offer, ours: bool, limit: Option<u64>) -> u16 {
    // One that keeps no configuration space (DPDK's) expects the front end to serve the control
    // queue, and takes its ring for one of another pair: a driver's command would never be answered.
    if !ours && !offer.own_config {
        offer.features &= !NET_CTRL_VQ;
    }
    if offer.features & NET_CTRL_VQ == 0 {
        offer.features &= !NET_NEED_CTRL_VQ;
    }
    let mut pairs = 1;
    if offer.features & NET_MQ != 0 {
        // Where the back end counts queues this is too many pairs, which its own
        // max_virtqueue_pairs corrects.
        let most = u64::from(MAX_QUEUES / 2 - 1).min(limit.unwrap_or(1)) as u16;
        pairs = half_word(&offer.config, NET_MAX_PAIRS).clamp(1, most.max(1));
        put_half_word(&mut offer.config, NET_MAX_PAIRS, pairs);
    }
    if pairs == 1 {
        offer.features &= !NET_MQ;
    }
    2 * pairs + u16::from(offer.features & NET_CTRL_VQ != 0)
}

/// Request queues: as asked, as many as the back end has, one where it has no VIRTIO_BLK_F_MQ.
fn block_queues(offer: &mut Offer, asked: Option<u16>, limit: Option<u64>) -> u16 {
    let mut queues = 1;
    if offer.features & BLK_MQ != 0 {
        let own = half_word(&offer.config, BLK_NUM_QUEUES).clamp(1, MAX_QUEUES);
        let most = limit.unwrap_or(1).min(own.into()) as u16;
        queues = asked.unwrap_or(DEFAULT_BLOCK_QUEUES).clamp(1, most.max(1));
    }
    if queues == 1 {
        offer.features &= !BLK_MQ;
    }
    put_half_word(&mut offer.config, BLK_NUM_QUEUES, queues);
    queues
}

/// receiveq and transmitq of each port, and with VIRTIO_CONSOLE_F_MULTIPORT two for control (5.3.2). The
/// driver counts the ports itself.
fn console_queues(offer: &mut Offer) -> u16 {
    if offer.features & CONSOLE_MULTIPORT == 0 {
        return 2;
    }
    let Some(place) = offer.config.get_mut(CONSOLE_MAX_PORTS) else {
        offer.features &= !CONSOLE_MULTIPORT;
        return 2;
    };
    let most = u32::from(MAX_QUEUES / 2 - 1);
    let ports = place
        .iter()
        .rev()
        .fold(0, |high, low| high << 8 | u32::from(*low));
    let ports = ports.clamp(1, most);
    place.copy_from_slice(&ports.to_le_bytes());
    2 + 2 * ports as u16
}

fn half_word(config: &[u8], offset: usize) -> u16 {
    config
        .get(offset..offset + 2)
        .map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
}

fn put_half_word(config: &mut [u8], offset: usize, value: u16) {
    if let Some(place) = config.get_mut(offset..offset + 2) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

/// Keeps what the guest was promised when the back end's configuration is read again: a changed
/// space must not change the number of queues.
pub(super) fn refresh(old: &Offer, base: Vec<u8>, spec: &DeviceConfig) -> Vec<u8> {
    let kind = DeviceType(spec.device_type);
    let mut new = config(Some(base), old.own_features, spec, kind);
    new.resize(old.config.len(), 0);
    let fixed = match kind {
        DeviceType::NET if old.features & NET_MQ != 0 => NET_MAX_PAIRS..NET_MAX_PAIRS + 2,
        DeviceType::BLOCK => BLK_NUM_QUEUES..BLK_NUM_QUEUES + 2,
        DeviceType::CONSOLE if old.features & CONSOLE_MULTIPORT != 0 => CONSOLE_MAX_PORTS,
        _ => return new,
    };
    if let (Some(place), Some(promised)) = (new.get_mut(fixed.clone()), old.config.get(fixed)) {
        place.copy_from_slice(promised);
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_that_of_a_back_end_of_ours() {
        let spec = |ours| DeviceConfig {
            device_type: DeviceType::NET.0,
            config: vec![7; 6],
            config_features: NET_MAC,
            ours,
            ..crate::virtio::rig::spec()
        };
        let read = |own_features, ours| config(Some(vec![9; 6]), own_features, &spec(ours), DeviceType::NET);
        assert_eq!(read(NET_MAC, true), [9; 6]);
        assert_eq!(read(0, true), [7; 6]);
        assert_eq!(read(NET_MAC, false), [7; 6]);
    }

    #[test]
    fn the_links_state_is_the_back_ends_where_it_has_one() {
        let spec = DeviceConfig {
            device_type: DeviceType::NET.0,
            config: [[7; 6].as_slice(), &[1, 0]].concat(),
            config_features: NET_STATUS | 1 << virtio_net::VIRTIO_NET_F_MAC,
            ..crate::virtio::rig::spec()
        };
        let down = Some(vec![0; 12]);
        let own = config(down.clone(), NET_STATUS, &spec, DeviceType::NET);
        assert_eq!(own, [7, 7, 7, 7, 7, 7, 0, 0, 0, 0, 0, 0]);
        let old = Offer {
            features: 0,
            own_features: NET_STATUS,
            own_config: true,
            config: own,
            queues: 2,
            served: 2,
            queue_size: 256,
        };
        assert_eq!(
            refresh(&old, vec![0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0], &spec)[6],
            1
        );
        let without = config(down, 0, &spec, DeviceType::NET);
        assert_eq!(without, [7, 7, 7, 7, 7, 7, 1, 0, 0, 0, 0, 0]);
    }
}
