//! Whether long frames come: how much is gathered and looked at for the next one.

use super::LONGEST;

/// Bytes gathered while no long frames are seen.
const SHORT: usize = 4096;
/// Calls without a long frame after which none is expected any more.
const PATIENCE: u8 = 64;

/// How long the next frames may be.
#[derive(Default, Debug)]
pub(super) struct Expectation {
    long: bool,
    short_calls: u8,
}

impl Expectation {
    pub(super) fn bytes(&self) -> usize {
        if self.long { LONGEST } else { SHORT }
    }

    /// A call of `process` ended, in which the longest frame had `length` bytes.
    pub(super) fn learn(&mut self, longest: usize) {
        if longest > SHORT {
            *self = Self {
                long: true,
                short_calls: 0,
            };
        } else if longest > 0 && self.long {
            self.short_calls += 1;
            self.long = self.short_calls < PATIENCE;
        }
    }
}
