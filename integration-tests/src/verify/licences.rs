//! Licences of everything that is linked, and known advisories where a tool for them is there.

use super::cargo::cargo;
use super::libtest::Outcome;
use serde_json::Value;
use std::process::Command;

/// Licences that fit Apache-2.0 for source and binaries.
const ALLOWED: &[&str] = &[
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT",
    "MIT-0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
    // libFuzzer's, beside another: tests only.
    "NCSA",
    "0BSD",
];

/// What is built here.
const TARGETS: [&str; 3] = [
    "x86_64-unknown-linux-gnu",
    "x86_64-unknown-linux-musl",
    "x86_64-unknown-none",
];

/// Every package that is linked has a licence that we may use.
pub(super) fn licences() -> Outcome {
    let output = cargo()
        .args(["metadata", "--format-version=1", "--offline"])
        // A build fetched what these link, and nothing for other systems.
        .args(TARGETS.map(|target| format!("--filter-platform={target}")))
        .output();
    let metadata: Value = match output {
        Ok(output) if output.status.success() => serde_json::from_slice(&output.stdout).unwrap_or_default(),
        Ok(output) => return Outcome::Failed(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => return Outcome::Failed(error.to_string()),
    };
    let Some(packages) = metadata["packages"].as_array() else {
        return Outcome::Failed("cargo metadata names no packages".to_owned());
    };
    let wrong: Vec<String> = packages
        .iter()
        .filter(|package| !package["license"].as_str().is_some_and(allowed))
        .map(|package| format!("{}: {}", package["name"], package["license"]))
        .collect();
    if wrong.is_empty() {
        Outcome::Passed
    } else {
        Outcome::Failed(wrong.join("\n"))
    }
}

/// Advisories by `cargo audit`, which has its own database.
pub(super) fn advisories() -> Outcome {
    match Command::new("cargo-audit").arg("--version").output() {
        Err(_) => Outcome::Skipped("cargo-audit is not installed".to_owned()),
        Ok(_) => match cargo().args(["audit", "--quiet"]).output() {
            Ok(output) if output.status.success() => Outcome::Passed,
            Ok(output) => Outcome::Failed(String::from_utf8_lossy(&output.stdout).into_owned()),
            Err(error) => Outcome::Failed(error.to_string()),
        },
    }
}

/// Whether a licence expression can be met: one side of every OR with all of its ANDs. (Operators
/// bind as in SPDX: AND before OR; packages use parentheses only around ORs.)
fn allowed(expression: &str) -> bool {
    // The old spelling of OR.
    let expression = expression.replace('/', " OR ");
    match expression.split_once('(') {
        Some((before, rest)) => {
            let (inner, after) = rest.split_once(')').unwrap_or((rest, ""));
            let inner = if allowed(inner) { "MIT" } else { "none" };
            allowed(&format!("{before}{inner}{after}"))
        }
        None => expression.split(" OR ").any(|choice| {
            choice
                .split(" AND ")
                .all(|licence| ALLOWED.contains(&licence.trim()))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_judged_by_their_choices() {
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-2.0 OR MIT",
            "(MIT OR GPL-2.0) AND Unicode-3.0",
        ] {
            assert!(allowed(good), "{good}");
        }
        for bad in [
            "GPL-3.0-only",
            "MIT AND GPL-2.0",
            "(GPL-2.0 OR LGPL-3.0) AND MIT",
            "",
        ] {
            assert!(!allowed(bad), "{bad}");
        }
    }
}
