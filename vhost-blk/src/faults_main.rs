//! `vhost-user-blk` with the faults of `vhost_daemon::faults`: for tests.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    vhost_daemon::run::<vhost_blk::BlkProgram>()
}
