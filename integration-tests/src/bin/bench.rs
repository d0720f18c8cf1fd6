//! Benchmarks that need more than `cargo bench` offers: `bench blk`, `bench boot`, `bench iperf`,
//! `bench net`.

use clap::{Parser, Subcommand};
use integration_tests::bench::{blk, boot, iperf, net};
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
    /// Launch of a Linux guest to its init beside QEMU's microvm machine, nested where it must.
    Boot,
    /// A Linux guest's TCP beside QEMU's virtio-net and the kernel's vhost-net, nested where it must.
    Iperf(iperf::Settings),
    /// The network process beside bare loops over a TAP.
    Net(net::Settings),
}

fn main() -> ExitCode {
    integration_tests::nested::agent::intercept();
    if cfg!(debug_assertions) {
        eprintln!("bench: built without --release: our driver holds up whoever is measured");
    }
    let result = match Arguments::parse().verb {
        Verb::Blk(settings) => blk::run(&settings),
        Verb::Boot => boot::run(),
        Verb::Iperf(settings) => iperf::run(&settings),
        Verb::Net(settings) => net::run(&settings),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
