//! Addresses as people write them: a station's, and those that a guest may use.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// The group bit is set: no station's own address.
    #[must_use]
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// A station may have it: neither a group's nor all zero.
    #[must_use]
    pub fn is_station(self) -> bool {
        !self.is_group() && self.0 != [0; 6]
    }

    /// The link-local address that RFC 4291, appendix A derives from it.
    pub(crate) fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
    }
}

impl FromStr for MacAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const ERROR: &str = "a MAC address is six hexadecimal bytes, such as 52:54:00:12:34:56";
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(ERROR)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(ERROR);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| ERROR)?;
        }
        let address = Self(bytes);
        if parts.next().is_some() {
            Err(ERROR)
        } else if !address.is_station() {
            Err("a NIC cannot have a multicast or all-zero MAC address")
        } else {
            Ok(address)
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// One address, or all that begin alike: `10.0.0.2`, `2001:db8::/64`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Addresses {
    first: IpAddr,
    /// Leading bits that are fixed, at most those of the address.
    bits: u8,
}

impl Addresses {
    /// Whether `address` is of the same family and begins alike.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let same =
            |a: u128, b: u128, width: u8| (a ^ b).checked_shr((width - self.bits).into()).unwrap_or(0) == 0;
        match (self.first, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => same(a.to_bits().into(), b.to_bits().into(), 32),
            (IpAddr::V6(a), IpAddr::V6(b)) => same(a.to_bits(), b.to_bits(), 128),
            _ => false,
        }
    }
}

impl From<IpAddr> for Addresses {
    fn from(first: IpAddr) -> Self {
        let bits = if first.is_ipv4() { 32 } else { 128 };
        Self { first, bits }
    }
}

impl FromStr for Addresses {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const ERROR: &str = "an IP address or a prefix, such as 10.0.0.2 or 2001:db8::/64";
        let (address, bits) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
        let whole = Self::from(address.parse::<IpAddr>().map_err(|_| ERROR)?);
        let bits = bits.map_or(Ok(whole.bits), str::parse).map_err(|_| ERROR)?;
        if bits <= whole.bits {
            Ok(Self { bits, ..whole })
        } else {
            Err(ERROR)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);

    #[test]
    fn mac_addresses_read_as_people_write_them() {
        assert_eq!("52:54:00:01:02:03".parse(), Ok(MAC));
        assert_eq!(MAC.to_string(), "52:54:00:01:02:03");
        for bad in [
            "",
            "52:54:00:01:02",
            "52:54:00:01:02:03:04",
            "52:54:00:01:02:+3",
            "01:00:00:00:00:00",
        ] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn prefixes_hold_what_begins_alike() {
        let holds = |prefix: &str, address: &str| {
            let prefix: Addresses = prefix.parse().unwrap();
            prefix.contains(address.parse().unwrap())
        };
        assert!(holds("10.1.0.0/16", "10.1.255.7") && !holds("10.1.0.0/16", "10.2.0.0"));
        assert!(holds("10.1.0.9", "10.1.0.9") && !holds("10.1.0.9", "10.1.0.8"));
        assert!(holds("fe80::/10", "febf::1") && !holds("fe80::/10", "fec0::1"));
        assert!(holds("0.0.0.0/0", "255.255.255.255") && holds("::/0", "ffff::"));
        assert!(!holds("0.0.0.0/0", "::1") && !holds("::/0", "127.0.0.1"));
        for bad in ["", "10.0.0.1/33", "::/129", "1.2.3/8", "::/-1", "::/", "::/x"] {
            assert!(bad.parse::<Addresses>().is_err(), "{bad}");
        }
    }
}
