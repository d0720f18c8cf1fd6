//! `vhost-user-blk`: one disk image, one front end at a time.

use std::process::ExitCode;

/// Not the C library's: that one needs brk, mprotect and madvise, which the policy then allows
/// to whoever takes the process over. Nothing on the path of a request allocates.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    vhost_daemon::run::<vhost_blk::BlkProgram>()
}
