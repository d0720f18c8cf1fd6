//! `bulkhead policy show ROLE`.

use crate::sandbox::{Role, rules};
use std::fmt::Write as _;

/// The rules of a role as text, or as JSON.
pub(super) fn show(role: Role, json: bool) -> String {
    let rules = rules(role);
    if json {
        let rules: Vec<_> = rules
            .iter()
            .map(|rule| {
                serde_json::json!({
                    "syscall": rule.syscall,
                    "args": rule.condition,
                    "reason": rule.reason,
                    "place": rule.place,
                })
            })
            .collect();
        let all = serde_json::json!({
            "role": role.name(),
            "otherwise": "kill-process",
            "rules": rules,
        });
        return format!("{all:#}\n");
    }
    let mut out = String::new();
    let width = rules
        .iter()
        .map(|r| r.syscall.len() + 1 + r.condition.len())
        .max();
    for rule in rules {
        let code = format!("{} {}", rule.syscall, rule.condition);
        let _ = writeln!(
            out,
            "{code:<width$}  # {} ({})",
            rule.reason,
            rule.place,
            width = width.unwrap_or(0)
        );
    }
    let _ = writeln!(out, "anything else: the process is killed");
    out
}
