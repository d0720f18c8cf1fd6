//! Where test programs run: on this host, or in one boot of the nested runner.

use super::cargo::TestProgram;
use super::libtest::{self, Outcome};
use super::report::SuiteRun;
use crate::artifacts::{BIN_DIR, PROBES};
use crate::linux::IMAGES;
use crate::nested::agent::run_here;
use crate::nested::{Ended, Job, Nested, Options, Stream};
use crate::suite::JAIL;
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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

/// Tests for the nested runner, each in a run of its program, and what became of them. Any number of threads may
/// work on them, each with a machine of its own.
#[derive(Debug)]
pub(super) struct NestedTests<'a> {
    places: &'a Places,
    start: Instant,
    /// Why a thread had no machine and left its tests to others.
    unbooted: Mutex<String>,
    waiting: Mutex<VecDeque<(&'a TestProgram, String)>>,
    outcomes: Mutex<BTreeMap<&'a str, Vec<(String, Outcome)>>>,
}

impl<'a> NestedTests<'a> {
    /// The tests of some programs whose names contain `filter`.
    pub(super) fn of(places: &'a Places, programs: &[&'a TestProgram], filter: &str) -> Self {
        let tests = Self::named(places, Vec::new());
        for program in programs {
            let job = places.job(program, &["--list", filter]);
            let mut list = Vec::new();
            let ended = run_here(&job, &mut |stream, bytes| keep(&mut list, stream, bytes));
            let list = String::from_utf8_lossy(&list);
            let names: Vec<_> = list
                .lines()
                .filter_map(|line| line.strip_suffix(": test"))
                .collect();
            if !ended.success() || names.is_empty() {
                tests.add(
                    program,
                    vec![whole(program, format!("it lists no test: {ended:?}"))],
                );
            }
            lock(&tests.waiting).extend(names.iter().map(|name| (*program, (*name).to_owned())));
        }
        tests
    }

    /// These.
    pub(super) fn named(places: &'a Places, tests: Vec<(&'a TestProgram, String)>) -> Self {
        Self {
            places,
            start: Instant::now(),
            unbooted: Mutex::default(),
            waiting: Mutex::new(tests.into()),
            outcomes: Mutex::default(),
        }
    }

    /// Adds these.
    pub(super) fn extend(&self, tests: Vec<(&'a TestProgram, String)>) {
        lock(&self.waiting).extend(tests);
    }

    /// Runs one after the other until none waits, or no machine boots.
    pub(super) fn work(&self) {
        let mut machine = None;
        loop {
            let Some((program, test)) = lock(&self.waiting).pop_front() else {
                return;
            };
            let start = Instant::now();
            match self.run(&mut machine, program, &test) {
                Ok(outcomes) => {
                    // Each takes long enough that whoever watches wants to know.
                    eprintln!("  {test} ({} s)", start.elapsed().as_secs());
                    self.add(program, outcomes);
                }
                Err(error) => {
                    lock(&self.waiting).push_front((program, test));
                    *lock(&self.unbooted) = format!("{error:#}");
                    return;
                }
            }
        }
    }

    /// What became of them, by program, once nobody works on them any more.
    pub(super) fn into_runs(self) -> Vec<SuiteRun> {
        let why = lock(&self.unbooted).clone();
        for (program, test) in lock(&self.waiting).drain(..) {
            self.add(program, vec![(test, Outcome::Failed(why.clone()))]);
        }
        let outcomes = self.outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
        let run = |(suite, outcomes)| SuiteRun::since(self.start, suite, "nested", outcomes);
        outcomes.into_iter().map(run).collect()
    }

    fn add(&self, program: &'a TestProgram, outcomes: Vec<(String, Outcome)>) {
        lock(&self.outcomes)
            .entry(&program.suite)
            .or_default()
            .extend(outcomes);
    }

    /// Where the emulated machine itself dies, which is no verdict on any test, the test runs in another, once.
    ///
    /// # Errors
    /// No machine boots.
    fn run(
        &self,
        machine: &mut Option<Nested>,
        program: &TestProgram,
        test: &str,
    ) -> anyhow::Result<Vec<(String, Outcome)>> {
        let mut why = String::new();
        for _ in 0..2 {
            let mut nested = match machine.take() {
                Some(nested) => nested,
                None => self.boot()?,
            };
            match self.once(&mut nested, program, test) {
                Ok(outcomes) => {
                    *machine = Some(nested);
                    return Ok(outcomes);
                }
                Err(death) => why = format!("the nested runner died: {death:#}"),
            }
            eprintln!("verify: {}: {test}: {why}", program.suite);
        }
        Ok(vec![(test.to_owned(), Outcome::Failed(why))])
    }

    fn boot(&self) -> anyhow::Result<Nested> {
        Nested::boot(&Options {
            agent: Some(self.places.binaries.join(AGENT_FILE)),
            ..Options::default()
        })
    }

    fn once(
        &self,
        nested: &mut Nested,
        program: &TestProgram,
        test: &str,
    ) -> anyhow::Result<Vec<(String, Outcome)>> {
        let mut job = self.places.job(program, &["--test-threads=1", "--exact", test]);
        job.environment.extend(Job::nested_environment());
        let mut output = Vec::new();
        let ended = nested.run(&job, &mut |stream, bytes| keep(&mut output, stream, bytes))?;
        let mut outcomes = outcomes(program, &output, &ended);
        if outcomes.is_empty() {
            outcomes.push((test.to_owned(), Outcome::Failed("it did not run".to_owned())));
        }
        Ok(outcomes)
    }
}

/// A panic elsewhere leaves what is locked whole.
fn lock<T>(list: &Mutex<T>) -> MutexGuard<'_, T> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

/// With the same watch as in the nested runner: a process group with a deadline.
fn watch(program: &TestProgram, job: &Job) -> Vec<(String, Outcome)> {
    let mut output = Vec::new();
    let ended = run_here(job, &mut |stream, bytes| keep(&mut output, stream, bytes));
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
