//! The flags that only `vhost-user-net` has.

use crate::address::{Addresses, MacAddress};
use crate::guard::Guard;
use std::fmt::Display;
use std::os::fd::RawFd;
use std::str::FromStr;
use vhost_daemon::Limits;

/// Least MTU (RFC 791), and least that virtio 1.3, 5.1.4.1 allows.
pub const MIN_MTU: u16 = 68;

/// Flags as given, each checked on its own.
#[derive(Default, Debug)]
pub struct Options {
    /// `--tap-name`.
    pub tap_name: Option<String>,
    /// `--tap-fd`, one for each queue pair.
    pub tap_fds: Vec<RawFd>,
    /// `--link-fd`.
    pub link_fd: Option<RawFd>,
    /// `--control-fd`.
    pub control_fd: Option<RawFd>,
    /// `--state-fd`.
    pub state_fd: Option<RawFd>,
    /// `--pcap-fd`.
    pub pcap_fd: Option<RawFd>,
    /// `--mac`.
    pub mac: Option<MacAddress>,
    /// `--mtu`.
    pub mtu: Option<u16>,
    /// `--ip`, the addresses that the guest may use.
    pub addresses: Vec<Addresses>,
    /// `--guard`.
    pub guard: Option<Switch>,
    /// `--receive-limit`.
    pub receive_limit: Limits,
    /// `--transmit-limit`.
    pub transmit_limit: Limits,
}

/// `on` or `off`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Switch {
    /// `on`.
    On,
    /// `off`.
    Off,
}

impl FromStr for Switch {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err("write on or off"),
        }
    }
}

/// What `--help` prints.
pub const USAGE: &str = concat!(
    "  --tap-name=NAME         serve this TAP, which exists in this network namespace\n",
    "  --tap-fd=N              serve this open TAP (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR);\n",
    "                          once for each pair of queues\n",
    "  --link-fd=N             read orders from this pipe or socket, a byte each: 0 link down,\n",
    "                          1 link up, a have the guest announce itself\n",
    "  --control-fd=N          take orders from this socket, a line each: metrics\n",
    "  --state-fd=N            keep what a successor has to know in this page: a memfd of\n",
    "                          4096 bytes, sealed with F_SEAL_SHRINK\n",
    "  --pcap-fd=N             append a capture of the frames to this file (1 GiB at most)\n",
    "  --mac=M                 the guest's MAC address\n",
    "  --mtu=N                 offer this MTU to the guest, 68 to 65535\n",
    "  --ip=A[/N]              an address or prefix that the guest may use; repeatable; the\n",
    "                          link-local address of --mac is one always, any other is to\n",
    "                          be named (fe80::/10 where all on the segment are trusted)\n",
    "  --guard=on|off          refuse frames from other addresses than the guest's, and LLC\n",
    "                          frames, such as a bridge's spanning tree\n",
    "                          (default: on where --mac is given)\n",
    "  --receive-limit=L, --transmit-limit=L\n",
    "                          L is packets=N,bytes=SIZE a second, with bursts\n",
    "                          packets-burst=N,bytes-burst=SIZE; all queues together; a frame\n",
    "                          to be cut into packets counts as those\n",
);

