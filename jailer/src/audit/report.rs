//! The audit's result as a matrix, and as JSON.

use super::catalogue::{ATTACKS, Attack};
use super::wall::Wall;
use crate::sandbox::Role;
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// What became of one attack by one role.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// A wall stopped it.
    Stopped(Wall),
    /// Nothing stopped it.
    Through,
    /// It fails on this host with no wall at all: not counted.
    Host,
    /// It failed with an errno that no wall answers with; taken for a hole until explained.
    Unexplained(i32),
}

impl Outcome {
    pub(super) fn is_breach(self) -> bool {
        matches!(self, Self::Through | Self::Unexplained(_))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Stopped(_) => "stopped",
            Self::Through => "through",
            Self::Host => "host",
            Self::Unexplained(_) => "unexplained",
        }
    }

    fn cell(self) -> String {
        match self {
            Self::Stopped(wall) => wall.to_string(),
            Self::Through => "THROUGH".into(),
            Self::Host => "host".into(),
            Self::Unexplained(errno) => format!("ERRNO {errno}"),
        }
    }
}

/// One cell of the matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cell {
    pub(super) role: Role,
    pub(super) attack: &'static Attack,
    pub(super) outcome: Outcome,
}

/// The whole matrix.
pub(super) struct Report {
    pub(super) uid: u32,
    pub(super) without: Option<Wall>,
    pub(super) roles: Vec<Role>,
    pub(super) cells: Vec<Cell>,
}

impl Report {
    /// Distinct attacks, and families of them, that were counted: they succeed on this host where
    /// no wall stands.
    fn counted(&self) -> (usize, usize) {
        let counted = self.cells.iter().filter(|cell| cell.outcome != Outcome::Host);
        let (mut attacks, mut families) = (BTreeSet::new(), BTreeSet::new());
        for cell in counted {
            attacks.insert(cell.attack.name);
            families.insert(cell.attack.family);
        }
        (attacks.len(), families.len())
    }

    pub(super) fn breaches(&self) -> usize {
        self.cells.iter().filter(|cell| cell.outcome.is_breach()).count()
    }

    pub(super) fn json(&self) -> String {
        let (attacks, families) = self.counted();
        let results: Vec<_> = self
            .cells
            .iter()
            .map(|cell| {
                serde_json::json!({
                    "role": cell.role.name(),
                    "attack": cell.attack.name,
                    "family": cell.attack.family,
                    "outcome": cell.outcome.name(),
                    "wall": match cell.outcome {
                        Outcome::Stopped(wall) => Some(wall.name()),
                        _ => None,
                    },
                })
            })
            .collect();
        let all = serde_json::json!({
            "uid": self.uid,
            "without": self.without.map(Wall::name),
            "attacks": attacks,
            "families": families,
            "through": self.breaches(),
            "results": results,
        });
        format!("{all:#}\n")
    }

    /// A row for each attack, a column for each role; in colour what got through.
    pub(super) fn text(&self, colour: bool) -> String {
        let width = ATTACKS.iter().map(|a| a.name.len()).max().unwrap_or(0);
        let mut out = format!("{:width$}", "attack");
        for role in &self.roles {
            let _ = write!(out, "  {:11}", role.name());
        }
        let mut family = "";
        for attack in ATTACKS {
            let row: Vec<_> = self
                .cells
                .iter()
                .filter(|c| c.attack.name == attack.name)
                .collect();
            if row.is_empty() {
                continue;
            }
            if attack.family != family {
                family = attack.family;
                let _ = write!(out, "\n[{family}]");
            }
            let _ = write!(out, "\n{:width$}", attack.name);
            for cell in row {
                let text = format!("{:11}", cell.outcome.cell());
                let _ = match (colour, cell.outcome.is_breach()) {
                    (true, true) => write!(out, "  \x1b[31m{text}\x1b[0m"),
                    _ => write!(out, "  {text}"),
                };
            }
        }
        let out: Vec<&str> = out.lines().map(str::trim_end).collect();
        format!("{}\n\n{}", out.join("\n"), self.summary())
    }

    fn summary(&self) -> String {
        let (attacks, families) = self.counted();
        let mut out = String::new();
        if let Some(wall) = self.without {
            let _ = writeln!(out, "without {wall}: what got through is held by no other wall");
        }
        for cell in self.cells.iter().filter(|cell| cell.outcome.is_breach()) {
            let _ = writeln!(
                out,
                "{}: {} ({}): {}",
                cell.outcome.name(),
                cell.attack.name,
                cell.role,
                cell.attack.what
            );
        }
        let _ = writeln!(
            out,
            "{attacks} attacks of {families} families as uid {}: {} got through",
            self.uid,
            self.breaches()
        );
        out
    }
}
