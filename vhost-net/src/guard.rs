//! Stops a guest from speaking with an address that is not its own.
//!
//! Looks at a private copy of the frame's first bytes, so that the guest cannot change them between
//! the look and the kernel's read. What does not parse within them is refused.
//!
//! The kernel itself writes into a frame whose checksum the guest left open (NEEDS_CSUM), and the guest
//! chooses what comes out: it places the two bytes, and whatever is summed up. So they may lie only where
//! nothing was looked at. What cutting a frame rewrites (lengths, identification, TCP's and UDP's own
//! fields) is not looked at, nor do others than TCP and UDP come through it.

use crate::address::{Addresses, MacAddress};
use crate::header::ETHERNET_HEADER;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

/// Bytes of each frame that are copied out and looked at: enough for two tags, IPv6, a few
/// extension headers and a neighbour message with its options.
pub const PREFIX: usize = 256;

const TYPE_IPV4: u16 = 0x0800;
const TYPE_ARP: u16 = 0x0806;
const TYPE_IPV6: u16 = 0x86dd;
/// A smaller number is a length (IEEE 802.3, 3.2.6).
const FIRST_TYPE: u16 = 0x0600;
/// 802.1Q and 802.1ad tags.
const TYPE_TAGS: [u16; 2] = [0x8100, 0x88a8];
const MOST_TAGS: usize = 2;
const PROTOCOL_IGMP: u8 = 2;
const PROTOCOL_UDP: u8 = 17;
const PROTOCOL_ICMPV6: u8 = 58;
const PROTOCOL_FRAGMENT: u8 = 44;
/// Hop-by-hop options, routing and destination options: a length in units of 8 bytes.
const EXTENSIONS: [u8; 3] = [0, 43, 60];
/// Reports of its versions, and a leave: what members send.
const IGMP_MEMBER: [u8; 4] = [0x12, 0x16, 0x17, 0x22];
const DHCP_CLIENT: u16 = 68;
const DHCP_SERVER: u16 = 67;

/// Why a frame was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// The frame's source MAC address is not the guest's.
    #[error("source MAC address is not the guest's")]
    SourceMac,
    /// An ARP message that claims another's address.
    #[error("ARP sender is not the guest")]
    Arp,
    /// An IPv6 neighbour message that claims another's address, or a router's message.
    #[error("IPv6 neighbour message claims an address that is not the guest's")]
    Neighbour,
    /// An IPv4 or IPv6 source that is not the guest's.
    #[error("source IP address is not the guest's")]
    SourceIp,
    /// A protocol that cannot be checked, while addresses are to be checked.
    #[error("only IPv4, IPv6 and ARP can be checked for their source")]
    Protocol,
    /// An LLC frame: behind SNAP, or a SAP of its own, it may carry any protocol past the guard
    /// (CVE-2021-27861, CVE-2021-27862).
    #[error("a length instead of a type: what LLC frames carry is not looked at")]
    Length,
    /// The kernel's checksum would overwrite what was looked at, or lie in what cannot be looked at.
    #[error("checksum to be filled in among the headers that were checked")]
    Checksum,
    /// The headers end early, or do not end within [`PREFIX`].
    #[error("headers do not parse")]
    Malformed,
}

/// Which addresses a guest may use.
///
/// Where only its MAC address is known, ARP and IPv6 neighbour messages are held to that, a router's are
/// refused, and any IPv4 and any other type passes unread. Frames with a length for a type (LLC: SNAP,
/// IS-IS, a bridge's spanning tree) are refused always.
///
/// Of the link-local addresses only the one that follows from its MAC address (RFC 4291, appendix A)
/// is the guest's unasked. One that the guest chose (RFC 7217, RFC 8981) has to be named: whoever may
/// speak for any link-local address may speak for the router's, and a solicitation or an
/// advertisement from there takes over its neighbours' traffic. Where all on a segment trust each
/// other, name `fe80::/10`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Guard {
    mac: MacAddress,
    addresses: Vec<Addresses>,
    link_local: Ipv6Addr,
}

impl Guard {
    /// Most addresses of one guest.
    pub const MAX_ADDRESSES: usize = 64;

    /// Holds the guest to `mac` and, unless `addresses` is empty, to those and the link-local
    /// address of `mac`.
    #[must_use]
    pub fn new(mac: MacAddress, addresses: Vec<Addresses>) -> Self {
        Self {
            mac,
            addresses,
            link_local: mac.link_local(),
        }
    }

