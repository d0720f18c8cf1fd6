//! `cargo install-bulkhead`.

use clap::Parser;
use integration_tests::artifacts::{Artifacts, BIN_DIR};
use integration_tests::install::{Place, install};
use integration_tests::setup;
use std::path::PathBuf;
use std::process::ExitCode;

/// Builds the release binaries and installs them, with the discovery files that QEMU and libvirt
/// read.
#[derive(Parser)]
#[command(name = "cargo install-bulkhead")]
struct Arguments {
    /// Where the files will be used.
    #[arg(long, default_value = "/usr/local")]
    prefix: PathBuf,
    /// A folder that stands for the root meanwhile, as packages are made.
    #[arg(long)]
    destdir: Option<PathBuf>,
}

fn main() -> ExitCode {
    let Arguments { prefix, destdir } = Arguments::parse();
    setup::usual_umask();
    match run(&Place { prefix, destdir }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("install: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(place: &Place) -> anyhow::Result<()> {
    let artifacts = match std::env::var_os(BIN_DIR) {
        Some(folder) => Artifacts::from_dir(folder.as_ref()),
        None => Artifacts::build_shipped()?,
    };
    for file in install(&artifacts, place)? {
        println!("{}", file.display());
    }
    Ok(())
}
