//! The device processes over their sockets, with no VM: data, bad requests, bad rings, bad
//! messages, restarts; and that they work where they are installed.

mod aside;
mod behaviour;
mod blk;
mod confined;
mod durable;
mod fixture;
mod hostile;
mod image;
mod image_change;
mod image_damaged;
mod image_refused;
mod install;
mod life;
mod long;
mod net;
mod recovery;
mod silent;
mod space;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut tests = Vec::new();
    tests.extend(aside::tests());
    tests.extend(behaviour::tests());
    tests.extend(blk::tests());
    tests.extend(confined::tests());
    tests.extend(durable::tests());
    tests.extend(hostile::tests());
    tests.extend(image::tests());
    tests.extend(image_change::tests());
    tests.extend(image_damaged::tests());
    tests.extend(image_refused::tests());
    tests.extend(install::tests());
    tests.extend(life::tests());
    tests.extend(long::tests());
    tests.extend(net::tests());
    tests.extend(recovery::tests());
    tests.extend(silent::tests());
    tests.extend(space::tests());
    integration_tests::suite::run(tests)
}
