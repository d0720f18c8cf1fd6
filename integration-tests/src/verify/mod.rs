//! `cargo verify`: every check and every tier that this host can run, counted.

mod cargo;
mod fuzzing;
mod libtest;
mod licences;
mod place;
mod readme;
mod report;

pub use place::FULL;

use crate::artifacts::{self, Artifacts, PROBE_NAMES, Profile, copy_for_all, workspace};
use crate::host::Host;
use crate::interrupt;
use crate::linux::Images;
use crate::scratch::Scratch;
use crate::setup::{self, Purpose};
use anyhow::Context;
use cargo::TestProgram;
use libtest::Outcome;
use place::{NestedTests, Places};
use report::{Report, SuiteRun};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Instant;

/// Part of the names of tests that hardly use a processor, and do not mind that others do.
const WAITS: &str = "(waits)";

/// How the tests of a tier choose where they run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Needs {
    /// No KVM.
    Nothing,
    /// Any KVM.
    Kvm,
    /// A KVM that runs stock kernels.
    LinuxKvm,
}

impl Needs {
    fn met_by(self, host: Host) -> bool {
        match self {
            Self::Nothing => true,
            Self::Kvm => host != Host::None,
            Self::LinuxKvm => host.runs_linux(),
        }
    }
}

/// Installs the packages that the tests need and the machine lacks.
///
/// # Errors
/// Some cannot be installed.
pub fn set_up() -> anyhow::Result<()> {
    setup::install_missing(Purpose::Tests)?;
    Ok(artifacts::ensure_targets()?)
}

/// Runs everything and prints the closing line; whether all went well.
///
/// # Errors
/// Something could not be installed or built, so that there is nothing to count.
pub fn run(full: bool) -> anyhow::Result<bool> {
    interrupt::heed()?;
    let start = Instant::now();
    let host = Host::detect()?;
    let nested = if host.runs_linux() {
        String::new()
    } else {
        format!(" ({}); Linux guests run nested", host.lack())
    };
    eprintln!("verify: host's KVM: {host}{nested}");
    setup::usual_umask();
    set_up()?;
    let binaries = Scratch::make("verify")?;
    // Some tests run as a user who owns nothing.
    std::fs::set_permissions(binaries.path(), Permissions::from_mode(0o755))?;
    copy_for_all(
        Path::new("/proc/self/exe"),
        &binaries.path().join(place::AGENT_FILE),
    )?;
    let mut report = Report::default();
    report.add_suite(check("formatting", cargo::formatting));
    eprintln!("verify: building the release binaries and the tests");
    let programs = build(binaries.path(), &mut report)?;
    tests(&mut report, &programs, binaries.path(), host, full);
    let minutes = start.elapsed().as_secs().div_ceil(60);
    if full {
        record(
            &mut report,
            &workspace().join("docs/verify-full.md"),
            host,
            minutes,
        );
    }
    let count = report.count();
    println!("\n{}verify: {minutes} minutes\n{count}", report.details());
    Ok(count.failed == 0)
}

/// Writes the page; where that fails, it is one more thing that did, and the result is printed all the same.
fn record(report: &mut Report, file: &Path, host: Host, minutes: u64) {
    let written = today().and_then(|date| {
        let page = report.page(&date, &host.to_string(), minutes);
        std::fs::write(file, page).with_context(|| format!("cannot write {}", file.display()))
    });
    if let Err(error) = written {
        report.add(
            "workspace",
            "this result's page",
            Outcome::Failed(format!("{error:#}")),
        );
    }
}

/// Builds everything under test into `folder`, and the test programs, and checks what needs no test program; two
/// things at a time, since each has stretches in which it keeps one processor busy.
fn build(folder: &Path, report: &mut Report) -> anyhow::Result<Vec<TestProgram>> {
    thread::scope(|scope| {
        let release = scope.spawn(|| Artifacts::build(Profile::Release));
        Images::write(&folder.join(place::IMAGES_FILE)).context("the test guests' images")?;
        stage_probes(&folder.join(place::PROBES_FOLDER)).context("the audit's probes")?;
        let (programs, clippy) = cargo::build_tests()?;
        report.add_suite(SuiteRun::of("workspace", "clippy", || {
            vec![("clippy".to_owned(), clippy)]
        }));
        checks(report);
        let release = release.join().expect("to run cargo does not panic");
        release?.copy_to(folder)?;
        Ok(programs)
    })
}

/// Builds the audit's probes and copies them to `folder`, which the nested runner sees.
fn stage_probes(folder: &Path) -> anyhow::Result<()> {
    // This program is in target/debug: the same place where the audit would build them itself.
    let program = std::env::current_exe()?;
    let target = program
        .ancestors()
        .nth(2)
        .context("a program outside a target folder")?;
    let built = artifacts::build_probes(&target.join("tmp/probes"))?;
    std::fs::create_dir(folder)?;
    for name in PROBE_NAMES {
        copy_for_all(&built.join(name), &folder.join(name))?;
    }
    Ok(())
}

