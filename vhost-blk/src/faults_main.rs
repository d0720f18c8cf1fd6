//! `vhost-user-blk` with the faults of `vhost_daemon::faults`: for tests.

mod allocator;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: allocator::Heap = allocator::Heap::new();

fn main() -> ExitCode {
    vhost_daemon::run::<vhost_blk::BlkProgram>()
}
