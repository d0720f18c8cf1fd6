//! Runs targets, and reads what libFuzzer says.

use super::program::{CHOICE, Program, Target};
use std::fmt::Write;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Longest that one input may take, in seconds: longer is a hang.
const HANG: u32 = 10;
/// Most memory of a target, in MiB: more is a leak or a length that was believed.
const MEMORY: u32 = 1024;
/// Lines of libFuzzer's kept for a failure.
const TAIL: usize = 40;

/// How targets are run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Each target's time.
    pub each: Duration,
    /// Targets at the same time.
    pub jobs: usize,
    /// What becomes of inputs that reach something new.
    pub finds: Finds,
}

/// What becomes of inputs that reach something new.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finds {
    /// The next run begins with them.
    Kept,
    /// Every run begins with the repository's corpus alone.
    Dropped,
}

/// What became of a target.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Run {
    /// The target's name.
    pub target: String,
    /// Inputs that were executed.
    pub executions: u64,
    /// Edges of the program that were reached.
    pub edges: u64,
    /// Inputs that crashed, hung or took too much memory.
    pub crashes: Vec<PathBuf>,
    /// What libFuzzer said at the end, of a run that did not go well.
    pub said: String,
    /// libFuzzer ended as it does when all went well.
    pub ended_well: bool,
}

impl Run {
    /// Nothing was found, and something was executed.
    #[must_use]
    pub fn went_well(&self) -> bool {
        self.ended_well && self.crashes.is_empty() && self.executions > 0
    }

    /// Takes in one line of libFuzzer's.
    fn read(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let Some(place) = words.iter().position(|word| *word == "cov:") {
            let number = words.get(place + 1).and_then(|word| word.parse().ok());
            self.edges = number.unwrap_or(self.edges);
        }
        if let ["stat::number_of_executed_units:", count] = words.as_slice() {
            self.executions = count.parse().unwrap_or(0);
        }
        if let Some((_, path)) = line.split_once("Test unit written to ") {
            self.crashes.push(PathBuf::from(path.trim()));
        }
    }
}

impl Program {
    /// Runs `targets` in turn, `plan.jobs` at a time; in the order of `targets`.
    #[must_use]
    pub fn run_all(&self, targets: &[Target], plan: &Plan) -> Vec<Run> {
        let (next, runs) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..plan.jobs {
                scope.spawn(|| {
                    loop {
                        let place = next.fetch_add(1, Ordering::Relaxed);
                        let Some(target) = targets.get(place) else { break };
                        let run = self.run(target, plan);
                        if let Ok(mut runs) = runs.lock() {
                            runs.push((place, run));
                        }
                    }
                });
            }
        });
        let mut runs = runs.into_inner().unwrap_or_default();
        runs.sort_by_key(|(place, _)| *place);
        runs.into_iter().map(|(_, run)| run).collect()
    }

    fn run(&self, target: &Target, plan: &Plan) -> Run {
        let mut run = Run {
            target: target.name.clone(),
            ..Run::default()
        };
        if let Err(error) = self.watch(target, plan, &mut run) {
            run.said = error.to_string();
        }
        run
    }

    fn watch(&self, target: &Target, plan: &Plan, run: &mut Run) -> std::io::Result<()> {
        let crashes = self.folder.join("crashes").join(&target.name);
        let dropped = tempfile::tempdir()?;
        let found = match plan.finds {
            Finds::Kept => &target.found,
            Finds::Dropped => dropped.path(),
        };
        for folder in [&target.corpus, found, &crashes] {
            fs::create_dir_all(folder)?;
        }
        let mut child = Command::new(&self.path)
            .env(CHOICE, &target.name)
            .arg(format!("-max_total_time={}", plan.each.as_secs()))
            .arg(format!("-artifact_prefix={}/", crashes.display()))
            .args([format!("-timeout={HANG}"), format!("-rss_limit_mb={MEMORY}")])
            .args(["-print_final_stats=1", "-max_len=8192"])
            // What is found goes to the first folder.
            .args([found, &target.corpus])
            .current_dir(&crashes)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut said: Vec<String> = Vec::new();
        for line in child
            .stderr
            .take()
            .map(BufReader::new)
            .into_iter()
            .flat_map(BufReader::lines)
        {
            let line = line.unwrap_or_default();
            run.read(&line);
            if said.len() == TAIL {
                said.remove(0);
            }
            said.push(line);
        }
        run.ended_well = child.wait()?.success();
        if !run.went_well() {
            run.said = said.join("\n");
        }
        Ok(())
    }
}

/// A line for each target, then what was found.
#[must_use]
pub fn table(runs: &[Run]) -> String {
    let mut text = format!(
        "{:<16}{:>14}{:>10}{:>10}\n",
        "target", "executions", "edges", "crashes"
    );
    // Writing to a String does not fail.
    for run in runs {
        let (executions, edges) = (run.executions, run.edges);
        let _ = writeln!(
            text,
            "{:<16}{executions:>14}{edges:>10}{:>10}",
            run.target,
            run.crashes.len()
        );
    }
    for run in runs.iter().filter(|run| !run.went_well()) {
        let inputs: Vec<&Path> = run.crashes.iter().map(PathBuf::as_path).collect();
        let _ = writeln!(text, "\n{} failed, by {inputs:?}:\n{}", run.target, run.said);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_says_is_read() {
        let mut run = Run {
            ended_well: true,
            ..Run::default()
        };
        assert!(!run.went_well(), "nothing was executed");
        run.read("#2	INITED cov: 12 ft: 13 corp: 1/1b exec/s: 0 rss: 31Mb");
        run.read("#9	REDUCE cov: 15 ft: 13 corp: 1/1b exec/s: 0 rss: 31Mb");
        run.read("stat::number_of_executed_units: 4711");
        assert_eq!((run.executions, run.edges), (4711, 15));
        assert!(run.went_well());
        run.read("artifact_prefix='/c/'; Test unit written to /c/crash-1f");
        assert_eq!(run.crashes, [PathBuf::from("/c/crash-1f")]);
        assert!(!run.went_well() && table(&[run]).contains("/c/crash-1f"));
    }
}
