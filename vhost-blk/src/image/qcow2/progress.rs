//! How far a walk through all tables of an image is.

use std::cell::Cell;

/// Most steps that are told of a whole.
const TOLD: u64 = 1000;

/// Tables that were read or written, of all that are to be: L2 tables by each walk through them, refcount blocks,
/// and runs of clusters that may go back to the host. The whole grows where more walks turn out to be needed. Of a conversion: bytes of the disk.
pub struct Progress<'a> {
    /// Is told what is done, and the whole, at most a thousand times while that stays the same.
    tell: &'a dyn Fn(u64, u64),
    done: Cell<u64>,
    total: Cell<u64>,
}

impl<'a> Progress<'a> {
    /// Told to `tell`.
    #[must_use]
    pub fn told(tell: &'a dyn Fn(u64, u64)) -> Self {
        Self {
            tell,
            done: Cell::new(0),
            total: Cell::new(0),
        }
    }

    /// Told to nobody.
    #[must_use]
    pub fn untold() -> Self {
        Self::told(&|_, _| {})
    }

    /// Tables that were walked through.
    pub(super) fn done(&self) -> u64 {
        self.done.get()
    }

    /// So many more tables are to be walked through, if not more are expected.
    pub(crate) fn expect(&self, more: u64) {
        let total = self.done.get().saturating_add(more);
        self.total.set(self.total.get().max(total));
    }

    pub(crate) fn step(&self, tables: u64) {
        let total = self.total.get().max(1);
        let part = |done: u64| u128::from(done) * u128::from(TOLD) / u128::from(total);
        let before = self.done.get();
        let done = before.saturating_add(tables);
        self.done.set(done);
        if part(before) != part(done) {
            (self.tell)(done, total);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn few_steps_are_told_and_the_last_is() {
        for total in [1, 7, 1000, 1_000_001] {
            let told = RefCell::new(Vec::new());
            let tell = |done, of| told.borrow_mut().push((done, of));
            let progress = Progress::told(&tell);
            progress.expect(total);
            (0..total).for_each(|_| progress.step(1));
            let told = told.into_inner();
            assert_eq!(told.len() as u64, total.min(TOLD));
            assert!(told.is_sorted_by(|one, next| one.0 < next.0));
            assert_eq!(told.last(), Some(&(total, total)));
        }
    }
}
