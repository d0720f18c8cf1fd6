//! `vhost-user-blk`: one disk image, one front end at a time.

mod allocator;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: allocator::Heap = allocator::Heap::new();

fn main() -> ExitCode {
    vhost_daemon::run::<vhost_blk::BlkProgram>()
}
