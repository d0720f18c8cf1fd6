//! Reads what test programs print: the standard harness and libtest-mimic speak alike.

/// One test's outcome.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    Passed,
    /// What the harness printed about it.
    Failed(String),
    /// Why it did not run.
    Skipped(String),
}

impl Outcome {
    /// Passed, unless there are any.
    pub(super) fn of_warnings(warnings: &[String]) -> Self {
        match warnings {
            [] => Self::Passed,
            warnings => Self::Failed(warnings.concat()),
        }
    }
}

/// Every `test NAME ... OUTCOME` in a harness's standard output, in order. Whatever a test itself
/// prints in between is passed over; a test that was begun and has no outcome failed.
pub(super) fn parse(output: &str) -> Vec<(String, Outcome)> {
    let mut outcomes: Vec<(String, Outcome)> = Vec::new();
    let mut begun: Option<String> = None;
    for line in output.lines() {
        let started = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "));
        match (started, begun.take()) {
            (Some((name, rest)), before) => {
                outcomes.extend(before.map(no_outcome));
                let name = name.trim().to_owned();
                match outcome(rest) {
                    Some(outcome) => outcomes.push((name, outcome)),
                    None => begun = Some(name),
                }
            }
            (None, Some(name)) => match outcome(line) {
                Some(outcome) => outcomes.push((name, outcome)),
                None => begun = Some(name),
            },
            (None, None) => {}
        }
    }
    outcomes.extend(begun.map(no_outcome));
    explain(&mut outcomes, output);
    outcomes
}

/// How many tests the harness said that it would run: `running 3 tests`.
pub(super) fn announced(output: &str) -> Option<usize> {
    output.lines().find_map(|line| {
        let (count, word) = line.strip_prefix("running ")?.split_once(' ')?;
        matches!(word, "test" | "tests")
            .then(|| count.parse().ok())
            .flatten()
    })
}

fn no_outcome(name: String) -> (String, Outcome) {
    let why = "it has no outcome: the test program died in it".to_owned();
    (name, Outcome::Failed(why))
}

/// `ok`, `FAILED`, `ignored`, `ignored, REASON`, `ignored (REASON)`.
fn outcome(text: &str) -> Option<Outcome> {
    let text = text.trim();
    match text {
        "ok" => return Some(Outcome::Passed),
        "FAILED" => return Some(Outcome::Failed(String::new())),
        _ => {}
    }
    let rest = text.strip_prefix("ignored")?;
    let reason = rest
        .strip_prefix(", ")
        .or_else(|| rest.strip_prefix(" (")?.strip_suffix(')'));
    match (rest, reason) {
        ("", _) => Some(Outcome::Skipped("no reason given".to_owned())),
        (_, Some(reason)) => Some(Outcome::Skipped(reason.to_owned())),
        _ => None,
    }
}

/// Adds what stands below `---- NAME ----` (or `---- NAME stdout ----`) to the failed tests.
fn explain(outcomes: &mut [(String, Outcome)], output: &str) {
    for (name, outcome) in outcomes {
        let Outcome::Failed(text) = outcome else { continue };
        let headers = [
            format!("---- {name} ----\n"),
            format!("---- {name} stdout ----\n"),
        ];
        let Some(start) = headers
            .iter()
            .find_map(|header| Some(output.find(header)? + header.len()))
        else {
            continue;
        };
        let end = ["\n---- ", "\nfailures:"]
            .iter()
            .filter_map(|mark| output[start..].find(mark))
            .min();
        let section = &output[start..end.map_or(output.len(), |end| start + end)];
        section.trim().clone_into(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skipped(reason: &str) -> Outcome {
        Outcome::Skipped(reason.to_owned())
    }

    #[test]
    fn both_harnesses_are_read() {
        let output = "running 4 tests\ntest a::b ... ok\ntest slow ... ignored, takes an hour\n\
                      test needs kvm    ... ignored (no /dev/kvm)\ntest bare ... ignored\n\n\
                      test result: ok. 1 passed; 0 failed\n";
        let expected = [
            ("a::b", Outcome::Passed),
            ("slow", skipped("takes an hour")),
            ("needs kvm", skipped("no /dev/kvm")),
            ("bare", skipped("no reason given")),
        ];
        assert_eq!(
            parse(output),
            expected.map(|(name, outcome)| (name.to_owned(), outcome))
        );
    }

    #[test]
    fn a_failure_comes_with_its_message() {
        let output = "test x ... FAILED\ntest y ... FAILED\n\nfailures:\n\n---- x stdout ----\nassertion\n\n\
                      ---- y ----\nmissing\n\n\nfailures:\n    x\n    y\n";
        let outcomes = parse(output);
        assert_eq!(outcomes[0].1, Outcome::Failed("assertion".to_owned()));
        assert_eq!(outcomes[1].1, Outcome::Failed("missing".to_owned()));
    }

    #[test]
    fn what_is_to_come_is_read() {
        for (output, count) in [
            ("\nrunning 1 test\ntest a ... ok\n", Some(1)),
            ("running 12 tests\n", Some(12)),
            ("running fast tests\nrunning 0 tests\n", Some(0)),
            ("test a ... ok\n", None),
        ] {
            assert_eq!(announced(output), count, "{output}");
        }
    }

    #[test]
    fn output_of_a_test_and_a_dead_program_do_not_hide_tests() {
        let outcomes = parse("test loud ... hello\nworld\nok\ntest dies ... \n");
        assert_eq!(outcomes[0], ("loud".to_owned(), Outcome::Passed));
        assert!(matches!(&outcomes[1].1, Outcome::Failed(why) if why.contains("died")));
    }
}
