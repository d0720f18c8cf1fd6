//! From a [`NetSpec`] to what is meant: alternatives told apart, every key checked. Pure.

use super::super::machine::{Backend, Device, Remote, check_limit};
use crate::failure::Failure;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use vm_spec::net::NetSpec;

/// VIRTIO_NET_F_MTU (virtio 1.3, 5.1.3).
const NET_F_MTU: u64 = 1 << 3;
/// VIRTIO_NET_F_MAC.
const NET_F_MAC: u64 = 1 << 5;
/// VIRTIO_NET_F_STATUS.
const NET_F_STATUS: u64 = 1 << 16;
/// Most pairs of queues that vhost-user-net serves.
const MOST_QUEUES: u16 = 8;
/// Most addresses that vhost-user-net's guard takes.
const MOST_ADDRESSES: usize = 64;
/// Most ports that a NIC publishes.
const MOST_PUBLISHED: usize = 64;

/// A NIC that vhost-user-net serves.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Nic {
    pub(crate) wire: Wire,
    pub(crate) mac: Mac,
    pub(crate) mtu: Option<u16>,
    /// Pairs of queues.
    pub(crate) queues: u16,
    pub(crate) pcap: Option<PathBuf>,
    /// Further flags of the device process: guard, addresses, limits.
    pub(crate) flags: Vec<String>,
}

impl Nic {
    /// No key asks for what only vhost-user-net does.
    pub(super) fn asks_nothing_of_us(&self) -> bool {
        self.flags.is_empty() && self.pcap.is_none() && self.queues == 1
    }
}

/// Where a NIC's frames go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Wire {
    /// An existing TAP.
    Name(String),
    /// Descriptors of an existing TAP.
    Inherited(Vec<i32>),
    /// A bridge of the host.
    Bridge(String),
    /// passt.
    User(Vec<Publish>),
    /// A segment of this user's VMs.
    Isolated(String),
    /// A network namespace of its own; the host side has this address.
    Private(Ipv4Addr, u8),
}

/// A port of the host that leads to the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Publish {
    pub(crate) address: Option<IpAddr>,
    pub(crate) host: u16,
    pub(crate) guest: u16,
    pub(crate) udp: bool,
}

/// A MAC address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mac(pub(crate) [u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The device that `net` describes; `vm` is the VM's name, and `n` the NIC's place.
pub(crate) fn check(vm: &str, n: usize, net: &NetSpec) -> Result<Device, Failure> {
    let field = format!("net[{n}]");
    let id = net.id.clone().unwrap_or(format!("net{n}"));
    let mac = match &net.mac {
        None => derived_mac(vm, &id),
        Some(text) => parse_mac(text).ok_or_else(|| {
            Failure::usage(format!("{field}.mac: '{text}' is no unicast MAC address"))
                .hint("write six bytes such as 02:00:00:00:00:01")
        })?,
    };
    if let Some(mtu) = net.mtu.filter(|mtu| *mtu < 68) {
        return Err(Failure::usage(format!("{field}.mtu: {mtu} is below 68")));
    }
    let queues = net.queues.unwrap_or(1);
    if !(1..=MOST_QUEUES).contains(&queues) {
        return Err(Failure::usage(format!(
            "{field}.queues: {queues} is not between 1 and {MOST_QUEUES}"
        )));
    }
    let wire = check_wire(&field, net)?;
    let flags = check_flags(&field, net)?;
    let backend = match (wire, &net.vhost_user) {
        (Some(wire), None) => Backend::Net(Nic {
            wire,
            mac,
            mtu: net.mtu,
            queues,
            pcap: net.pcap.clone(),
            flags,
        }),
        (None, Some(_)) if !flags.is_empty() || net.pcap.is_some() => {
            return Err(
                Failure::usage(format!("{field}.vhost-user: excludes guard, ip, pcap and limits"))
                    .cause("another's process serves this NIC"),
            );
        }
        (None, Some(socket)) => Backend::External(Remote::at(socket)),
        _ => return Err(one_of(&field)),
    };
    // struct virtio_net_config: mac, status (link up), max_virtqueue_pairs, mtu.
    let mut config = mac.0.to_vec();
    for value in [1u16, queues, net.mtu.unwrap_or(0)] {
        config.extend(value.to_le_bytes());
    }
    Ok(Device {
        id,
        field,
        slot: net.slot.unwrap_or(0),
        device_type: 1,
        num_queues: None,
        config,
        config_features: NET_F_MAC | NET_F_STATUS | net.mtu.map_or(0, |_| NET_F_MTU),
        backend,
    })
}

