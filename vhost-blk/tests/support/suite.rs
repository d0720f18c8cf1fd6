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
        if Command::new("qemu-img").arg("--version").output().is_err() {
            return Ok(Completion::ignored_with("qemu-img is not installed"));
        }
        body();
        Ok(Completion::Completed)
    })
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

/// The test program's entry point: names of its tests, first those that need qemu-img.
#[macro_export]
macro_rules! suite {
    (with_qemu_img: [$($qemu:ident),* $(,)?], alone: [$($alone:ident),* $(,)?] $(,)?) => {
        fn main() -> std::process::ExitCode {
            support::suite::run(vec![
                $(support::suite::test_with_qemu_img(stringify!($qemu), $qemu),)*
                $(support::suite::test(stringify!($alone), $alone),)*
            ])
        }
    };
}
