//! `vhost-user-blk` with the faults of `vhost_daemon::faults`: for tests.

use std::process::ExitCode;
use vhost_daemon::allocator::{Heap, heap};

#[global_allocator]
static ALLOCATOR: Heap = heap();

fn main() -> ExitCode {
    vhost_daemon::run::<vhost_blk::BlkProgram>()
}
