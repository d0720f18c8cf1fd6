//! `vhost-user-blk`: one disk image, one front end at a time.

use std::process::ExitCode;

fn main() -> ExitCode {
    vhost_daemon::run::<vhost_blk::BlkProgram>()
}
