//! `bulkhead-image`: started by `bulkhead image` in a jail, to look at or change one image.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: vhost_daemon::allocator::Heap = vhost_daemon::allocator::heap();

fn main() -> ExitCode {
    vhost_blk::tool::main()
}
