//! What a guest says on its console: lines that begin with `guest: `.

use anyhow::{Result, ensure};

/// The guest said `report`.
///
/// # Errors
/// With all that it said, when it did not.
pub fn expect(console: &str, report: &str) -> Result<()> {
    let line = format!("guest: {report}");
    ensure!(
        console.lines().any(|candidate| candidate.trim_end() == line),
        "no '{line}' in\n{console}"
    );
    Ok(())
}

/// The guest came through a storm, with these reports, and found nothing wrong.
///
/// # Errors
/// With all that it said, when it did not.
pub fn expect_storm(console: &str, reports: &[&str]) -> Result<()> {
    for report in ["stream whole", "idle first last", "end"].iter().chain(reports) {
        expect(console, report)?;
    }
    for wrong in ["cannot", "wrong"] {
        ensure!(!console.contains(&format!("guest: {wrong}")), "{console}");
    }
    Ok(())
}