    /// Judges a frame by its first bytes: all of it, or [`PREFIX`] bytes; `checksum` is where in it the
    /// kernel will write two bytes.
    ///
    /// It need not be the checksum of the outermost protocol: of tunnels Linux leaves the inner one open.
    ///
    /// # Errors
    /// The first [`Refusal`] that applies.
    pub fn check(&self, frame: &[u8], checksum: Option<usize>) -> Result<(), Refusal> {
        if bytes::<6>(frame, 6)? != self.mac.0 {
            return Err(Refusal::SourceMac);
        }
        let mut at = ETHERNET_HEADER - 2;
        let mut kind = be16(frame, at)?;
        for _ in 0..MOST_TAGS {
            if TYPE_TAGS.contains(&kind) {
                at += 4;
                kind = be16(frame, at)?;
            }
        }
        let packet = frame.get(at + 2..).ok_or(Refusal::Malformed)?;
        let open = match kind {
            TYPE_ARP => self.check_arp(packet)?,
            TYPE_IPV4 if self.checks_addresses() => self.check_ipv4(packet)?,
            TYPE_IPV6 => self.check_ipv6(packet)?,
            // Nothing in it is looked at.
            TYPE_IPV4 => 0..usize::MAX,
            _ if self.checks_addresses() => return Err(Refusal::Protocol),
            tag if TYPE_TAGS.contains(&tag) => return Err(Refusal::Malformed),
            length if length < FIRST_TYPE => return Err(Refusal::Length),
            _ => NOWHERE,
        };
        match checksum.map(|field| field.checked_sub(at + 2)) {
            None => Ok(()),
            Some(Some(field)) if open.start <= field && field + 2 <= open.end => Ok(()),
            Some(_) => Err(Refusal::Checksum),
        }
    }

    fn checks_addresses(&self) -> bool {
        !self.addresses.is_empty()
    }

    fn is_own4(&self, address: Ipv4Addr) -> bool {
        !self.checks_addresses() || self.names(address.into())
    }

    fn is_own6(&self, address: Ipv6Addr) -> bool {
        !self.checks_addresses() || address == self.link_local || self.names(address.into())
    }

    fn names(&self, address: IpAddr) -> bool {
        self.addresses.iter().any(|one| one.contains(address))
    }

    /// RFC 826 for Ethernet and IPv4. A sender address of 0.0.0.0 is a probe: it keeps others from
    /// using the address that it asks for (RFC 5227, 2.1.1), which is the guest's own.
    fn check_arp(&self, arp: &[u8]) -> Result<Open, Refusal> {
        if bytes::<6>(arp, 0)? != [0, 1, 8, 0, 6, 4] {
            return Err(Refusal::Arp);
        }
        let sender = Ipv4Addr::from(bytes::<4>(arp, 14)?);
        let claimed = if sender.is_unspecified() {
            Ipv4Addr::from(bytes::<4>(arp, 24)?)
        } else {
            sender
        };
        let own = bytes::<6>(arp, 8)? == self.mac.0 && self.is_own4(claimed);
        own.then_some(NOWHERE).ok_or(Refusal::Arp)
    }

    fn check_ipv4(&self, packet: &[u8]) -> Result<Open, Refusal> {
        let version = bytes::<1>(packet, 0)?[0];
        let header = usize::from(version & 0xf) * 4;
        if version >> 4 != 4 || header < 20 {
            return Err(Refusal::Malformed);
        }
        let source = Ipv4Addr::from(bytes::<4>(packet, 12)?);
        if self.is_own4(source) {
            return Ok(header..usize::MAX);
        }
        if !source.is_unspecified() {
            return Err(Refusal::SourceIp);
        }
        // Who has no address yet asks a DHCP server for one, and may say which groups it is in (RFC 3376, 4.2.13).
        let (own, checked) = match bytes::<1>(packet, 9)?[0] {
            PROTOCOL_UDP => {
                let ports = [be16(packet, header)?, be16(packet, header + 2)?];
                (ports == [DHCP_CLIENT, DHCP_SERVER], 4)
            }
            PROTOCOL_IGMP => (IGMP_MEMBER.contains(&bytes::<1>(packet, header)?[0]), 1),
            _ => (false, 0),
        };
        own.then_some(header + checked..usize::MAX)
            .ok_or(Refusal::SourceIp)
    }

    fn check_ipv6(&self, packet: &[u8]) -> Result<Open, Refusal> {
        if bytes::<1>(packet, 0)?[0] >> 4 != 6 {
            return Err(Refusal::Malformed);
        }
        let source = Ipv6Addr::from(bytes::<16>(packet, 8)?);
        let upper = upper_layer(packet)?;
        if !source.is_unspecified() && !self.is_own6(source) {
            return Err(Refusal::SourceIp);
        }
        match upper {
            Upper::Icmp(icmp) => self.check_icmpv6(source, &icmp),
            // Only multicast listener and neighbour messages come from an unspecified source.
            Upper::Other(_) if source.is_unspecified() && self.checks_addresses() => Err(Refusal::SourceIp),
            Upper::Other(start) => Ok(start..usize::MAX),
        }
    }

