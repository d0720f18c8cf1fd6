//! Benchmarks. Each compares contenders in turns within one run, since only ratios taken side by
//! side mean anything on a machine that others use too.

use std::cmp::Ordering;

pub mod blk;
mod blk_cases;
mod blk_driver;
mod blk_floor;
mod blk_peer;
pub mod boot;
pub mod iperf;
pub mod net;
mod net_bed;
mod net_driver;
mod net_frames;
mod net_host;

/// The middle one of `values`, of which there is at least one.
#[must_use]
pub fn median<T: PartialOrd + Copy>(mut values: Vec<T>) -> T {
    values.sort_by(|one, other| one.partial_cmp(other).unwrap_or(Ordering::Equal));
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_median_is_no_mean() {
        assert_eq!(super::median(vec![9, 1, 2]), 2);
    }
}