fn one_of(field: &str) -> Failure {
    Failure::usage(format!(
        "{field}: give exactly one of user, tap, tap-fd, bridge, isolated, private and vhost-user"
    ))
}

fn check_wire(field: &str, net: &NetSpec) -> Result<Option<Wire>, Failure> {
    let mut wires = Vec::new();
    wires.extend(net.tap.clone().map(Wire::Name));
    wires.extend(net.bridge.clone().map(Wire::Bridge));
    if !net.tap_fd.is_empty() {
        wires.push(Wire::Inherited(net.tap_fd.clone()));
    }
    if net.user {
        wires.push(Wire::User(check_publish(field, &net.publish)?));
    } else if !net.publish.is_empty() {
        return Err(Failure::usage(format!("{field}.publish: needs user")));
    }
    if let Some(name) = &net.isolated {
        super::super::machine::check_name(&format!("{field}.isolated"), name)?;
        wires.push(Wire::Isolated(name.clone()));
    }
    if let Some(address) = &net.private {
        wires.push(parse_private(field, address)?);
    }
    let wire = wires.pop();
    if !wires.is_empty() || (wire.is_some() && net.vhost_user.is_some()) {
        return Err(one_of(field));
    }
    if let Some(Wire::Inherited(fds)) = &wire
        && fds.len() != usize::from(net.queues.unwrap_or(1))
    {
        return Err(Failure::usage(format!(
            "{field}.tap-fd: {} descriptors for {} pairs of queues",
            fds.len(),
            net.queues.unwrap_or(1)
        ))
        .hint("give one for each pair"));
    }
    Ok(wire)
}

fn check_publish(field: &str, texts: &[String]) -> Result<Vec<Publish>, Failure> {
    if texts.len() > MOST_PUBLISHED {
        return Err(Failure::usage(format!(
            "{field}.publish: more than {MOST_PUBLISHED} ports"
        )));
    }
    let wrong = |text| {
        Failure::usage(format!("{field}.publish: '{text}' names no ports"))
            .hint("write HOST:GUEST, such as 8080:80, 127.0.0.1:8080:80 or 5353:53/udp")
    };
    texts
        .iter()
        .map(|text| parse_publish(text).ok_or_else(|| wrong(text)))
        .collect()
}

fn parse_publish(text: &str) -> Option<Publish> {
    let (ports, udp) = match text.rsplit_once('/') {
        None | Some((_, "tcp")) => (text.strip_suffix("/tcp").unwrap_or(text), false),
        Some((ports, "udp")) => (ports, true),
        Some(_) => return None,
    };
    let (rest, guest) = ports.rsplit_once(':')?;
    let (address, host) = match rest.rsplit_once(':') {
        None => (None, rest),
        Some((address, host)) => {
            let address = address.trim_start_matches('[').trim_end_matches(']');
            (Some(address.parse().ok()?), host)
        }
    };
    let port = |text: &str| number(text).filter(|port| *port != 0);
    Some(Publish {
        address,
        host: port(host)?,
        guest: port(guest)?,
        udp,
    })
}

/// A number in digits alone: no sign, which Rust would take.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

