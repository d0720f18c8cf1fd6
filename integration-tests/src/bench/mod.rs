//! Benchmarks. Each compares contenders in turns within one run, since only ratios taken side by
//! side mean anything on a machine that others use too.

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
