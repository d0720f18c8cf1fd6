//! Compiles `policy/*.policy` to BPF programs and to tables of rules; a rule that cannot be
//! read, or that gives no reason, fails the build.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

#[path = "build/constants.rs"]
mod constants;
#[path = "build/policy.rs"]
mod policy;
#[path = "build/shorten.rs"]
mod shorten;

/// The roles, as `sandbox::Role` spells them, and their files.
const ROLES: [(&str, &str); 11] = [
    ("Disk", "disk"),
    ("Net", "net"),
    ("Vmm", "vmm"),
    ("Vcpu", "vcpu"),
    ("Supervisor", "supervisor"),
    ("Image", "image"),
    ("Spawner", "spawner"),
    ("Forker", "forker"),
    ("Relay", "relay"),
    ("Startup", "startup"),
    ("StartupRing", "startup-ring"),
];

fn main() {
    println!("cargo::rerun-if-changed=policy");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=build.rs");
    let mut out = String::new();
    for (variant, file) in ROLES {
        match compile(file) {
            Ok(text) => out.push_str(&text),
            Err(error) => {
                println!("cargo::error={error} (policy of Role::{variant})");
                return;
            }
        }
    }
    out.push_str("pub(super) fn compiled(role: Role) -> Compiled {\n    match role {\n");
    for (variant, file) in ROLES {
        let name = constant(file);
        let _ = writeln!(
            out,
            "        Role::{variant} => Compiled {{ enforce: &{name}_ENFORCE, trap: &{name}_TRAP, log: &{name}_LOG }},"
        );
    }
    out.push_str("    }\n}\npub(super) fn rules(role: Role) -> &'static [Rule] {\n    match role {\n");
    for (variant, file) in ROLES {
        let _ = writeln!(out, "        Role::{variant} => &{}_RULES,", constant(file));
    }
    out.push_str("    }\n}\npub(super) fn opcodes(role: Role) -> &'static [Opcode] {\n    match role {\n");
    for (variant, file) in ROLES {
        let _ = writeln!(out, "        Role::{variant} => &{}_OPCODES,", constant(file));
    }
    out.push_str("    }\n}\n");
    let target = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("policies.rs");
    fs::write(target, out).expect("OUT_DIR can be written");
}

/// The name of what a policy becomes, without its kind.
fn constant(file: &str) -> String {
    file.to_uppercase().replace('-', "_")
}

fn compile(file: &str) -> Result<String, policy::PolicyError> {
    let rules = policy::load(Path::new("policy"), file)?;
    let mut out = String::new();
    for (kind, action) in [("ENFORCE", "kill_process"), ("TRAP", "trap"), ("LOG", "log")] {
        let program = policy::compile(&rules, action)?;
        let _ = writeln!(
            out,
            "static {}_{kind}: [sock_filter; {}] = [",
            constant(file),
            program.len()
        );
        for i in &program {
            let _ = writeln!(
                out,
                "    sock_filter {{ code: {}, jt: {}, jf: {}, k: {} }},",
                i.code, i.jt, i.jf, i.k
            );
        }
        out.push_str("];\n");
    }
    let _ = writeln!(
        out,
        "static {}_RULES: [Rule; {}] = [",
        constant(file),
        rules.len()
    );
    for rule in &rules {
        let _ = writeln!(
            out,
            "    Rule {{ syscall: {:?}, condition: {:?}, reason: {:?}, place: {:?} }},",
            rule.syscall, rule.condition, rule.reason, rule.place
        );
    }
    out.push_str("];\n");
    let opcodes = policy::load_opcodes(Path::new("policy"), file)?;
    let _ = writeln!(
        out,
        "static {}_OPCODES: [Opcode; {}] = [",
        constant(file),
        opcodes.len()
    );
    for opcode in &opcodes {
        let _ = writeln!(
            out,
            "    Opcode {{ name: {:?}, number: {}, reason: {:?}, place: {:?} }},",
            opcode.name, opcode.number, opcode.reason, opcode.place
        );
    }
    out.push_str("];\n");
    Ok(out)
}
