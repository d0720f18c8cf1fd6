//! The results of a verification: every test once, wherever it ran in the end.

use super::libtest::Outcome;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Name ending of tests that only `--full` runs.
pub(super) const FULL_ONLY: &str = "(full)";

/// Outcomes by suite and test.
#[derive(Default, Debug)]
pub(super) struct Report {
    outcomes: BTreeMap<(String, String), Outcome>,
}

/// What one suite's tests came to in one place.
#[derive(Debug)]
pub(super) struct SuiteRun {
    suite: String,
    place: &'static str,
    outcomes: Vec<(String, Outcome)>,
    took: Duration,
}

impl SuiteRun {
    /// Runs a suite and takes its time.
    pub(super) fn of(suite: &str, place: &'static str, run: impl FnOnce() -> Vec<(String, Outcome)>) -> Self {
        let start = Instant::now();
        let outcomes = run();
        Self::since(start, suite, place, outcomes)
    }

    /// Of a suite that began then.
    pub(super) fn since(
        start: Instant,
        suite: &str,
        place: &'static str,
        outcomes: Vec<(String, Outcome)>,
    ) -> Self {
        Self {
            suite: suite.to_owned(),
            place,
            outcomes,
            took: start.elapsed(),
        }
    }

    /// With a mark that only `--full` runs these, and how they differ from the usual ones.
    pub(super) fn full_only(mut self, how: &str) -> Self {
        for (test, _) in &mut self.outcomes {
            *test = format!("{test}, {how} {FULL_ONLY}");
        }
        self
    }
}

/// How many tests ended how.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Count {
    pub(super) passed: usize,
    pub(super) failed: usize,
    pub(super) skipped: usize,
}

impl Report {
    /// Records an outcome. A test that was skipped in one place and ran in another counts as what
    /// it was where it ran; a failure anywhere stays.
    pub(super) fn add(&mut self, suite: &str, test: &str, outcome: Outcome) {
        let key = (suite.to_owned(), test.to_owned());
        let stays = match self.outcomes.get(&key) {
            Some(Outcome::Failed(_)) => true,
            Some(Outcome::Passed) => !matches!(outcome, Outcome::Failed(_)),
            Some(Outcome::Skipped(_)) | None => false,
        };
        if !stays {
            self.outcomes.insert(key, outcome);
        }
    }

    /// Records the outcomes of a whole suite and says in one line how it went.
    pub(super) fn add_suite(&mut self, run: SuiteRun) {
        let SuiteRun {
            suite,
            place,
            outcomes,
            took,
        } = run;
        let count = Count::of(outcomes.iter().map(|(_, outcome)| outcome));
        eprintln!("{suite} ({place}): {count} ({} s)", took.as_secs());
        for (test, outcome) in outcomes {
            self.add(&suite, &test, outcome);
        }
    }

    /// A suite that must have tests and has none, wherever it was to run, failed.
    pub(super) fn expect(&mut self, suite: &str) {
        if !self.outcomes.keys().any(|(name, _)| name == suite) {
            self.add(suite, "as a whole", Outcome::Failed("it ran no test".to_owned()));
        }
    }

    /// The tests of a suite that were skipped so far.
    pub(super) fn skipped_in(&self, suite: &str) -> Vec<String> {
        let skipped = |((name, test), outcome): (&(String, String), &Outcome)| {
            (name == suite && matches!(outcome, Outcome::Skipped(_))).then(|| test.clone())
        };
        self.outcomes.iter().filter_map(skipped).collect()
    }

    pub(super) fn count(&self) -> Count {
        Count::of(self.outcomes.values())
    }

    /// Failed tests with what they said, then skipped ones with their reasons.
    pub(super) fn details(&self) -> String {
        let mut text = String::new();
        for ((suite, test), outcome) in &self.outcomes {
            if let Outcome::Failed(why) = outcome {
                // Writing to a String does not fail.
                let _ = writeln!(
                    text,
                    "FAILED  {suite}: {test}\n        {}",
                    why.replace('\n', "\n        ")
                );
            }
        }
        for ((suite, test), outcome) in &self.outcomes {
            if let Outcome::Skipped(why) = outcome {
                let _ = writeln!(text, "skipped {suite}: {test}: {why}");
            }
        }
        text
    }

    /// The page `docs/verify-full.md`.
    pub(super) fn page(&self, date: &str, host: &str, minutes: u64) -> String {
        let mut page = format!(
            "# The last full verification\n\n`cargo verify --full` on {date}, host: {host}, {minutes} minutes:\n\n\
             **{}**\n\n## Tests that only --full runs\n\n",
            self.count()
        );
        let full = self
            .outcomes
            .iter()
            .filter(|((_, test), _)| test.ends_with(FULL_ONLY));
        for ((suite, test), outcome) in full {
            let word = match outcome {
                Outcome::Passed => "passed",
                Outcome::Failed(_) => "failed",
                Outcome::Skipped(_) => "skipped",
            };
            let _ = writeln!(page, "- {suite}: {test}: {word}");
        }
        page += "\nThe suite `integration-tests recovery` kills ten times as often under --full.\n";
        page += "\n## Failed and skipped\n\n```\n";
        page += &self.details();
        page + "```\n"
    }
}

impl Count {
    fn of<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Self {
        outcomes.fold(Self::default(), |mut count, outcome| {
            match outcome {
                Outcome::Passed => count.passed += 1,
                Outcome::Failed(_) => count.failed += 1,
                Outcome::Skipped(_) => count.skipped += 1,
            }
            count
        })
    }
}

impl std::fmt::Display for Count {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suite_without_tests_failed() {
        let mut report = Report::default();
        report.add("tiny", "a", Outcome::Skipped("no hardware".into()));
        report.expect("tiny");
        assert_eq!(report.count().failed, 0);
        report.expect("linux");
        assert_eq!(report.count().failed, 1);
    }

    #[test]
    fn a_test_skipped_here_and_run_there_counts_once() {
        let mut report = Report::default();
        report.add("tiny", "a", Outcome::Skipped("no hardware".into()));
        report.add("tiny", "b", Outcome::Skipped("no hardware".into()));
        assert_eq!(report.skipped_in("tiny"), ["a", "b"]);
        report.add("tiny", "a", Outcome::Passed);
        report.add("tiny", "a", Outcome::Skipped("later".into()));
        assert_eq!(report.count().to_string(), "1 passed, 0 failed, 1 skipped");
        report.add("tiny", "a", Outcome::Failed("x".into()));
        report.add("tiny", "a", Outcome::Passed);
        assert_eq!(report.count().failed, 1);
    }
}
