//! `bulkhead-image`: started by `bulkhead image` in a jail, to look at or change one image.

use std::process::ExitCode;

/// As in vhost-user-blk: asks the kernel for three calls only.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    vhost_blk::tool::main()
}
