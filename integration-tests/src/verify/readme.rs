//! The README's other command, as it stands there.

use super::cargo::cargo;
use super::libtest::Outcome;
use crate::host::HOST;
use crate::nested::agent::run_here;
use crate::nested::{Job, Stream};
use std::io::Write;
use std::time::Duration;

/// For the build of what the tests do not use, the boot of the nested runner, and the guest's.
const DEADLINE: Duration = Duration::from_secs(15 * 60);
/// How the last line begins.
const GOOD: &str = "demo: ok (host: ";

/// `cargo demo`: it succeeds, and its last line says so.
pub(super) fn demo() -> Outcome {
    let cargo = cargo();
    let mut job = Job::new(&[&cargo.get_program().to_string_lossy(), "demo"], DEADLINE);
    job.folder = crate::artifacts::workspace().to_owned();
    if let Ok(host) = std::env::var(HOST) {
        job.environment.insert(HOST.to_owned(), host);
    }
    let mut output = Vec::new();
    let ended = run_here(&job, &mut |stream, bytes| match stream {
        Stream::Out => output.extend_from_slice(bytes),
        // Nobody may be watching.
        Stream::Err => drop(std::io::stderr().write_all(bytes)),
    });
    judge(ended.success(), &String::from_utf8_lossy(&output))
}

fn judge(success: bool, output: &str) -> Outcome {
    match output.lines().last() {
        Some(last) if success && last.starts_with(GOOD) => Outcome::Passed,
        _ => Outcome::Failed(output.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_line_and_the_exit_code_together_say_yes() {
        let good = "guest | x\ndemo: ok (host: nested)\n";
        assert_eq!(judge(true, good), Outcome::Passed);
        for (success, output) in [
            (false, good),
            (true, "demo: ok (host: nested)\nmore\n"),
            (true, "demo: failed: x\n"),
            (true, ""),
        ] {
            assert_eq!(judge(success, output), Outcome::Failed(output.to_owned()));
        }
    }
}
