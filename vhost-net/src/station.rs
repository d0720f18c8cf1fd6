//! What the driver said about itself on the control queue, and the kernel's filter that follows.

use crate::address::MacAddress;
use crate::filter::{Filter, Mode, TapFilter};
use crate::tap::Tap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How often the kernel had to be asked for what was done; none where it was not done.
pub type Done = Option<usize>;

/// The guest's address and what it wants to receive; shared by control queue and session.
pub struct Station {
    tap: Arc<Tap>,
    /// `--mac`.
    given: Option<MacAddress>,
    /// The guard holds the guest to `given`.
    guarded: bool,
    state: Mutex<State>,
}

struct State {
    mac: Option<MacAddress>,
    /// The driver has no other: it told this process, or it cannot have told another one.
    sure: bool,
    filter: Filter,
    /// What the kernel has.
    set: TapFilter,
}

impl Station {
    /// A guest that has said nothing yet.
    #[must_use]
    pub fn new(tap: Arc<Tap>, given: Option<MacAddress>, guarded: bool) -> Self {
        Self {
            tap,
            given,
            guarded,
            state: Mutex::new(State {
                mac: given,
                sure: guarded,
                filter: Filter::default(),
                set: TapFilter::Everything,
            }),
        }
    }

    /// `mac` of the configuration space.
    #[must_use]
    pub fn mac(&self) -> Option<MacAddress> {
        self.lock().mac
    }

    /// VIRTIO_NET_CTRL_MAC_ADDR_SET; not done where the guard forbids it or no station has it.
    pub fn set_mac(&self, mac: MacAddress) -> Done {
        let own = mac.is_station() && (!self.guarded || self.given == Some(mac));
        if !own {
            return None;
        }
        self.change(|state| {
            state.mac = Some(mac);
            state.sure = true;
        })
    }

    /// A driver begins: it has the address that is in the configuration space.
    pub fn begin(&self) {
        self.lock().sure = true;
    }

    /// VIRTIO_NET_CTRL_RX.
    pub fn set_mode(&self, mode: Mode, on: bool) -> Done {
        self.change(|state| state.filter.set_mode(mode, on))
    }

    /// VIRTIO_NET_CTRL_MAC_TABLE_SET; none where there are too many to read.
    pub fn set_table(&self, addresses: Option<Vec<MacAddress>>) -> Done {
        self.change(|state| state.filter.set_table(addresses))
    }

    /// The device was reset: everything passes, and the address is the one that was given.
    pub fn reset(&self) {
        self.change(|state| {
            state.mac = self.given;
            state.sure = true;
            state.filter = Filter::default();
        });
    }

    fn change(&self, change: impl FnOnce(&mut State)) -> Done {
        let mut state = self.lock();
        change(&mut state);
        let wanted = state.filter.tap(state.mac.filter(|_| state.sure));
        if wanted == state.set {
            return Some(0);
        }
        match self.tap.set_filter(&wanted) {
            Ok(()) => {
                state.set = wanted;
                Some(1)
            }
            Err(error) => {
                tracing::warn!(%error, "the TAP refused the driver's filter");
                None
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
