//! The device processes over their sockets, with no VM: data, bad requests, bad rings, bad
//! messages, restarts; and that they work where they are installed.

mod behaviour;
mod blk;
mod fixture;
mod hostile;
mod image;
mod install;
mod life;
mod net;
mod recovery;
mod space;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut tests = Vec::new();
    tests.extend(behaviour::tests());
    tests.extend(blk::tests());
    tests.extend(hostile::tests());
    tests.extend(image::tests());
    tests.extend(install::tests());
    tests.extend(life::tests());
    tests.extend(net::tests());
    tests.extend(recovery::tests());
    tests.extend(space::tests());
    integration_tests::suite::run(tests)
}
