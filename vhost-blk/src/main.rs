//! `vhost-user-blk`: one disk image, one front end at a time.

use std::process::ExitCode;
use vhost_daemon::allocator::{Heap, heap};

#[global_allocator]
static ALLOCATOR: Heap = heap();

fn main() -> ExitCode {
    vhost_daemon::run::<vhost_blk::BlkProgram>()
}
