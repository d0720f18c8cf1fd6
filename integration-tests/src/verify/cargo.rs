//! What cargo itself checks and builds.

use super::libtest::Outcome;
use crate::artifacts::workspace;
use crate::lint;
use anyhow::ensure;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Most bytes of cargo's output that a failure repeats.
const TAIL: usize = 6000;

/// A built test program.
#[derive(Clone, Debug)]
pub(super) struct TestProgram {
    /// Package and target, such as `vmm lib` or `integration-tests linux`.
    pub(super) suite: String,
    /// The target's name.
    pub(super) target: String,
    /// It is a file (or folder) in `tests/` of the package `integration-tests`.
    pub(super) tier: bool,
    pub(super) path: PathBuf,
    /// The package's folder, where cargo would run it.
    pub(super) folder: PathBuf,
}

pub(super) fn cargo() -> Command {
    in_workspace(Command::new(program()))
}

/// One that lets everything else go first.
fn yielding_cargo() -> Command {
    let mut nice = Command::new("nice");
    nice.arg(program());
    in_workspace(nice)
}

fn program() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

fn in_workspace(mut command: Command) -> Command {
    command.current_dir(workspace()).stdin(Stdio::null());
    command
}

/// Formatting of the whole workspace.
pub(super) fn formatting() -> Outcome {
    check(cargo().args(["fmt", "--all", "--", "--check"]))
}

/// Clippy on the guest that runs on no system.
pub(super) fn clippy_bare_metal() -> Outcome {
    let target = [
        "clippy",
        "--quiet",
        "-p",
        "tiny-guest",
        "--target",
        "x86_64-unknown-none",
        "--",
        "-D",
        "warnings",
    ];
    check(cargo().args(target))
}

fn check(command: &mut Command) -> Outcome {
    match command.output() {
        Ok(output) if output.status.success() => Outcome::Passed,
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            let start = text.len().saturating_sub(TAIL);
            Outcome::Failed(String::from_utf8_lossy(&text[start..]).into_owned())
        }
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// Builds every test program of the workspace, and everything else that runs on this system, by clippy, which
/// compiles and lints in one; what it says of our code is the outcome.
///
/// # Errors
/// Something does not compile; cargo has said what on standard error.
pub(super) fn build_tests() -> anyhow::Result<(Vec<TestProgram>, Outcome)> {
    // The release binaries are built meanwhile, in long stretches that keep one processor busy: those go first.
    let mut build = yielding_cargo();
    build.args(["test", "--quiet", "--workspace", "--no-run"]);
    build.args(["--tests", "--bench=launch", "--example=jail_probe"]);
    build.arg("--message-format=json");
    let built = lint::build(&mut build)?;
    let programs: Vec<_> = built.messages.iter().filter_map(test_program).collect();
    ensure!(
        programs.iter().any(|program| program.tier),
        "cargo named no test program of any tier"
    );
    Ok((programs, Outcome::of_warnings(&built.warnings)))
}

fn test_program(message: &Value) -> Option<TestProgram> {
    let path = PathBuf::from(message["executable"].as_str()?);
    if message["profile"]["test"] != Value::Bool(true) {
        return None;
    }
    let manifest = PathBuf::from(message["manifest_path"].as_str()?);
    let folder = manifest.parent()?.to_owned();
    let package = folder.file_name()?.to_str()?;
    let target = message["target"]["name"].as_str()?;
    let kind = message["target"]["kind"][0].as_str()?;
    if matches!(kind, "bench" | "example") {
        return None;
    }
    let suite = match kind {
        "lib" => format!("{package} lib"),
        "bin" => format!("{package} bin {target}"),
        _ => format!("{package} {target}"),
    };
    let tier = kind == "test" && package == "integration-tests";
    Some(TestProgram {
        suite,
        target: target.to_owned(),
        tier,
        path,
        folder,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn test_programs_are_told_from_other_artifacts() {
        let message = |test: bool, kind: &str| {
            json!({"executable": "/t/x", "profile": {"test": test}, "manifest_path": "/w/integration-tests/Cargo.toml",
                   "target": {"name": "linux", "kind": [kind]}})
        };
        let program = test_program(&message(true, "test")).unwrap();
        assert!(program.tier && program.suite == "integration-tests linux");
        assert!(!test_program(&message(true, "lib")).unwrap().tier);
        assert!(test_program(&message(false, "bin")).is_none());
        assert!(test_program(&message(true, "bench")).is_none());
    }
}
