//! The device's side of one split ring: take, complete, publish.

use super::chain::Parts;
use super::notify::Notifications;
use super::walk::{DESCRIPTOR_SIZE, Walker};
use super::{Chain, InflightQueue, RingFault};
use crate::faults::{self, Step};
use crate::memory::{GuestAddress, GuestMemory, RegionHint, Segment};
use std::collections::VecDeque;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, VolatileSlice};

/// Offset of `idx` in the available and the used ring (virtio 1.3, 2.7.6 and 2.7.8).
pub(super) const INDEX: usize = 2;
/// Offset of the entries in both.
const ENTRIES: usize = 4;
/// Bytes of a used element.
const USED_SIZE: usize = 8;
/// Chains whose buffers are kept for reuse; beyond it they are freed.
const MAX_SPARE: usize = 64;
/// Chains held at most: each may have thousands of parts, which are memory of this process.
pub(super) const MOST_HELD: u16 = 1024;

/// Where a ring lies and which features it runs with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RingSetup {
    /// Entries, a power of two.
    pub(crate) size: u16,
    pub(crate) descriptors: GuestAddress,
    pub(crate) available: GuestAddress,
    pub(crate) used: GuestAddress,
    /// First available entry to take (SET_VRING_BASE).
    pub(crate) base: u16,
    /// VIRTIO_F_EVENT_IDX.
    pub(crate) event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC.
    pub(crate) indirect: bool,
}

/// The three parts of a ring, proven to lie in guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingLayout {
    size: u16,
    descriptors: Segment,
    pub(super) available: Segment,
    pub(super) used: Segment,
}

impl RingLayout {
    /// Finds the parts, each with its event index, in `memory`.
    pub(crate) fn find(memory: &GuestMemory, setup: &RingSetup) -> Result<Self, RingFault> {
        let entries = usize::from(setup.size);
        let part = |address: GuestAddress, length, alignment: u64| {
            let segment = memory.segment(address, length);
            let aligned = segment.filter(|_| address.0.is_multiple_of(alignment));
            aligned.ok_or(RingFault::Memory { address, length })
        };
        Ok(Self {
            size: setup.size,
            descriptors: part(setup.descriptors, entries * DESCRIPTOR_SIZE, 16)?,
            available: part(setup.available, ENTRIES + entries * 2 + 2, 2)?,
            used: part(setup.used, ENTRIES + entries * USED_SIZE + 2, 4)?,
        })
    }

    /// Offset of `used_event` behind the available ring.
    pub(super) fn used_event(&self) -> usize {
        ENTRIES + usize::from(self.size) * 2
    }

    /// Offset of `avail_event` behind the used ring.
    pub(super) fn avail_event(&self) -> usize {
        ENTRIES + usize::from(self.size) * USED_SIZE
    }
}

/// A 16-bit field of a ring.
pub(super) fn load(
    memory: &GuestMemory,
    part: &Segment,
    offset: usize,
    order: Ordering,
) -> Result<u16, RingFault> {
    let slice = ring_slice(memory, part)?;
    let value = slice.load::<u16>(offset, order);
    value.map(u16::from_le).map_err(|_| LOST)
}

pub(super) fn store(
    memory: &GuestMemory,
    part: &Segment,
    offset: usize,
    value: u16,
    order: Ordering,
) -> Result<(), RingFault> {
    #[cfg(test)]
    super::tests::crash::point()?;
    let slice = ring_slice(memory, part)?;
    slice.store(value.to_le(), offset, order).map_err(|_| LOST)
}

fn ring_slice<'m>(memory: &'m GuestMemory, part: &Segment) -> Result<VolatileSlice<'m>, RingFault> {
    memory.slice(part).ok_or(LOST)
}

/// A table of the ring's own: each chain counts itself in, and rings that shared the count would
/// hand its cache line to and fro.
fn own(memory: &GuestMemory) -> Arc<GuestMemory> {
    Arc::new(memory.clone())
}

/// The layout was found in this memory, which does not change: cannot be.
const LOST: RingFault = RingFault::Request("the ring is no longer in guest memory");

/// What [`Ring::complete`] collects until [`Ring::publish`].
#[derive(Clone, Copy, Debug)]
struct UsedElement {
    head: u16,
    written: u32,
}