/// The guard's and the limits' flags, only where they differ from what vhost-user-net does anyway.
fn check_flags(field: &str, net: &NetSpec) -> Result<Vec<String>, Failure> {
    let mut flags = Vec::new();
    if net.guard == Some(false) && !net.ip.is_empty() {
        return Err(Failure::usage(format!(
            "{field}.ip: has no effect with guard=off"
        )));
    }
    if net.ip.len() > MOST_ADDRESSES {
        return Err(Failure::usage(format!(
            "{field}.ip: more than {MOST_ADDRESSES} addresses"
        )));
    }
    flags.extend(
        net.guard
            .map(|on| format!("--guard={}", if on { "on" } else { "off" })),
    );
    for text in &net.ip {
        if !is_prefix(text) {
            return Err(
                Failure::usage(format!("{field}.ip: '{text}' is no address or prefix"))
                    .hint("write 10.0.0.2, 10.0.0.0/24 or 2001:db8::/64"),
            );
        }
        flags.push(format!("--ip={text}"));
    }
    let directions = [
        (
            "receive",
            [net.receive_packets, net.receive_packets_burst],
            [net.receive_bytes, net.receive_bytes_burst],
        ),
        (
            "transmit",
            [net.transmit_packets, net.transmit_packets_burst],
            [net.transmit_bytes, net.transmit_bytes_burst],
        ),
    ];
    for (direction, packets, bytes) in directions {
        let mut parts = Vec::new();
        for (unit, [rate, burst]) in [("packets", packets), ("bytes", bytes)] {
            check_limit(&format!("{field}.{direction}-{unit}"), rate, burst)?;
            parts.extend(rate.map(|n| format!("{unit}={}", n.0)));
            parts.extend(burst.map(|n| format!("{unit}-burst={}", n.0)));
        }
        if !parts.is_empty() {
            flags.push(format!("--{direction}-limit={}", parts.join(",")));
        }
    }
    Ok(flags)
}

fn is_prefix(text: &str) -> bool {
    let (address, bits) = match text.split_once('/') {
        None => (text, None),
        Some((address, bits)) => (address, Some(bits)),
    };
    let Ok(address) = address.parse::<IpAddr>() else {
        return false;
    };
    let most = if address.is_ipv4() { 32 } else { 128 };
    bits.is_none_or(|bits| number::<u8>(bits).is_some_and(|bits| bits <= most))
}

fn parse_private(field: &str, text: &str) -> Result<Wire, Failure> {
    text.split_once('/')
        .and_then(|(address, prefix)| {
            let prefix = number(prefix).filter(|p| (1..=30).contains(p))?;
            Some(Wire::Private(address.parse().ok()?, prefix))
        })
        .ok_or_else(|| {
            Failure::usage(format!("{field}.private: '{text}' is no address with a prefix"))
                .hint("write the host side's IPv4 address, such as 10.0.0.1/24")
        })
}

fn parse_mac(text: &str) -> Option<Mac> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next().filter(|p| p.len() == 2 && !p.starts_with('+'))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let unicast = bytes[0] & 1 == 0 && bytes != [0; 6];
    (parts.next().is_none() && unicast).then_some(Mac(bytes))
}

