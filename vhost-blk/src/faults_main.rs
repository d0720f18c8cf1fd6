//! `vhost-user-blk` with the faults of `vhost_daemon::faults`: for tests.

use std::process::ExitCode;
use vhost_daemon::allocator::Heap;

#[global_allocator]
static ALLOCATOR: Heap = Heap::new();

fn main() -> ExitCode {
    vhost_daemon::run::<vhost_blk::BlkProgram>()
}
