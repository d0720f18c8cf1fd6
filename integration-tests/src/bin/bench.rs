//! Benchmarks that need more than `cargo bench` offers: `bench blk`.

use clap::{Parser, Subcommand};
use integration_tests::bench::blk;
use std::process::ExitCode;

/// Measures our processes beside others in one run.
#[derive(Parser)]
#[command(name = "bench")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// The disk process beside qemu-storage-daemon.
    Blk(blk::Settings),
}

fn main() -> ExitCode {
    let Verb::Blk(settings) = Arguments::parse().verb;
    match blk::run(&settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
