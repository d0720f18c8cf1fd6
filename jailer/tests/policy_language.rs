//! The policy language: what it reads, and what it refuses with which words.
#![expect(dead_code, reason = "the build script uses what this test does not")]

#[path = "../build/constants.rs"]
mod constants;
#[path = "../build/policy.rs"]
mod policy;
#[path = "../build/shorten.rs"]
mod shorten;

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
    let never = "open openat2 creat execve connect bind listen fork vfork setns chroot ptrace \
                 process_vm_readv process_vm_writev tgkill pidfd_open pidfd_getfd bpf perf_event_open add_key \
                 request_key init_module finit_module userfaultfd personality modify_ldt socket";
    for rule in rules(Role::Forker) {
        let mut forbidden = never.split_ascii_whitespace();
        assert!(!forbidden.any(|call| call == rule.syscall), "{}", rule.place);
    }
    let narrow = ["openat", "kill", "unshare", "keyctl", "socketpair", "execveat"];
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
        (Role::Forker, 90, 90),
        (Role::Relay, 11, 11),
    ];
    for (role, calls, with_opcodes) in most {
        let distinct: std::collections::BTreeSet<_> = rules(role).iter().map(|rule| rule.syscall).collect();
        let count = distinct.len();
        assert!(count <= calls, "{role}: {count} calls: {distinct:?}");
        assert!(count + opcodes(role).len() <= with_opcodes, "{role}");
    }
}

/// What `program` answers to a call (`struct seccomp_data` in words): the part of classic BPF that filters
/// are made of.
fn run(program: &[seccompiler::sock_filter], call: &[u32; 16]) -> u32 {
    let (mut place, mut value) = (0, 0);
    loop {
        let i = &program[place];
        let jump = |taken| place + 1 + usize::from(if taken { i.jt } else { i.jf });
        place = match i.code {
            0x20 => {
                value = call[i.k as usize / 4];
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
            0x06 => return i.k,
            other => panic!("instruction {other:#x}"),
        };
    }
}

/// Every call, and those with conditions with any two words of their arguments around what they compare.
#[test]
fn a_short_program_answers_as_the_long_one() {
    const X86_64: u32 = 0xC000_003E;
    const I386: u32 = 0x4000_0003;
    for role in Role::ALL {
        let rules = policy::load(Path::new("policy"), role.name()).unwrap();
        let long = policy::compile_plainly(&rules, "trap").unwrap();
        let short = policy::compile(&rules, "trap").unwrap();
        assert!(
            short.len() * 3 < long.len() * 2,
            "{role}: {} of {}",
            short.len(),
            long.len()
        );
        let same = |call: &[u32; 16]| {
            assert_eq!(run(&short, call), run(&long, call), "{role}: {call:x?}");
        };
        // Those of the x32 interface too, which have a bit of their own.
        for number in (0..1024_u32).flat_map(|n| [n, n | 1 << 30, u32::MAX - n]) {
            for architecture in [X86_64, I386] {
                let mut call = [0; 16];
                (call[0], call[1]) = (number, architecture);
                same(&call);
            }
        }
        for rule in rules.iter().filter(|rule| !rule.tests.is_empty()) {
            let own = policy::compile_plainly(std::slice::from_ref(rule), "trap").unwrap();
            let number = own[4].k;
            let compared = |i: &&seccompiler::sock_filter| [0x15, 0x25, 0x35, 0x54].contains(&i.code);
            let around = |i: &seccompiler::sock_filter| [i.k, i.k.wrapping_sub(1), i.k.wrapping_add(1), !i.k];
            let values: Vec<_> = own[5..]
                .iter()
                .filter(compared)
                .flat_map(around)
                .chain([0, !0])
                .collect();
            let words = || (4..16).flat_map(|place| values.iter().map(move |value| (place, *value)));
            for (one, first) in words() {
                for (other, second) in words() {
                    let mut call = [0; 16];
                    (call[0], call[1], call[one], call[other]) = (number, X86_64, first, second);
                    same(&call);
                }
            }
        }
    }
}
