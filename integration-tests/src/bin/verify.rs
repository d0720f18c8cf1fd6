//! `cargo verify`.

use clap::Parser;
use integration_tests::{nested, verify};
use std::process::ExitCode;

/// Checks formatting, lints, licences and every test that this host can run, nested where it must.
#[derive(Parser)]
#[command(name = "cargo verify")]
struct Arguments {
    /// Run the whole matrices, and record the result in docs/verify-full.md.
    #[arg(long)]
    full: bool,
    /// Install what the tests need, and run none.
    #[arg(long, conflicts_with = "full")]
    set_up: bool,
}

fn main() -> ExitCode {
    nested::agent::intercept();
    let arguments = Arguments::parse();
    let result = if arguments.set_up {
        verify::set_up().map(|()| true)
    } else {
        verify::run(arguments.full)
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("verify: {error:#}\n0 passed, 1 failed, 0 skipped");
            ExitCode::FAILURE
        }
    }
}
