//! `vhost-user-net`: see the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use vhost_daemon::allocator::{Heap, heap};

#[global_allocator]
static ALLOCATOR: Heap = heap();

fn main() -> ExitCode {
    vhost_daemon::run::<vhost_net::device::NetProgram>()
}
