//! What the driver said about itself on the control queue, and the kernel's filter that follows.

use crate::address::MacAddress;
use crate::filter::{Filter, Mode, TapFilter};
use crate::state::State as Kept;
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
    /// Where the address that the driver chose outlives the process.
    kept: Arc<Kept>,
}

struct State {
    mac: Option<MacAddress>,
    /// The driver has no other: it told this process or one before, or it cannot have told another one.
    sure: bool,
    filter: Filter,
    /// What the kernel has.
    set: TapFilter,
    /// The address that the last reset took from a driver, which another process may go on with.
    left: Option<MacAddress>,
}

impl Station {
    /// A guest that has said nothing yet but, to a predecessor, what address it chose.
    #[must_use]
    pub fn new(tap: Arc<Tap>, given: Option<MacAddress>, guarded: bool, kept: Arc<Kept>) -> Self {
        let chosen = kept.mac().filter(|_| !guarded);
        Self {
            tap,
            given,
            guarded,
            state: Mutex::new(State {
                mac: chosen.or(given),
                sure: guarded || chosen.is_some(),
                filter: Filter::default(),
                set: TapFilter::Everything,
                left: None,
            }),
            kept,
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
        let done = self.change(|state| {
            state.mac = Some(mac);
            state.sure = true;
        });
        if done.is_some() {
            self.kept.set_mac(Some(mac));
        }
        done
    }

    /// A driver begins: it has the address that is in the configuration space.
    pub fn begin(&self) {
        let mut state = self.lock();
        state.sure = true;
        self.kept
            .set_mac(state.mac.filter(|mac| self.given != Some(*mac)));
    }

    /// A driver goes on, after a front end that went: with the address that it chose.
    pub fn resume(&self) -> Done {
        self.kept.mac().and_then(|mac| self.set_mac(mac))
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
        let left = self.kept.mac();
        self.kept.set_mac(None);
        let mut state = self.lock();
        state.mac = self.given;
        state.sure = true;
        state.filter = Filter::default();
        state.left = left;
        self.settle(&mut state);
    }

    /// The reset was that of a front end which went: its driver may go on with another process.
    pub fn leave(&self) {
        if let Some(mac) = self.lock().left.take() {
            self.kept.set_mac(Some(mac));
        }
    }

    /// What the kernel refuses is not done: the driver is told so, and goes on as before.
    fn change(&self, change: impl FnOnce(&mut State)) -> Done {
        let mut state = self.lock();
        let before = (state.mac, state.sure, state.filter.clone());
        change(&mut state);
        let done = self.settle(&mut state);
        if done.is_none() {
            (state.mac, state.sure, state.filter) = before;
        }
        done
    }

    /// Has the kernel filter as `state` wants it.
    fn settle(&self, state: &mut State) -> Done {
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
