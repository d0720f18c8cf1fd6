//! `bulkhead policy show ROLE`.

use crate::sandbox::{Role, opcodes, rules};
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
        let opcodes: Vec<_> = opcodes(role)
            .iter()
            .map(|opcode| {
                serde_json::json!({
                    "opcode": opcode.name,
                    "reason": opcode.reason,
                    "place": opcode.place,
                })
            })
            .collect();
        let all = serde_json::json!({
            "role": role.name(),
            "io_uring": opcodes,
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
    for opcode in opcodes(role) {
        let code = format!("io_uring {}", opcode.name);
        let _ = writeln!(
            out,
            "{code:<width$}  # {} ({})",
            opcode.reason,
            opcode.place,
            width = width.unwrap_or(0)
        );
    }
    let _ = writeln!(out, "anything else: the process is killed");
    out
}
