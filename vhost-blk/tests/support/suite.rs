//! Tests that say at run time why they cannot run here.

use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

/// A test that needs nothing but this process.
pub fn test(name: &str, body: fn()) -> Trial {
    // A panic is caught, and reported as the test's failure, by the harness.
    Trial::test(name, move || {
        body();
        Ok::<(), Failed>(())
    })
}

/// A test that uses qemu-img as the second opinion, ignored where there is none.
pub fn test_with_qemu_img(name: &str, body: fn()) -> Trial {
    Trial::ignorable_test(name, move || {
        if let Some(ignored) = no_qemu_img() {
            return Ok(ignored);
        }
        body();
        Ok(Completion::Completed)
    })
}

/// Why a test that uses qemu-img cannot run here, if so.
pub fn no_qemu_img() -> Option<Completion> {
    let lacks = Command::new("qemu-img").arg("--version").output().is_err();
    lacks.then(|| Completion::ignored_with("qemu-img is not installed"))
}

/// A test that finds out itself whether it can run here.
pub fn test_if_possible(name: &str, body: fn() -> Completion) -> Trial {
    Trial::ignorable_test(name, move || Ok::<Completion, Failed>(body()))
}

/// Runs the tests that the command line asks for, one at a time unless it says otherwise: a process that
/// another test starts holds a copy of this test's locked descriptors from its fork to its exec.
pub fn run(tests: Vec<Trial>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(1));
    libtest_mimic::run(&arguments, tests).exit_code()
}

/// The name of a test in this module: without the program's.
pub fn name(module: &str, test: &str) -> String {
    match module.split_once("::") {
        Some((_, module)) => format!("{module}::{test}"),
        None => test.to_owned(),
    }
}

/// The tests of a module, by name, first those that need qemu-img.
#[macro_export]
macro_rules! suite {
    (with_qemu_img: [$($qemu:ident),* $(,)?], alone: [$($alone:ident),* $(,)?] $(,)?) => {
        pub(crate) fn tests() -> Vec<libtest_mimic::Trial> {
            use $crate::support::suite;
            vec![
                $(suite::test_with_qemu_img(&suite::name(module_path!(), stringify!($qemu)), $qemu),)*
                $(suite::test(&suite::name(module_path!(), stringify!($alone)), $alone),)*
            ]
        }
    };
}
