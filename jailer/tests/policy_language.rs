//! The policy language: what it reads, and what it refuses with which words.
#![expect(dead_code, reason = "the build script uses what this test does not")]

#[path = "../build/constants.rs"]
mod constants;
#[path = "../build/policy.rs"]
mod policy;
#[path = "../build/search.rs"]
mod search;

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
        // These are tested below.
        if matches!(
            role,
            Role::Spawner | Role::Forker | Role::Startup | Role::StartupRing
        ) {
            continue;
        }
        for rule in rules(role) {
            // Its clients come to it.
            if role == Role::Supervisor && rule.syscall == "accept4" {
                continue;
            }
            assert!(
                !never.contains(&rule.syscall),
                "{role} allows {} ({})",
                rule.syscall,
                rule.place
            );
        }
    }
}

/// Whoever starts may make memory, threads and the jail's rest; nothing that reaches out.
#[test]
fn a_process_that_starts_may_not_reach_out() {
    let never = "open openat openat2 creat execve socket socketpair connect bind listen clone3 fork vfork \
                 unshare setns mount umount2 pivot_root chroot ptrace process_vm_readv process_vm_writev kill \
                 tgkill pidfd_open pidfd_getfd bpf perf_event_open keyctl add_key request_key init_module \
                 finit_module userfaultfd setuid setresuid setgroups personality modify_ldt";
    for role in [Role::Startup, Role::StartupRing] {
        for rule in rules(role) {
            let mut forbidden = never.split_ascii_whitespace();
            assert!(
                !forbidden.any(|call| call == rule.syscall),
                "{role}: {}",
                rule.place
            );
        }
        let narrow = [
            "execveat",
            "clone",
            "prctl",
            "ioctl",
            "mmap",
            "mprotect",
            "prlimit64",
        ];
        for rule in rules(role).iter().filter(|rule| narrow.contains(&rule.syscall)) {
            assert!(!rule.condition.is_empty(), "{role}: {}", rule.place);
        }
    }
    let rings = |role| rules(role).iter().any(|rule| rule.syscall == "io_uring_setup");
    assert!(!rings(Role::Startup) && rings(Role::StartupRing));
}

/// The forker makes jailed processes; it reads no file, reaches no other process and no network.
#[test]
fn the_forker_makes_jails_and_no_more() {
    let never = "openat openat2 creat execve connect bind listen fork vfork setns chroot ptrace \
                 process_vm_readv process_vm_writev tgkill pidfd_open pidfd_getfd bpf perf_event_open add_key \
                 request_key init_module finit_module userfaultfd personality modify_ldt socket";
    for rule in rules(Role::Forker) {
        let mut forbidden = never.split_ascii_whitespace();
        assert!(!forbidden.any(|call| call == rule.syscall), "{}", rule.place);
    }
    let narrow = ["open", "kill", "unshare", "keyctl", "socketpair", "execveat"];
    for rule in rules(Role::Forker)
        .iter()
        .filter(|rule| narrow.contains(&rule.syscall))
    {
        assert!(!rule.condition.is_empty(), "{}", rule.place);
    }
}

/// The system calls of a steady role, restart_syscall and the like too, and opcodes of its ring.
#[test]
fn roles_make_few_calls() {
    let most = [
        (Role::Disk, 20, 24),
        (Role::Net, 18, 24),
        (Role::Vcpu, 14, 14),
        (Role::Vmm, 34, 34),
        (Role::Supervisor, 40, 40),
        (Role::Spawner, 45, 45),
        // With what is inherited by whoever it makes: its jail's calls and those of every device's filters.
        (Role::Forker, 88, 88),
    ];
    for (role, calls, with_opcodes) in most {
        let distinct: std::collections::BTreeSet<_> = rules(role).iter().map(|rule| rule.syscall).collect();
        let count = distinct.len();
        assert!(count <= calls, "{role}: {count} calls: {distinct:?}");
        assert!(count + opcodes(role).len() <= with_opcodes, "{role}");
    }
}

/// What `program` answers to the call `number` without arguments, and in how many instructions: the
/// part of classic BPF that filters are made of.
fn run(program: &[seccompiler::sock_filter], number: u32) -> (u32, usize) {
    const X86_64: u32 = 0xC000_003E;
    let (mut place, mut value) = (0, 0);
    for steps in 1..10_000 {
        let i = &program[place];
        let jump = |taken| place + 1 + usize::from(if taken { i.jt } else { i.jf });
        place = match i.code {
            0x20 => {
                value = [number, X86_64].get(i.k as usize / 4).copied().unwrap_or(0);
                place + 1
            }
            0x54 => {
                value &= i.k;
                place + 1
            }
            0x05 => place + 1 + i.k as usize,
            0x15 => jump(value == i.k),
            0x25 => jump(value > i.k),
            0x35 => jump(value >= i.k),
            0x06 => return (i.k, steps),
            other => panic!("instruction {other:#x}"),
        };
    }
    panic!("no end")
}

#[test]
fn the_search_answers_as_the_rules_behind_it_and_sooner() {
    for role in Role::ALL {
        let rules = policy::load(Path::new("policy"), role.name()).unwrap();
        let plain = policy::compile_rules(&rules, "trap").unwrap();
        let searched = policy::compile(&rules, "trap").unwrap();
        // Those of the x32 interface too, which have a bit of their own.
        let calls = (0..1024_u32).flat_map(|n| [n, n | 1 << 30, u32::MAX - n]);
        let (mut before, mut after) = (0, 0);
        for number in calls {
            let (expected, long) = run(&plain, number);
            let (answer, short) = run(&searched, number);
            assert_eq!(answer, expected, "{role}: call {number:#x}");
            before += long;
            after += short;
        }
        assert!(
            after * 3 < before,
            "{role}: {after} instructions, and {before} without"
        );
    }
}
