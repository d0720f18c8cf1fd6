//! A device's process dies, and the guest only waits: `bulkhead run` with the tiny guest, whose
//! workload checks every block, while its disk process is killed again and again.

mod durable;
mod fence;
mod forced;
mod kills;
mod limits;
mod on_disk;
mod others;
mod storm;
mod stress;
mod taps;
mod trouble;
mod upgrade;
mod victim;

use std::process::ExitCode;

fn main() -> ExitCode {
    integration_tests::demo::peer::intercept();
    let mut tests = Vec::new();
    tests.extend(kills::tests());
    tests.extend(on_disk::tests());
    tests.extend(limits::tests());
    tests.extend(others::tests());
    tests.extend(durable::tests());
    tests.extend(forced::tests());
    tests.extend(fence::tests());
    tests.extend(upgrade::tests());
    tests.extend(taps::tests());
    tests.extend(trouble::tests());
    tests.extend(stress::tests());
    integration_tests::suite::run(tests)
}
