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

/// Runs the tests that the command line asks for.
pub fn run(tests: Vec<Trial>) -> ExitCode {
    libtest_mimic::run(&Arguments::from_args(), tests).exit_code()
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