impl Options {
    /// Takes one flag; false for one that is not known here.
    ///
    /// # Errors
    /// When its value is missing or wrong.
    pub fn take(&mut self, name: &str, parser: &mut lexopt::Parser) -> Result<bool, lexopt::Error> {
        match name {
            "tap-name" => self.tap_name = Some(text(parser)?),
            "tap-fd" => self.tap_fds.push(parsed(name, parser)?),
            "link-fd" => self.link_fd = Some(parsed(name, parser)?),
            "control-fd" => self.control_fd = Some(parsed(name, parser)?),
            "state-fd" => self.state_fd = Some(parsed(name, parser)?),
            "pcap-fd" => self.pcap_fd = Some(parsed(name, parser)?),
            "mac" => self.mac = Some(parsed(name, parser)?),
            "mtu" => self.mtu = Some(mtu(parser)?),
            "ip" => self.addresses.push(parsed(name, parser)?),
            "guard" => self.guard = Some(parsed(name, parser)?),
            "receive-limit" => self.receive_limit = limits(name, parser)?,
            "transmit-limit" => self.transmit_limit = limits(name, parser)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The guard that the flags ask for.
    ///
    /// # Errors
    /// When they contradict each other.
    pub fn guard(&self) -> Result<Option<Guard>, OptionsError> {
        if self.addresses.len() > Guard::MAX_ADDRESSES {
            return Err(OptionsError::Addresses);
        }
        match (self.guard, self.mac) {
            (Some(Switch::Off), _) if !self.addresses.is_empty() => Err(OptionsError::Contradiction),
            (Some(Switch::Off), _) => Ok(None),
            (_, Some(mac)) => Ok(Some(Guard::new(mac, self.addresses.clone()))),
            (Some(Switch::On), None) => Err(OptionsError::NoMac),
            (None, None) if !self.addresses.is_empty() => Err(OptionsError::NoMac),
            (None, None) => Ok(None),
        }
    }
}

/// Flags that do not go together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OptionsError {
    /// Neither, or both, of the ways to name a TAP.
    #[error("give either --tap-name or --tap-fd")]
    Tap,
    /// As many `--tap-fd` as queue pairs.
    #[error("--num-queues={0} needs --tap-fd {1} times, one for each pair of queues")]
    TapFds(u16, u16),
    /// The guard does not know the guest's address.
    #[error("--guard=on and --ip need --mac")]
    NoMac,
    /// Addresses for a guard that is off.
    #[error("--ip has no effect with --guard=off")]
    Contradiction,
    /// Too many addresses.
    #[error("--ip may be given {max} times at most", max = Guard::MAX_ADDRESSES)]
    Addresses,
}

fn text(parser: &mut lexopt::Parser) -> Result<String, lexopt::Error> {
    Ok(parser.value()?.into_string()?)
}

fn parsed<T: FromStr<Err: Display>>(name: &str, parser: &mut lexopt::Parser) -> Result<T, lexopt::Error> {
    text(parser)?
        .parse()
        .map_err(|error: T::Err| format!("--{name}: {error}").into())
}

fn limits(name: &str, parser: &mut lexopt::Parser) -> Result<Limits, lexopt::Error> {
    Limits::parse(&text(parser)?, "packets").map_err(|error| format!("--{name}: {error}").into())
}

fn mtu(parser: &mut lexopt::Parser) -> Result<u16, lexopt::Error> {
    let mtu: u16 = parsed("mtu", parser)?;
    if mtu >= MIN_MTU {
        Ok(mtu)
    } else {
        Err(format!("--mtu: {mtu} is less than {MIN_MTU}").into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(flags: &[&str]) -> Result<Options, lexopt::Error> {
        let mut options = Options::default();
        let mut parser = lexopt::Parser::from_args(flags);
        while let Some(lexopt::Arg::Long(name)) = parser.next()? {
            let name = name.to_owned();
            assert!(options.take(&name, &mut parser)?, "{name}");
        }
        Ok(options)
    }

    #[test]
    fn the_guard_is_on_where_the_address_is_known() {
        assert_eq!(parse(&[]).unwrap().guard(), Ok(None));
        assert!(
            parse(&["--mac=52:54:00:00:00:01"])
                .unwrap()
                .guard()
                .unwrap()
                .is_some()
        );
        let off = parse(&["--mac=52:54:00:00:00:01", "--guard=off"]).unwrap();
        assert_eq!(off.guard(), Ok(None));
        assert_eq!(parse(&["--guard=on"]).unwrap().guard(), Err(OptionsError::NoMac));
        assert_eq!(
            parse(&["--ip=10.0.0.1"]).unwrap().guard(),
            Err(OptionsError::NoMac)
        );
    }

    #[test]
    fn a_wrong_value_names_its_flag() {
        for flag in ["--mac=1:2", "--mtu=67", "--mtu=65536", "--ip=x", "--guard=maybe"] {
            let error = parse(&[flag]).unwrap_err().to_string();
            assert!(error.contains(flag.split_once('=').unwrap().0), "{error}");
        }
    }
}
