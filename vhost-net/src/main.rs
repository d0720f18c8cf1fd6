//! `vhost-user-net`: see the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    vhost_daemon::run::<vhost_net::device::NetProgram>()
}
