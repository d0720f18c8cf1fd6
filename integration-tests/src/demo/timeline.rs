//! When what happened, in milliseconds since the launch.

use nix::time::{ClockId, clock_gettime};
use std::fmt::Write;

/// Prefix of the guest's own reports.
const REPORT: &str = "demo: ";

/// Now, in CLOCK_MONOTONIC nanoseconds: the clock of [`vm_spec::run_state::RunState`].
pub(super) fn now() -> u64 {
    // The clock exists on every Linux; 0 would only spoil a figure.
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(std::time::Duration::from)
        .unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What a console line says about the guest's progress.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Report {
    /// It reached a step, at this kernel uptime in nanoseconds.
    Step(String, u64),
    /// It failed to do something.
    Failed(String),
}

/// Reads the guest's report from a console line, if it is one.
pub(super) fn report(line: &str) -> Option<Report> {
    let words = line
        .trim_end()
        .split_once(REPORT)
        .filter(|(before, _)| before.is_empty())?
        .1;
    if let Some(what) = words.strip_prefix("failed ") {
        return Some(Report::Failed(what.to_owned()));
    }
    let (step, uptime) = words.rsplit_once(' ')?;
    let seconds: f64 = uptime
        .parse()
        .ok()
        .filter(|seconds| (0.0..1e9).contains(seconds))?;
    Some(Report::Step(step.to_owned(), (seconds * 1e9) as u64))
}

/// Moments with their names.
#[derive(Debug)]
pub(super) struct Timeline {
    launch: u64,
    moments: Vec<(u64, String)>,
}

impl Timeline {
    /// Starts at the launch.
    pub(super) fn new(launch: u64) -> Self {
        Self {
            launch,
            moments: vec![(launch, "launch".to_owned())],
        }
    }

    /// Adds a moment in CLOCK_MONOTONIC nanoseconds.
    pub(super) fn add(&mut self, at: u64, what: &str) {
        self.moments.push((at, what.to_owned()));
    }

    /// One line a moment, in their order.
    pub(super) fn render(&self) -> String {
        let mut moments = self.moments.clone();
        moments.sort();
        let mut text = "timeline (ms since launch)\n".to_owned();
        for (at, what) in moments {
            // Writing to a String does not fail.
            let _ = writeln!(
                text,
                "{:>9.1}  {what}",
                at.saturating_sub(self.launch) as f64 / 1e6
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_reports_and_nothing_else() {
        assert_eq!(
            report("demo: disk 1.50\r\n"),
            Some(Report::Step("disk".into(), 1_500_000_000))
        );
        assert_eq!(
            report("demo: failed to do it"),
            Some(Report::Failed("to do it".into()))
        );
        assert_eq!(report("x demo: disk 1.5"), None);
        assert_eq!(report("demo: disk -1"), None);
        assert_eq!(report("hello"), None);
    }

    #[test]
    fn moments_come_out_in_order() {
        let mut timeline = Timeline::new(1_000_000);
        timeline.add(4_000_000, "later");
        timeline.add(2_500_000, "sooner");
        let text = timeline.render();
        assert!(text.contains("      1.5  sooner\n      3.0  later\n"), "{text}");
    }
}
