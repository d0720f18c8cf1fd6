//! Compiling and linting in one: clippy's driver in the place of the compiler of our own crates.

use anyhow::{Context, ensure};
use serde_json::Value;
use std::process::{Command, Stdio};

/// Names what cargo compiles our own crates with.
pub(crate) const WRAPPER: &str = "RUSTC_WORKSPACE_WRAPPER";
/// The driver.
pub(crate) const DRIVER: &str = "clippy-driver";
/// The driver's own variable. What is denied is a warning here: the tests run all the same, and what was said fails a
/// check of its own.
const FLAGS: (&str, &str) = (
    "CLIPPY_ARGS",
    "--cap-lints__CLIPPY_HACKERY__warn__CLIPPY_HACKERY__",
);

/// What cargo built, and what was said of it.
#[derive(Debug)]
pub(crate) struct Built {
    /// Cargo's messages.
    pub(crate) messages: Vec<Value>,
    /// Warnings of our code, as a person is to read them.
    pub(crate) warnings: Vec<String>,
}

/// Runs a build whose messages are JSON, by [`DRIVER`] unless the command has a [`WRAPPER`] of its own, or wants none.
///
/// # Errors
/// It fails; what the compiler said is on standard error.
pub(crate) fn build(command: &mut Command) -> anyhow::Result<Built> {
    let (name, flags) = FLAGS;
    command.env(name, flags).stderr(Stdio::inherit());
    if !command.get_envs().any(|(name, _)| name == WRAPPER) {
        command.env(WRAPPER, DRIVER);
    }
    let output = command.output().context("cargo")?;
    let messages = output.stdout.split(|byte| *byte == b'\n');
    let messages = messages.filter_map(|line| serde_json::from_slice(line).ok());
    let messages: Vec<Value> = messages.collect();
    for error in said(&messages, "error") {
        eprintln!("{error}");
    }
    ensure!(output.status.success(), "the workspace does not compile");
    Ok(Built {
        warnings: said(&messages, "warning"),
        messages,
    })
}

/// What the compiler said of this level, as a person is to read it.
fn said(messages: &[Value], level: &str) -> Vec<String> {
    let of_level = messages
        .iter()
        .filter(|message| message["message"]["level"] == level);
    let rendered = of_level.filter_map(|message| message["message"]["rendered"].as_str());
    rendered.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// By cargo, in a package that has one lint denied and one that warns.
    #[test]
    fn what_the_driver_says_is_heard_and_stops_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        fs::create_dir(folder.path().join("src")).unwrap();
        place(
            "Cargo.toml",
            "[package]\nname = \"linted\"\nedition = \"2024\"\n[lints.clippy]\ntodo = \"deny\"\n[workspace]\n",
        );
        place(
            "src/lib.rs",
            "pub fn one(x: u8) -> u8 {\n    return x;\n}\npub fn two() {\n    todo!()\n}\n",
        );
        let mut cargo = Command::new(env!("CARGO"));
        cargo
            .args(["build", "--quiet", "--message-format=json"])
            .current_dir(folder.path())
            .env("CARGO_TARGET_DIR", folder.path().join("target"));
        let built = build(&mut cargo).unwrap();
        let warnings = built.warnings.concat();
        assert!(warnings.contains("unneeded `return`"), "{warnings}");
        assert!(warnings.contains("`todo` should not be present"), "{warnings}");
    }
}
