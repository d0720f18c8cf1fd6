//! `bulkhead-image`: started by `bulkhead image` in a jail, to look at or change one image.

#[path = "../allocator.rs"]
mod allocator;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: allocator::Heap = allocator::Heap::new();

fn main() -> ExitCode {
    vhost_blk::tool::main()
}