    fn check_icmpv6(&self, source: Ipv6Addr, icmp: &Icmp<'_>) -> Result<Open, Refusal> {
        const LISTENER: [u8; 4] = [130, 131, 132, 143];
        const SOLICIT_ROUTER: u8 = 133;
        const SOLICIT: u8 = 135;
        const ADVERTISE: u8 = 136;
        const NEIGHBOUR_DISCOVERY: std::ops::RangeInclusive<u8> = 133..=137;
        let message = icmp.message;
        let checksum = icmp.start + 2;
        let kind = bytes::<1>(message, 0)?[0];
        if !NEIGHBOUR_DISCOVERY.contains(&kind) {
            let may = !source.is_unspecified() || LISTENER.contains(&kind) || !self.checks_addresses();
            // Behind type and code.
            return may.then_some(checksum..usize::MAX).ok_or(Refusal::SourceIp);
        }
        // RFC 6980: neighbour messages are never fragmented.
        if icmp.fragmented {
            return Err(Refusal::Neighbour);
        }
        // What lies beyond was not looked at, and the guest can still change it.
        if !icmp.whole {
            return Err(Refusal::Malformed);
        }
        match kind {
            SOLICIT_ROUTER => self.check_link_options(message, 8)?,
            // From nowhere it asks whether the address is free, and keeps others from using it
            // (RFC 4862, 5.4.3).
            SOLICIT if !source.is_unspecified() => self.check_link_options(message, 24)?,
            SOLICIT | ADVERTISE => {
                let target = Ipv6Addr::from(bytes::<16>(message, 8)?);
                if !self.is_own6(target) {
                    return Err(Refusal::Neighbour);
                }
                self.check_link_options(message, 24)?;
            }
            // A guest is no router: no advertisements, no redirects.
            _ => return Err(Refusal::Neighbour),
        }
        Ok(checksum..checksum + 2)
    }

    /// Source and target link-layer address options (RFC 4861, 4.6.1) name the guest.
    fn check_link_options(&self, message: &[u8], start: usize) -> Result<(), Refusal> {
        let mut at = start;
        while at < message.len() {
            let [kind, units] = bytes::<2>(message, at)?;
            if units == 0 {
                return Err(Refusal::Malformed);
            }
            if matches!(kind, 1 | 2) && (units != 1 || bytes::<6>(message, at + 2)? != self.mac.0) {
                return Err(Refusal::Neighbour);
            }
            at += usize::from(units) * 8;
        }
        if at == message.len() {
            Ok(())
        } else {
            Err(Refusal::Malformed)
        }
    }
}

/// Where in a packet the kernel may write: the bytes that were not looked at.
type Open = Range<usize>;
const NOWHERE: Open = 0..0;

enum Upper<'f> {
    Icmp(Icmp<'f>),
    /// Another, which begins here in the packet.
    Other(usize),
}

struct Icmp<'f> {
    /// Where in the packet it begins.
    start: usize,
    /// As much as is looked at.
    message: &'f [u8],
    /// That is all of it.
    whole: bool,
    fragmented: bool,
}

/// Walks IPv6 extension headers. A later fragment has no upper layer to look at.
fn upper_layer(packet: &[u8]) -> Result<Upper<'_>, Refusal> {
    // The payload's length ends headers and options; Ethernet may pad behind it. Longer packets have
    // none (0, RFC 2675), and the guest sends none of those.
    let end = 40 + usize::from(be16(packet, 4)?);
    let whole = end <= packet.len();
    let packet = &packet[..end.min(packet.len())];
    let mut next = bytes::<1>(packet, 6)?[0];
    let mut at = 40;
    let mut fragmented = false;
    loop {
        if next == PROTOCOL_ICMPV6 {
            let message = packet.get(at..).ok_or(Refusal::Malformed)?;
            return Ok(Upper::Icmp(Icmp {
                start: at,
                message,
                whole,
                fragmented,
            }));
        } else if next == PROTOCOL_FRAGMENT {
            let offset = be16(packet, at + 2)? >> 3;
            if offset != 0 {
                return Ok(Upper::Other(at + 8));
            }
            fragmented = true;
            next = bytes::<1>(packet, at)?[0];
            at += 8;
        } else if EXTENSIONS.contains(&next) {
            let [following, units] = bytes::<2>(packet, at)?;
            next = following;
            at += (usize::from(units) + 1) * 8;
        } else {
            return Ok(Upper::Other(at));
        }
    }
}

fn bytes<const N: usize>(data: &[u8], at: usize) -> Result<[u8; N], Refusal> {
    data.get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .ok_or(Refusal::Malformed)
}

fn be16(data: &[u8], at: usize) -> Result<u16, Refusal> {
    bytes(data, at).map(u16::from_be_bytes)
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
