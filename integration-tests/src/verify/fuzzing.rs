//! Every fuzz target for a while, from its corpus.

use super::libtest::Outcome;
use crate::fuzz::{Finds, Plan, Program, Run, table};
use std::time::Duration;

/// Targets at the same time.
const JOBS: usize = 2;

/// A test for each target: nothing crashes, hangs or takes too much memory; and one of what clippy says of what only
/// fuzzing compiles.
pub(super) fn targets(full: bool) -> Vec<(String, Outcome)> {
    let plan = Plan {
        each: Duration::from_secs(if full { 60 } else { 3 }),
        jobs: JOBS,
        finds: Finds::Dropped,
    };
    run(&plan, full).unwrap_or_else(|error| vec![("build".to_owned(), Outcome::Failed(format!("{error:#}")))])
}

fn run(plan: &Plan, full: bool) -> anyhow::Result<Vec<(String, Outcome)>> {
    let mut program = Program::build(true)?;
    let clippy = Outcome::of_warnings(&program.warnings);
    if full {
        program = Program::build(false)?;
    }
    let targets = program.targets(&[])?;
    let runs = program.run_all(&targets, plan);
    let runs = runs.iter().map(outcome);
    Ok(runs.chain([("clippy".to_owned(), clippy)]).collect())
}

fn outcome(run: &Run) -> (String, Outcome) {
    let outcome = match run.went_well() {
        true => Outcome::Passed,
        false => Outcome::Failed(table(std::slice::from_ref(run))),
    };
    (run.target.clone(), outcome)
}
