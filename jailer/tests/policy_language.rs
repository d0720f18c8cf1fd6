//! The policy language: what it reads, and what it refuses with which words.
#![expect(dead_code, reason = "the build script uses what this test does not")]

#[path = "../build/constants.rs"]
mod constants;
#[path = "../build/policy.rs"]
mod policy;

use jailer::sandbox::{Role, opcodes, rules};
use std::path::Path;

fn refusal(text: &str) -> String {
    let parsed = policy::parse("t.policy", text, &|name| policy::load(Path::new("policy"), name));
    match parsed {
        Ok(_) => panic!("accepted: {text}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_rule_without_a_reason_is_refused_with_its_line() {
    assert_eq!(
        refusal("read # messages\nwrite"),
        "t.policy:2: 'write' gives no reason: add '# why'"
    );
}

#[test]
fn misspelt_names_are_refused() {
    assert!(refusal("raed # x").contains("raed"));
    assert!(refusal("ioctl arg1 == KVM_RAN # x").contains("'KVM_RAN' is not in"));
    assert!(refusal("ioctl arg7 == 1 # x").contains("write arg0 to arg5"));
    assert!(refusal("ioctl arg1 = 1 # x").contains("'=' is no comparison"));
    assert!(refusal("ioctl arg1 == 1 2 # x").contains("'2' is too much"));
}

#[test]
fn a_value_wider_than_its_argument_is_refused() {
    assert!(refusal("lseek arg1 <= 0x100000000 # x").contains("argN:64"));
    assert_eq!(
        policy::parse("t", "lseek arg1:64 <= 0x100000000 # x", &|_| Ok(vec![]))
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn redundant_rules_are_refused_across_includes() {
    assert!(refusal("include runtime\nread # again").contains("already ruled at runtime.policy"));
    assert!(refusal("ioctl arg1 == 1 # x\nioctl # y").contains("already ruled at t.policy:1"));
}

#[test]
fn no_role_may_open_execute_connect_or_make_processes() {
    let never = [
        "open",
        "openat",
        "openat2",
        "execve",
        "execveat",
        "socket",
        "socketpair",
        "connect",
        "bind",
        "listen",
        "accept4",
        "clone",
        "clone3",
        "fork",
        "vfork",
        "ptrace",
        "mount",
        "unshare",
        "setns",
        "bpf",
        "io_uring_setup",
        "process_vm_writev",
        "userfaultfd",
        "memfd_create",
        "setuid",
        "capset",
        "kill",
    ];
    for role in Role::ALL {
        // The spawner respawns devices and makes their jails.
        if role == Role::Spawner {
            continue;
        }
        for rule in rules(role) {
            assert!(
                !never.contains(&rule.syscall),
                "{role} allows {} ({})",
                rule.syscall,
                rule.place
            );
        }
    }
}

/// As the threat model promises: calls, and with what its io_uring may be asked for.
#[test]
fn a_disk_process_makes_few_calls() {
    let calls: std::collections::BTreeSet<_> = rules(Role::Disk).iter().map(|rule| rule.syscall).collect();
    assert!(calls.len() <= 20, "{} calls: {calls:?}", calls.len());
    assert!(calls.len() + opcodes(Role::Disk).len() <= 24);
}
