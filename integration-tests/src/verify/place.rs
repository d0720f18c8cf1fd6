//! Where test programs run: on this host, or in one boot of the nested runner.

use super::cargo::TestProgram;
use super::libtest::{self, Outcome};
use super::report::SuiteRun;
use crate::artifacts::{BIN_DIR, PROBES};
use crate::linux::IMAGES;
use crate::nested::{Ended, Job, Nested, Options, Stream};
use crate::suite::JAIL;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Tells tests to run their whole matrices.
pub const FULL: &str = "BULKHEAD_FULL";
/// The list of the test guests' images, in the folder with everything under test.
pub(super) const IMAGES_FILE: &str = "test-images.json";
/// The audit's probes, in the same folder.
pub(super) const PROBES_FOLDER: &str = "probes";
/// A copy of this program in the same folder: building the tests replaces the original.
pub(super) const AGENT_FILE: &str = "nested-agent";
/// How long one test program may take.
const PROGRAM: Duration = Duration::from_secs(40 * 60);
/// How long one may take under `--full`.
const PROGRAM_FULL: Duration = Duration::from_secs(3 * 3600);

/// How test programs run, wherever they do.
#[derive(Debug)]
pub(super) struct Places {
    binaries: PathBuf,
    full: bool,
    jail: bool,
}

impl Places {
    /// `binaries` is the folder with everything under test.
    pub(super) fn new(binaries: &Path, full: bool) -> Self {
        Self {
            binaries: binaries.to_owned(),
            full,
            jail: true,
        }
    }

    /// As these, with no jail around what is under test and in the usual sizes: a fault shows in them.
    pub(super) fn unjailed(&self) -> Self {
        Self {
            binaries: self.binaries.clone(),
            full: false,
            jail: false,
        }
    }

    /// Runs a program on this host.
    pub(super) fn here(&self, program: &TestProgram, arguments: &[&str]) -> SuiteRun {
        let job = self.job(program, arguments);
        SuiteRun::of(&program.suite, "host", || watch(program, &job))
    }

    fn job(&self, program: &TestProgram, arguments: &[&str]) -> Job {
        let path = program.path.to_string_lossy();
        let argv: Vec<&str> = std::iter::once(&*path).chain(arguments.iter().copied()).collect();
        let mut job = Job::new(&argv, if self.full { PROGRAM_FULL } else { PROGRAM });
        job.folder.clone_from(&program.folder);
        job.environment
            .insert(BIN_DIR.to_owned(), self.binaries.to_string_lossy().into_owned());
        job.environment.insert(
            "CARGO_MANIFEST_DIR".to_owned(),
            program.folder.to_string_lossy().into_owned(),
        );
        job.environment.insert(
            PROBES.to_owned(),
            self.binaries.join(PROBES_FOLDER).to_string_lossy().into_owned(),
        );
        let images = self.binaries.join(IMAGES_FILE);
        job.environment
            .insert(IMAGES.to_owned(), images.to_string_lossy().into_owned());
        if self.full {
            job.environment.insert(FULL.to_owned(), "1".to_owned());
        }
        if !self.jail {
            job.environment.insert(JAIL.to_owned(), "off".to_owned());
        }
        job
    }
}

/// Runs test programs in one boot of the nested runner.
#[derive(Debug)]
pub(super) struct NestedPlace<'a> {
    places: &'a Places,
    /// Booted when first needed; the error of a failed boot is kept.
    nested: Option<Result<Nested, String>>,
}

impl<'a> NestedPlace<'a> {
    /// For the same programs as `places`.
    pub(super) fn new(places: &'a Places) -> Self {
        Self { places, nested: None }
    }

    /// Runs a program. Where the emulated machine itself dies, which is no verdict on any test, the tests
    /// that it had not finished run in another, once.
    pub(super) fn run(&mut self, program: &TestProgram, arguments: &[&str]) -> SuiteRun {
        SuiteRun::of(&program.suite, "nested", || self.outcomes(program, arguments))
    }

    fn outcomes(&mut self, program: &TestProgram, arguments: &[&str]) -> Vec<(String, Outcome)> {
        let mut known = Vec::new();
        let mut arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        for another in [true, false] {
            let (finished, death) = self.once(program, &arguments);
            known.extend(finished);
            let Some(death) = death else { break };
            if !another {
                known.push(whole(program, death));
                break;
            }
            eprintln!(
                "verify: the nested runner died in {}: its other tests run in a new one: {death}",
                program.suite
            );
            // With a filter that is a part of names, what is skipped is one too.
            if arguments.iter().all(|argument| argument.starts_with("--")) {
                arguments.push("--exact".to_owned());
            }
            for (test, _) in &known {
                arguments.extend(["--skip".to_owned(), test.clone()]);
            }
        }
        known
    }