/// One running split ring.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    indirect: bool,
    next_available: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// Which heads the device holds, and how many.
    held: Vec<bool>,
    held_count: u16,
    completed: Vec<UsedElement>,
    /// Heads that a predecessor took and did not finish, oldest first.
    resubmit: VecDeque<u16>,
    inflight: Option<InflightQueue>,
    notifications: Notifications,
    /// The available index when the latest look found nothing to take, or all of it.
    seen: Wrapping<u16>,
    /// The handler took chains and found too few: it waits for more than there are.
    wants_more: bool,
    /// A chain was taken in this round.
    took: bool,
    /// Chains that may still be taken before the worker looks after its other duties.
    budget: u16,
    /// Of this memory, and empty.
    #[expect(clippy::vec_box, reason = "the box is what is used again")]
    spare: Vec<Box<Parts>>,
    /// Where the latest buffer was found.
    hint: RegionHint,
    /// Room for an indirect table.
    copy: Vec<u8>,
}

impl Ring {
    /// Starts a ring. With an in-flight region that was in use, the position and the chains to
    /// execute again come from it; otherwise the position is `setup.base`.
    ///
    /// # Errors
    /// When a part lies outside guest memory, or the region contradicts the ring.
    pub(crate) fn start(
        memory: Arc<GuestMemory>,
        setup: &RingSetup,
        inflight: Option<InflightQueue>,
    ) -> Result<Self, RingFault> {
        let layout = RingLayout::find(&memory, setup)?;
        let used_index = load(&memory, &layout.used, INDEX, Ordering::Acquire)?;
        let mut ring = Self {
            memory: own(&memory),
            layout,
            indirect: setup.indirect,
            next_available: Wrapping(setup.base),
            next_used: Wrapping(used_index),
            held: vec![false; usize::from(setup.size)],
            held_count: 0,
            completed: Vec::with_capacity(usize::from(setup.size)),
            resubmit: VecDeque::new(),
            inflight: None,
            notifications: Notifications::new(setup.event_idx, used_index),
            seen: Wrapping(setup.base),
            wants_more: false,
            took: false,
            budget: setup.size,
            spare: Vec::new(),
            hint: RegionHint::default(),
            copy: Vec::new(),
        };
        if let Some(mut region) = inflight {
            if let Some(resubmit) = region.recover(used_index)? {
                ring.next_available = Wrapping(used_index) + Wrapping(resubmit.len() as u16);
                ring.resubmit = resubmit.into();
                // The predecessor may have died between publishing and interrupting.
                ring.notifications.force();
            }
            ring.inflight = Some(region);
        }
        Ok(ring)
    }

    /// Entries in the ring.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Whether an in-flight region says which chains are held, so that a successor takes them up.
    pub fn is_recorded(&self) -> bool {
        self.inflight.is_some()
    }

    /// Whether something was completed that the driver is not told of yet.
    pub fn has_unpublished(&self) -> bool {
        !self.completed.is_empty()
    }

    /// Chains taken and neither completed nor put back.
    pub fn held(&self) -> u16 {
        self.held_count
    }

    /// No chain can be taken before one is completed: all of the ring's are held, or as many as may be.
    pub fn is_exhausted(&self) -> bool {
        self.held_count == self.layout.size || self.holds_most()
    }

    fn holds_most(&self) -> bool {
        self.held_count >= MOST_HELD
    }

