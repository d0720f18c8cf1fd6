//! `vhost-user-blk`: one disk image, one front end at a time.

use std::process::ExitCode;
use vhost_daemon::allocator::Heap;

#[global_allocator]
static ALLOCATOR: Heap = Heap::new();

fn main() -> ExitCode {
    vhost_daemon::run::<vhost_blk::BlkProgram>()
}
