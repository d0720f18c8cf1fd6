//! A network interface, as a person writes it.

use crate::size::ByteSize;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use std::path::PathBuf;

/// Bytes of an interface's name (IFNAMSIZ, less its end).
const LONGEST_NAME: usize = 15;

/// A network interface: exactly one of `tap`, `tap-fd`, `bridge`, `user`, `isolated`, `private`,
/// `vhost-user`.
#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetSpec {
    /// Name in messages; default `net0`, `net1` and so on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// An existing TAP, by name.
    #[cfg_attr(test, schemars(with = "Option<String>", length(max = LONGEST_NAME)))]
    #[serde(deserialize_with = "interface", skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// An existing TAP, by inherited file descriptor: one for each pair of queues. Should it vanish and return, it
    /// is found again only in the launcher's own network namespace and with CAP_NET_ADMIN.
    #[cfg_attr(test, schemars(with = "OneOrMore<i32>"))]
    #[serde(deserialize_with = "one_or_more", skip_serializing_if = "Vec::is_empty")]
    pub tap_fd: Vec<i32>,
    /// A bridge of the host, to which the launcher adds a TAP that it makes; needs CAP_NET_ADMIN.
    #[cfg_attr(test, schemars(with = "Option<String>", length(max = LONGEST_NAME)))]
    #[serde(deserialize_with = "interface", skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// Outbound connections, DHCP and DNS by passt, without root.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub user: bool,
    /// Ports of the host that lead to the guest, with `user`:
    /// `[ADDRESS:]HOST-PORT:GUEST-PORT[/tcp|/udp]`.
    #[cfg_attr(test, schemars(with = "OneOrMore<String>"))]
    #[serde(deserialize_with = "one_or_more", skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<String>,
    /// A segment of this name, which all VMs of this user that name it share, and nobody else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isolated: Option<String>,
    /// A TAP that the launcher makes in a network namespace of its own, without root; the value
    /// is the host side's address, such as `10.0.0.1/24`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub private: Option<String>,
    /// Socket of a vhost-user-net back end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_user: Option<PathBuf>,
    /// MAC address; default: locally administered, derived from the VM's name and the NIC's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Addresses or prefixes, IPv4 or IPv6, that the guest may use; default: any.
    #[cfg_attr(test, schemars(with = "OneOrMore<String>"))]
    #[serde(deserialize_with = "one_or_more", skip_serializing_if = "Vec::is_empty")]
    pub ip: Vec<String>,
    /// Refuse frames from other addresses than the guest's; default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guard: Option<bool>,
    /// Maximum transmission unit offered to the guest, 68 to 65535.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to 8; default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Most packets a second to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receive_packets: Option<ByteSize>,
    /// Packets that may come at once; default a tenth of a second's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receive_packets_burst: Option<ByteSize>,
    /// Most bytes a second to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receive_bytes: Option<ByteSize>,
    /// Bytes that may come at once; default a tenth of a second's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receive_bytes_burst: Option<ByteSize>,
    /// Most packets a second from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transmit_packets: Option<ByteSize>,
    /// Packets that may go at once; default a tenth of a second's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transmit_packets_burst: Option<ByteSize>,
    /// Most bytes a second from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transmit_bytes: Option<ByteSize>,
    /// Bytes that may go at once; default a tenth of a second's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transmit_bytes_burst: Option<ByteSize>,
    /// A file for a capture of the guest's frames (pcap); an existing one is emptied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pcap: Option<PathBuf>,
    /// PCI device number, 1 to 31.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
}

fn interface<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    match Option::<String>::deserialize(deserializer)? {
        Some(name) if name.len() > LONGEST_NAME => Err(D::Error::custom(format!(
            "'{name}' has {} bytes, and an interface's name at most {LONGEST_NAME}",
            name.len()
        ))),
        name => Ok(name),
    }
}

/// A list, or its only item.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(inline))]
#[serde(untagged, expecting = "invalid type, expected one value, or a list of such")]
enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

fn one_or_more<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(match OneOrMore::deserialize(deserializer)? {
        OneOrMore::One(one) => vec![one],
        OneOrMore::More(more) => more,
    })
}
