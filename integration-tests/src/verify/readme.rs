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
    use crate::artifacts::workspace;

    /// What stands in `text` between `before` and `after`, wherever it does.
    fn between<'a>(text: &'a str, before: &'a str, after: &'a str) -> impl Iterator<Item = &'a str> {
        let parts = text.split(before).skip(1);
        parts.filter_map(move |part| part.split_once(after).map(|(inner, _)| inner))
    }

    #[test]
    fn pages_lead_to_what_there_is() {
        let page = |name: &str| std::fs::read_to_string(workspace().join(name)).expect(name);
        let readme = page("README.md");
        let links: Vec<&str> = between(&readme, "](", ")").collect();
        assert!(links.contains(&"ARCHITECTURE.md"), "{links:?}");
        for link in links.iter().filter(|link| !link.contains(':')) {
            let about = workspace().join(link).metadata().expect(link);
            assert!(about.len() > 0, "{link} is empty");
        }
        // The code map: paths, but for those that name several at once.
        let map = page("ARCHITECTURE.md");
        let paths =
            between(&map, "`", "`").filter(|path| path.contains("/src/") && !path.contains(['{', '*']));
        let missing: Vec<&str> = paths.filter(|path| !workspace().join(path).exists()).collect();
        assert!(missing.is_empty(), "{missing:?}");
        assert!(map.contains("`vmm/src/frontend/`"), "a page without its code map");
    }

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