    /// The tests that finished, and what the runner died of, if it did.
    fn once(
        &mut self,
        program: &TestProgram,
        arguments: &[String],
    ) -> (Vec<(String, Outcome)>, Option<String>) {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut job = self.places.job(program, &arguments);
        job.environment.extend(Job::nested_environment());
        let options = Options {
            agent: Some(self.places.binaries.join(AGENT_FILE)),
            ..Options::default()
        };
        let boot = || Nested::boot(&options).map_err(|error| format!("{error:#}"));
        let nested = match self.nested.get_or_insert_with(boot) {
            Ok(nested) => nested,
            Err(error) => return (vec![whole(program, error.clone())], None),
        };
        let mut output = Vec::new();
        match nested.run(&job, &mut |stream, bytes| keep(&mut output, stream, bytes)) {
            Ok(ended) => (outcomes(program, &output, &ended), None),
            Err(error) => {
                // Whoever comes next gets a fresh boot.
                self.nested = None;
                let mut finished = libtest::parse(&String::from_utf8_lossy(&output));
                finished.retain(|(_, outcome)| *outcome != libtest::no_verdict());
                (finished, Some(format!("{error:#}")))
            }
        }
    }
}

/// With the same watch as in the nested runner: a process group with a deadline.
fn watch(program: &TestProgram, job: &Job) -> Vec<(String, Outcome)> {
    let mut output = Vec::new();
    let ended = crate::nested::agent::run_here(job, &mut |stream, bytes| keep(&mut output, stream, bytes));
    outcomes(program, &output, &ended)
}

/// Standard output is what the harness says; standard error is passed on as it comes.
fn keep(output: &mut Vec<u8>, stream: Stream, bytes: &[u8]) {
    match stream {
        Stream::Out => output.extend_from_slice(bytes),
        Stream::Err => {
            use std::io::Write;
            // Nobody may be watching.
            let _ = std::io::stderr().write_all(bytes);
        }
    }
}

fn outcomes(program: &TestProgram, output: &[u8], ended: &Ended) -> Vec<(String, Outcome)> {
    let output = String::from_utf8_lossy(output);
    let mut outcomes = libtest::parse(&output);
    let failed = outcomes
        .iter()
        .any(|(_, outcome)| matches!(outcome, Outcome::Failed(_)));
    // A program that fails without a failed test, or is killed, is a failure of its own.
    if !ended.success() && (!failed || !matches!(ended, Ended::Exited(_))) {
        outcomes.push(whole(program, format!("the test program ended with {ended:?}")));
    } else if let Some(lack) = lack(libtest::announced(&output), outcomes.len()) {
        outcomes.push(whole(program, format!("{lack}; it ended with {ended:?}")));
    }
    outcomes
}

/// A program that ended in the middle, however well, or said less than it ran.
fn lack(announced: Option<usize>, told: usize) -> Option<String> {
    match announced {
        Some(count) if told >= count => None,
        Some(count) => Some(format!("of {count} tests {told} have an outcome")),
        None => Some("the test program did not say how many tests it has".to_owned()),
    }
}

fn whole(program: &TestProgram, why: String) -> (String, Outcome) {
    (format!("{} as a whole", program.suite), Outcome::Failed(why))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How a test program that prints this and ends so is counted: its tests that failed.
    fn failures(output: &str, ended: &Ended) -> Vec<String> {
        let program = TestProgram {
            suite: "suite".to_owned(),
            target: "target".to_owned(),
            tier: true,
            path: PathBuf::new(),
            folder: PathBuf::new(),
        };
        let outcomes = outcomes(&program, output.as_bytes(), ended);
        let failed = outcomes
            .into_iter()
            .filter(|(_, outcome)| matches!(outcome, Outcome::Failed(_)));
        failed.map(|(name, _)| name).collect()
    }

    #[test]
    fn a_program_that_says_all_it_announced_is_no_failure() {
        let good = "running 2 tests\ntest a ... ok\ntest b ... ignored\n";
        assert!(failures(good, &Ended::Exited(0)).is_empty());
        assert!(failures("running 0 tests\n", &Ended::Exited(0)).is_empty());
        assert_eq!(
            failures(&good.replace("ok", "FAILED"), &Ended::Exited(101)),
            ["a"]
        );
    }

    #[test]
    fn a_program_that_ends_half_way_failed_whatever_its_status() {
        let cut = "running 3 tests\ntest a ... ok\n";
        let whole = "suite as a whole";
        for ended in [
            Ended::Exited(0),
            Ended::Exited(1),
            Ended::Signalled(9),
            Ended::TimedOut,
        ] {
            assert_eq!(failures(cut, &ended), [whole], "{ended:?}");
            assert_eq!(failures("", &ended), [whole], "{ended:?}");
        }
        let failed = cut.replace("ok", "FAILED");
        assert_eq!(failures(&failed, &Ended::Exited(101)), ["a", whole]);
    }
}