    /// Takes the next chain, if there is one, and not too many are held.
    ///
    /// # Errors
    /// A [`RingFault`] for whatever the driver did wrong; the ring is of no more use.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingFault> {
        self.pop_enough(usize::MAX)
    }

    /// As [`Self::pop`], but reads no more of the chain than it needs for so many writable bytes. What else the
    /// chain has costs nothing, and [`Self::read_rest`] finds it.
    ///
    /// # Errors
    /// As [`Self::pop`], as far as the chain is read.
    pub fn pop_enough(&mut self, writable: usize) -> Result<Option<Chain>, RingFault> {
        if self.budget == 0 {
            return Ok(None);
        }
        if self.holds_most() {
            // Taken once one of them is completed.
            self.seen = Wrapping(self.available_index(Ordering::Acquire)?);
            return Ok(None);
        }
        let (head, again) = match self.resubmit.pop_front() {
            Some(head) => (head, true),
            None => match self.next_head()? {
                Some(head) => (head, false),
                None => return Ok(None),
            },
        };
        let held = self
            .held
            .get_mut(usize::from(head))
            .ok_or(RingFault::Head(head))?;
        if std::mem::replace(held, true) {
            return Err(RingFault::HeadTwice(head));
        }
        self.held_count += 1;
        self.took = true;
        self.budget -= 1;
        if !again {
            self.next_available += 1;
            faults::point(Step::BeforeTake);
            if let Some(inflight) = &mut self.inflight {
                inflight.take(head)?;
            }
            faults::point(Step::AfterTake);
        }
        self.walk(head, writable).map(Some)
    }

    /// Reads a chain of [`Self::pop_enough`] to its end, once more from its head: the driver may have changed
    /// it. True: it was not read so far before.
    ///
    /// # Errors
    /// As [`Self::pop`].
    pub fn read_rest(&mut self, chain: &mut Chain) -> Result<bool, RingFault> {
        let cut = chain.parts.cut;
        if cut {
            *chain = self.walk(chain.head, usize::MAX)?;
        }
        Ok(cut)
    }

    fn walk(&mut self, head: u16, enough: usize) -> Result<Chain, RingFault> {
        let spare = self.spare.pop();
        let parts = spare.unwrap_or_else(|| Box::new(Parts::new(Arc::clone(&self.memory))));
        let mut walker = Walker {
            memory: &self.memory,
            table: self.layout.descriptors,
            indirect: self.indirect,
            hint: &mut self.hint,
            copy: &mut self.copy,
            enough,
        };
        walker.walk(head, parts)
    }

    /// The head in the next available entry.
    fn next_head(&mut self) -> Result<Option<u16>, RingFault> {
        let (found, next) = (self.available_index(Ordering::Acquire)?, self.next_available);
        self.seen = Wrapping(found);
        let pending = (Wrapping(found) - next).0;
        if pending > self.layout.size {
            return Err(RingFault::AvailIndex {
                found,
                next: next.0,
                size: self.layout.size,
            });
        }
        if pending == 0 {
            return Ok(None);
        }
        let entry = ENTRIES + usize::from(next.0 % self.layout.size) * 2;
        load(&self.memory, &self.layout.available, entry, Ordering::Relaxed).map(Some)
    }

    fn available_index(&self, order: Ordering) -> Result<u16, RingFault> {
        load(&self.memory, &self.layout.available, INDEX, order)
    }

    /// Undoes the latest [`Ring::pop`]s, the latest first: the chain is available again. For a
    /// device that needs several chains for one packet and finds too few.
    ///
    /// # Errors
    /// [`RingFault::Inflight`] where requests are recorded: a recorded chain can only be completed.
    pub fn put_back(&mut self, chain: Chain) -> Result<(), RingFault> {
        if self.inflight.is_some() {
            return Err(RingFault::Inflight("a recorded chain was put back"));
        }
        self.next_available -= 1;
        self.budget += 1;
        self.wants_more = true;
        self.free_head(chain.head);
        self.release(chain);
        Ok(())
    }

    /// Gives a chain back to the driver, with the number of bytes written to it, counted from its
    /// first writable byte (virtio 1.3, 2.7.8). The driver sees it at the next [`Ring::publish`].
    pub fn complete(&mut self, chain: Chain, written: u32) {
        faults::point(Step::BeforeComplete);
        self.completed.push(UsedElement {
            head: chain.head,
            written,
        });
        self.release(chain);
        faults::point(Step::AfterComplete);
    }

    /// The driver may make `head` available again: not before the used index says so.
    fn free_head(&mut self, head: u16) {
        if let Some(held) = self.held.get_mut(usize::from(head)) {
            *held = false;
        }
    }

    fn release(&mut self, chain: Chain) {
        self.held_count -= 1;
        let Chain { mut parts, .. } = chain;
        if self.spare.len() < MAX_SPARE && Arc::ptr_eq(&parts.memory, &self.memory) {
            parts.clear();
            self.spare.push(parts);
        }
    }

    /// Shows the driver all completed chains at once. The order of the steps is what recovery
    /// relies on: see `InflightQueue::recover`.
    ///
    /// # Errors
    /// When the in-flight region is damaged.
    pub fn publish(&mut self) -> Result<(), RingFault> {
        if self.completed.is_empty() {
            return Ok(());
        }
        faults::point(Step::BeforePublish);
        if let Some(inflight) = &mut self.inflight {
            for element in &self.completed {
                inflight.link(element.head)?;
            }
        }
        faults::point(Step::PublishLinked);
        self.write_used_elements()?;
        faults::point(Step::PublishElements);
        store(
            &self.memory,
            &self.layout.used,
            INDEX,
            self.next_used.0,
            Ordering::Release,
        )?;
        faults::point(Step::PublishIndex);
        if let Some(inflight) = &mut self.inflight {
            for element in &self.completed {
                inflight.clear(element.head)?;
            }
            inflight.set_used_index(self.next_used.0)?;
        }
        faults::point(Step::AfterPublish);
        while let Some(element) = self.completed.pop() {
            self.free_head(element.head);
        }
        Ok(())
    }

    fn write_used_elements(&mut self) -> Result<(), RingFault> {
        let used = ring_slice(&self.memory, &self.layout.used)?;
        for element in &self.completed {
            let mut bytes = [0; USED_SIZE];
            bytes[..4].copy_from_slice(&u32::from(element.head).to_le_bytes());
            bytes[4..].copy_from_slice(&element.written.to_le_bytes());
            let entry = ENTRIES + usize::from(self.next_used.0 % self.layout.size) * USED_SIZE;
            #[cfg(test)]
            super::tests::crash::point()?;
            used.write_slice(&bytes, entry).map_err(|_| LOST)?;
            self.next_used += 1;
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was published since the last call.
    pub(crate) fn needs_interrupt(&mut self) -> Result<bool, RingFault> {
        self.notifications
            .needs_interrupt(&self.memory, &self.layout, self.next_used)
    }

    /// Asks the driver for kicks; true if there is more to take already, which came without one.
    /// Where the handler put chains back, only one that came since counts.
    pub(crate) fn enable_kicks(&mut self) -> Result<bool, RingFault> {
        self.notifications
            .enable_kicks(&self.memory, &self.layout, self.known())?;
        self.has_available()
    }

    /// The available index up to which the handler has looked.
    fn known(&self) -> Wrapping<u16> {
        if self.wants_more || self.holds_most() {
            self.seen
        } else {
            self.next_available
        }
    }

    /// Tells the driver that kicks are not needed for now.
    fn disable_kicks(&mut self) -> Result<(), RingFault> {
        self.notifications.disable_kicks(&self.memory, &self.layout)
    }

    /// Whether there is a chain to take; what the handler put back counts once something came after it.
    pub fn has_available(&self) -> Result<bool, RingFault> {
        let known = self.known();
        Ok(!self.resubmit.is_empty() && !self.holds_most()
            || self.available_index(Ordering::Acquire)? != known.0)
    }

    /// The latest round took nothing.
    pub(crate) fn was_idle(&self) -> bool {
        !self.took
    }

    /// Allows another ring's worth of chains; false if the last allowance was used up, so that there
    /// may be more to take without a kick.
    pub(crate) fn renew_budget(&mut self) -> bool {
        let left = self.budget > 0;
        self.budget = self.layout.size;
        left
    }

    /// A new round of the handler: what it put back is there to be taken again.
    pub(crate) fn begin_round(&mut self) -> Result<(), RingFault> {
        self.wants_more = false;
        self.took = false;
        self.disable_kicks()
    }

    /// Goes on in another memory table, in which the ring must lie at the same guest addresses. Chains that
    /// the device holds keep the one that they were found in.
    pub(crate) fn set_memory(
        &mut self,
        memory: Arc<GuestMemory>,
        setup: &RingSetup,
    ) -> Result<(), RingFault> {
        self.layout = RingLayout::find(&memory, setup)?;
        self.memory = own(&memory);
        self.hint = RegionHint::default();
        self.spare.clear();
        Ok(())
    }

    /// The memory table that chains are found in.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Whether the driver was ever shown a used element on this ring.
    pub(crate) fn has_published(&self) -> bool {
        self.next_used.0 != 0
    }

    /// The next available entry to take, for GET_VRING_BASE. Everything taken was published.
    pub(crate) fn position(&self) -> u16 {
        self.next_available.0
    }
}
