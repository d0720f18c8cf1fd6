//! `cargo fuzz-all`.

use clap::Parser;
use integration_tests::fuzz::{self, Finds, Plan};
use integration_tests::setup::{self, Purpose};
use std::process::ExitCode;
use std::time::Duration;

/// Runs every fuzz target from its corpus and prints executions, coverage and crashes.
#[derive(Parser)]
#[command(name = "cargo fuzz-all")]
struct Arguments {
    /// How long each target runs.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only these targets, as the table names them.
    #[arg(long = "target")]
    targets: Vec<String>,
    /// Targets that run at the same time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Keep the inputs that reach the most, in the repository; run nothing.
    #[arg(long)]
    minimise: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    setup::install_missing(Purpose::Fuzzing)?;
    let plan = Plan {
        each: Duration::from_secs(arguments.seconds),
        jobs: arguments.jobs.max(1),
        finds: Finds::Kept,
    };
    let program = fuzz::Program::build(false)?;
    let targets = program.targets(&arguments.targets)?;
    if arguments.minimise {
        for target in &targets {
            program.minimise(target)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let runs = program.run_all(&targets, &plan);
    println!("{}", fuzz::table(&runs));
    Ok(match runs.iter().all(fuzz::Run::went_well) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}
