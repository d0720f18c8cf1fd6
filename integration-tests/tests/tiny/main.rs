//! The tiny guest on this host's KVM, hardware or software.

mod ends;
mod fixture;
mod run;
mod work;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut tests = Vec::new();
    tests.extend(ends::tests());
    tests.extend(run::tests());
    tests.extend(work::tests());
    integration_tests::suite::run(tests)
}
