//! Debian's kernels as guests of `bulkhead run`: on hardware KVM, or in the nested runner.

mod boots;
mod ends;
mod hosts;
mod nets;
mod others;
mod plugs;
mod stall;
mod storm;
mod traffic;

use anyhow::Result;
use integration_tests::linux::{Images, KernelImages};
use std::process::ExitCode;
use std::sync::OnceLock;

fn main() -> ExitCode {
    integration_tests::nested::agent::intercept();
    integration_tests::demo::peer::intercept();
    let mut tests = Vec::new();
    // The longest first: at the end there may be a second machine, which should have something to do.
    tests.extend(plugs::tests());
    tests.extend(traffic::tests());
    tests.extend(boots::tests());
    tests.extend(ends::tests());
    tests.extend(hosts::tests());
    tests.extend(nets::tests());
    tests.extend(others::tests());
    tests.extend(storm::tests());
    tests.extend(stall::tests());
    integration_tests::suite::run(tests)
}

fn images() -> Result<&'static Images> {
    static IMAGES: OnceLock<Result<Images, String>> = OnceLock::new();
    let images = IMAGES.get_or_init(|| Images::get().map_err(|error| format!("{error:#}")));
    images.as_ref().map_err(|error| anyhow::anyhow!(error.clone()))
}

fn default_kernel() -> Result<&'static KernelImages> {
    Ok(&images()?.default)
}