fn tests(report: &mut Report, programs: &[TestProgram], binaries: &Path, host: Host, full: bool) {
    let places = Places::new(binaries, full);
    let (units, tiers): (Vec<_>, Vec<_>) = programs.iter().partition(|program| !program.tier);
    let (nested, here): (Vec<_>, Vec<_>) = tiers
        .into_iter()
        .partition(|program| !needs(program).met_by(host));
    let tests = NestedTests::of(&places, &nested, "");
    thread::scope(|scope| {
        // An emulated machine has one processor. What runs here is beside it, and then a second machine.
        scope.spawn(|| tests.work());
        if !full {
            with_kvm(report, &here, &places);
            // Early, while there is a machine that can take them.
            tests.extend(skipped(report, &here, host));
        }
        report.add_suite(SuiteRun::of("fuzz", "host", || fuzzing::targets(full)));
        let without_kvm = here.iter().filter(|program| needs(program) == Needs::Nothing);
        for program in units.into_iter().chain(without_kvm.copied()) {
            report.add_suite(places.here(program, &[]));
        }
        report.add_suite(SuiteRun::of("README", "cargo demo", || {
            vec![("cargo demo".to_owned(), readme::demo())]
        }));
        tests.work();
    });
    add_all(report, tests);
    if full {
        // The limits of what the guest notices hold on a quiet machine.
        with_kvm(report, &here, &places);
        let tests = NestedTests::named(&places, skipped(report, &here, host));
        tests.work();
        add_all(report, tests);
    }
    programs
        .iter()
        .filter(|program| program.tier)
        .for_each(|program| report.expect(&program.suite));
    if full && host == Host::Software {
        // The walls once more on a kernel with all that Debian's has. Elsewhere the tier itself runs on it.
        let tiny: Vec<_> = here
            .iter()
            .copied()
            .filter(|program| program.target == "tiny")
            .collect();
        add_full(report, "nested", NestedTests::of(&places, &tiny, "audit::"));
    }
    if full {
        // Those that fail with the jail on only have found a fault of the jail's.
        let places = places.unjailed();
        for program in &here {
            report.add_suite(places.here(program, &["--test-threads=1"]).full_only("jail off"));
        }
        add_full(report, "nested, jail off", NestedTests::of(&places, &nested, ""));
    }
}

fn add_all(report: &mut Report, tests: NestedTests<'_>) {
    tests
        .into_runs()
        .into_iter()
        .for_each(|run| report.add_suite(run));
}

/// Runs tests in two machines, under names that say how they differ from the usual ones.
fn add_full(report: &mut Report, how: &str, tests: NestedTests<'_>) {
    thread::scope(|scope| {
        scope.spawn(|| tests.work());
        tests.work();
    });
    for run in tests.into_runs() {
        report.add_suite(run.full_only(how));
    }
}

/// The tiers that this host's KVM runs.
fn with_kvm(report: &mut Report, here: &[&TestProgram], places: &Places) {
    for program in here.iter().filter(|program| needs(program) != Needs::Nothing) {
        one_by_one(report, program, places);
    }
}

/// Runs tests one after the other, but for those that wait for the most part: they run beside the others.
fn one_by_one(report: &mut Report, program: &TestProgram, places: &Places) {
    let (others, waiting) = thread::scope(|scope| {
        let waiting = scope.spawn(|| places.here(program, &["--test-threads=4", WAITS]));
        let others = places.here(program, &["--test-threads=1", "--skip", WAITS]);
        let waiting = waiting.join();
        (others, waiting.expect("to run a program does not panic"))
    });
    report.add_suite(others);
    report.add_suite(waiting);
}

/// What needs no test program.
fn checks(report: &mut Report) {
    type Check = fn() -> Outcome;
    let checks: [(&str, Check); 3] = [
        ("clippy, bare metal", cargo::clippy_bare_metal),
        ("licences", licences::licences),
        ("advisories", licences::advisories),
    ];
    for (name, run) in checks {
        report.add_suite(check(name, run));
    }
}

fn check(name: &'static str, run: fn() -> Outcome) -> SuiteRun {
    SuiteRun::of("workspace", name, || vec![(name.to_owned(), run())])
}

/// What this host's KVM could not run, and the nested runner's may.
fn skipped<'a>(report: &Report, here: &[&'a TestProgram], host: Host) -> Vec<(&'a TestProgram, String)> {
    let of_kvm = here.iter().filter(|program| needs(program) == Needs::Kvm);
    let of_kvm = of_kvm.filter(|_| !host.runs_linux());
    let skipped = of_kvm.flat_map(|program| {
        let tests = report.skipped_in(&program.suite).into_iter();
        tests.map(|test| (*program, test))
    });
    skipped.collect()
}

fn needs(program: &TestProgram) -> Needs {
    match (program.tier, program.target.as_str()) {
        (true, "tiny" | "recovery") => Needs::Kvm,
        (true, target) if target.starts_with("linux") => Needs::LinuxKvm,
        _ => Needs::Nothing,
    }
}

fn today() -> anyhow::Result<String> {
    let output = Command::new("date")
        .args(["-u", "+%Y-%m-%d"])
        .output()
        .context("date")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_cannot_be_written_takes_no_result_along() {
        let scratch = tempfile::tempdir().unwrap();
        let mut report = Report::default();
        report.add("tiny", "a", Outcome::Passed);
        let file = scratch.path().join("page.md");
        record(&mut report, &file, Host::Hardware, 7);
        assert!(std::fs::read_to_string(&file).unwrap().contains("7 minutes"));
        assert_eq!(report.count().to_string(), "1 passed, 0 failed, 0 skipped");
        record(&mut report, &file.join("none"), Host::Hardware, 7);
        assert_eq!(report.count().to_string(), "1 passed, 1 failed, 0 skipped");
        let details = report.details();
        assert!(details.contains("page.md/none: Not a directory"), "{details}");
    }
}