/// Locally administered, the same at each start (FNV-1a over both names).
fn derived_mac(vm: &str, id: &str) -> Mac {
    let hash = [vm.as_bytes(), b"/", id.as_bytes()]
        .concat()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        });
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    Mac([0x02, a, b, c, d, e])
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_spec::size::ByteSize;

    fn nic(net: &NetSpec) -> Nic {
        match check("vm", 0, net).unwrap().backend {
            Backend::Net(nic) => nic,
            other => panic!("{other:?}"),
        }
    }

    fn refusal(net: &NetSpec) -> String {
        check("vm", 0, net).unwrap_err().to_string()
    }

    fn user() -> NetSpec {
        NetSpec {
            user: true,
            ..NetSpec::default()
        }
    }

    #[test]
    fn exactly_one_mode_is_given() {
        assert!(refusal(&NetSpec::default()).contains("exactly one of"));
        let two = NetSpec {
            isolated: Some("lab".into()),
            ..user()
        };
        assert!(refusal(&two).contains("exactly one of"));
        let with_socket = NetSpec {
            vhost_user: Some("/s".into()),
            ..user()
        };
        assert!(refusal(&with_socket).contains("exactly one of"));
        let bridge = NetSpec {
            bridge: Some("br0".into()),
            ..NetSpec::default()
        };
        assert_eq!(nic(&bridge).wire, Wire::Bridge("br0".into()));
    }

    #[test]
    fn published_ports_have_an_address_and_a_protocol() {
        let published = |text: &str| match nic(&NetSpec {
            publish: vec![text.into()],
            ..user()
        })
        .wire
        {
            Wire::User(mut publish) => publish.pop(),
            _ => None,
        };
        let plain = published("8080:80").unwrap();
        assert_eq!((plain.host, plain.guest, plain.udp), (8080, 80, false));
        assert!(published("5353:53/udp").unwrap().udp);
        let address = published("[::1]:8080:80/tcp").unwrap().address;
        assert_eq!(address, Some("::1".parse().unwrap()));
        for bad in ["80", "0:80", "80:70000", "x:1:2", "1:2/sctp", "+80:80", "80:+80"] {
            let net = NetSpec {
                publish: vec![bad.into()],
                ..user()
            };
            assert!(refusal(&net).contains("names no ports"), "{bad}");
        }
        let nowhere = NetSpec {
            tap: Some("t".into()),
            publish: vec!["1:2".into()],
            ..NetSpec::default()
        };
        assert!(refusal(&nowhere).contains("needs user"));
    }

    #[test]
    fn numbers_have_no_sign() {
        assert_eq!(parse_mac("+2:00:00:00:00:01"), None);
        assert!(parse_mac("02:00:00:00:00:01").is_some());
        assert!(is_prefix("10.0.0.0/24") && !is_prefix("10.0.0.0/+24"));
        assert!(parse_private("net[0]", "10.0.0.1/24").is_ok());
        assert!(parse_private("net[0]", "10.0.0.1/+24").is_err());
    }

    #[test]
    fn what_our_process_has_to_do_becomes_its_flags() {
        let net = NetSpec {
            ip: vec!["10.0.0.2".into(), "2001:db8::/64".into()],
            guard: Some(true),
            receive_packets: Some(ByteSize(1000)),
            receive_bytes: Some(ByteSize(1 << 20)),
            receive_bytes_burst: Some(ByteSize(4096)),
            ..user()
        };
        let wanted = [
            "--guard=on",
            "--ip=10.0.0.2",
            "--ip=2001:db8::/64",
            "--receive-limit=packets=1000,bytes=1048576,bytes-burst=4096",
        ];
        assert_eq!(nic(&net).flags, wanted);
        assert!(!nic(&net).asks_nothing_of_us());
        assert!(nic(&user()).asks_nothing_of_us());
    }

    #[test]
    fn contradictions_name_their_key() {
        let cases = [
            (
                NetSpec {
                    guard: Some(false),
                    ip: vec!["10.0.0.2".into()],
                    ..user()
                },
                "net[0].ip",
            ),
            (
                NetSpec {
                    ip: vec!["10.0.0.2/33".into()],
                    ..user()
                },
                "net[0].ip",
            ),
            (
                NetSpec {
                    transmit_bytes_burst: Some(ByteSize(1)),
                    ..user()
                },
                "net[0].transmit-bytes-burst",
            ),
            (
                NetSpec {
                    queues: Some(9),
                    ..user()
                },
                "net[0].queues",
            ),
            (
                NetSpec {
                    tap_fd: vec![5],
                    queues: Some(2),
                    ..NetSpec::default()
                },
                "net[0].tap-fd",
            ),
        ];
        for (net, key) in cases {
            assert!(refusal(&net).contains(key), "{key}: {}", refusal(&net));
        }
    }
}
