//! Every fuzz target for a while, from its corpus.

use super::libtest::Outcome;
use crate::fuzz::{Finds, Plan, Program, Run, table};
use std::time::Duration;

/// Targets at the same time.
const JOBS: usize = 2;

/// Clippy on what only fuzzing compiles.
pub(super) fn clippy() -> Outcome {
    match Program::lint() {
        Ok(()) => Outcome::Passed,
        Err(error) => Outcome::Failed(format!("{error:#}")),
    }
}

/// A test for each target: nothing crashes, hangs or takes too much memory.
pub(super) fn targets(full: bool) -> Vec<(String, Outcome)> {
    let plan = Plan {
        each: Duration::from_secs(if full { 60 } else { 5 }),
        jobs: JOBS,
        finds: Finds::Dropped,
    };
    let program = Program::build(!full);
    let targets = program.and_then(|program| Ok((program.targets(&[])?, program)));
    match targets {
        Ok((targets, program)) => {
            let runs = program.run_all(&targets, &plan);
            runs.iter().map(outcome).collect()
        }
        Err(error) => vec![("build".to_owned(), Outcome::Failed(format!("{error:#}")))],
    }
}

fn outcome(run: &Run) -> (String, Outcome) {
    let outcome = match run.went_well() {
        true => Outcome::Passed,
        false => Outcome::Failed(table(std::slice::from_ref(run))),
    };
    (run.target.clone(), outcome)
}
