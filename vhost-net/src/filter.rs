//! What the driver wants to receive (virtio 1.3, 5.1.6.5.1 and 5.1.6.5.2), kept by the kernel: the TAP
//! drops the rest before it costs us a system call.

use crate::address::MacAddress;

/// Most addresses of the driver's that are kept; with more, all frames are received, as a driver has
/// to expect (5.1.6.5.2.2).
pub const MOST_ADDRESSES: usize = 64;
const BROADCAST: MacAddress = MacAddress([0xff; 6]);

/// One of the modes of VIRTIO_NET_CTRL_RX.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Everything.
    Promiscuous = 0,
    /// Every group address.
    AllMulticast = 1,
    /// Every station's address.
    AllUnicast = 2,
    /// No group address.
    NoMulticast = 3,
    /// No station's address.
    NoUnicast = 4,
    /// No broadcast.
    NoBroadcast = 5,
}

impl Mode {
    /// By its command byte.
    #[must_use]
    pub fn from_command(command: u8) -> Option<Self> {
        let all = [
            Self::Promiscuous,
            Self::AllMulticast,
            Self::AllUnicast,
            Self::NoMulticast,
            Self::NoUnicast,
            Self::NoBroadcast,
        ];
        all.get(usize::from(command)).copied()
    }
}

/// Addresses and modes of one driver.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Filter {
    modes: [bool; 6],
    /// The table; none where the driver gave more than are kept.
    table: Option<Vec<MacAddress>>,
}

impl Default for Filter {
    /// Everything passes until a driver asks for less.
    fn default() -> Self {
        let mut filter = Self {
            modes: [false; 6],
            table: Some(Vec::new()),
        };
        filter.set_mode(Mode::Promiscuous, true);
        filter
    }
}

/// What `TUNSETTXFILTER` takes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TapFilter {
    /// No filter.
    Everything,
    /// These addresses, and perhaps every group address.
    These {
        /// Unicast addresses first: the kernel compares those exactly.
        addresses: Vec<MacAddress>,
        /// Every group address, too.
        all_multicast: bool,
    },
}

impl Filter {
    /// Switches a mode on or off.
    pub fn set_mode(&mut self, mode: Mode, on: bool) {
        if let Some(flag) = self.modes.get_mut(mode as usize) {
            *flag = on;
        }
    }

    /// Replaces the table; none stands for more addresses than are kept.
    pub fn set_table(&mut self, addresses: Option<Vec<MacAddress>>) {
        self.table = addresses.filter(|addresses| addresses.len() <= MOST_ADDRESSES);
    }

    fn has(&self, mode: Mode) -> bool {
        self.modes.get(mode as usize).copied().unwrap_or(false)
    }

    /// The kernel's filter for a guest whose own address is `own`, if it has one.
    #[must_use]
    pub fn tap(&self, own: Option<MacAddress>) -> TapFilter {
        let (Some(own), Some(table)) = (own, &self.table) else {
            return TapFilter::Everything;
        };
        // What suppresses a kind outdoes what allows all of it; the kernel's filter cannot have every station
        // and lack some groups.
        let all_unicast = self.has(Mode::AllUnicast) && !self.has(Mode::NoUnicast);
        if self.has(Mode::Promiscuous) || all_unicast {
            return TapFilter::Everything;
        }
        let wanted = |address: &MacAddress| {
            let refused = if address.is_group() {
                Mode::NoMulticast
            } else {
                Mode::NoUnicast
            };
            *address != BROADCAST && !self.has(refused)
        };
        let mut addresses: Vec<_> = [own].iter().chain(table).copied().filter(wanted).collect();
        addresses.sort_by_key(|address| address.is_group());
        if !self.has(Mode::NoBroadcast) {
            addresses.push(BROADCAST);
        }
        let all_multicast = self.has(Mode::AllMulticast) && !self.has(Mode::NoMulticast);
        if addresses.is_empty() {
            // The kernel takes an empty list for no filter. A group's address is no sender's.
            addresses.push(MacAddress([1, 0, 0, 0, 0, 0]));
        }
        TapFilter::These {
            addresses,
            all_multicast,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
    const GROUP: MacAddress = MacAddress([0x33, 0x33, 0, 0, 0, 1]);
    const OTHER: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);

    fn quiet() -> Filter {
        let mut filter = Filter::default();
        filter.set_mode(Mode::Promiscuous, false);
        filter
    }

    fn these(filter: &Filter) -> (Vec<MacAddress>, bool) {
        match filter.tap(Some(OWN)) {
            TapFilter::Everything => panic!("no filter"),
            TapFilter::These {
                addresses,
                all_multicast,
            } => (addresses, all_multicast),
        }
    }

    #[test]
    fn everything_passes_at_first_and_where_it_is_asked_for() {
        assert_eq!(Filter::default().tap(Some(OWN)), TapFilter::Everything);
        assert_eq!(quiet().tap(None), TapFilter::Everything);
        let mut filter = quiet();
        filter.set_table(Some(vec![GROUP; MOST_ADDRESSES + 1]));
        assert_eq!(filter.tap(Some(OWN)), TapFilter::Everything);
        filter.set_table(Some(vec![GROUP]));
        filter.set_table(None);
        assert_eq!(filter.tap(Some(OWN)), TapFilter::Everything);
    }

    #[test]
    fn the_table_and_the_modes_make_the_list() {
        let mut filter = quiet();
        filter.set_table(Some(vec![GROUP, OTHER]));
        assert_eq!(these(&filter), (vec![OWN, OTHER, GROUP, BROADCAST], false));
        filter.set_mode(Mode::AllMulticast, true);
        assert!(these(&filter).1);
        filter.set_mode(Mode::NoMulticast, true);
        assert_eq!(these(&filter), (vec![OWN, OTHER, BROADCAST], false));
        filter.set_mode(Mode::NoUnicast, true);
        filter.set_mode(Mode::NoBroadcast, true);
        let (addresses, _) = these(&filter);
        assert!(!addresses.is_empty() && addresses.iter().all(|one| one.is_group() && *one != BROADCAST));
    }

    #[test]
    fn what_is_suppressed_does_not_pass_though_all_of_it_is_allowed() {
        let mut filter = quiet();
        filter.set_table(Some(vec![GROUP, OTHER, BROADCAST]));
        filter.set_mode(Mode::AllUnicast, true);
        assert_eq!(filter.tap(Some(OWN)), TapFilter::Everything);
        filter.set_mode(Mode::NoUnicast, true);
        assert_eq!(these(&filter).0, [GROUP, BROADCAST]);
        filter.set_mode(Mode::NoBroadcast, true);
        assert_eq!(these(&filter).0, [GROUP]);
        filter.set_mode(Mode::Promiscuous, true);
        assert_eq!(filter.tap(Some(OWN)), TapFilter::Everything);
    }
}
