//! Each rule behaves as written: a forked child under the role's filter makes the call with
//! arguments that the rule allows, and with arguments that break each of its conditions.
//!
//! Descriptors and process ids in these calls name nothing, pointers point nowhere: a call that
//! passes the filter fails in the kernel, or ends the child by itself.
#![expect(dead_code, reason = "the build script uses what this test does not")]
#![expect(unsafe_code, reason = "forks, and makes any call with any arguments")]

#[path = "../build/constants.rs"]
mod constants;
#[path = "../build/policy.rs"]
mod policy;
#[path = "../build/shorten.rs"]
mod shorten;

use jailer::sandbox::{Role, syscall_name};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use policy::{Rule, compile, load};
use std::path::Path;

type Arguments = [u64; 6];

/// No descriptor, no process, no address.
const NOTHING: u64 = 0x7FFF_FFFF;
/// What is tried in the place of an argument that a condition names.
fn candidates(value: u64) -> [u64; 8] {
    [
        value,
        value.wrapping_add(1),
        value.wrapping_sub(1),
        0,
        1,
        4,
        0xFFFF,
        !value,
    ]
}

fn number(name: &str) -> i64 {
    (0..1024)
        .find(|n| syscall_name(*n) == Some(name))
        .unwrap_or_else(|| panic!("{name} has no number"))
}

fn allowed(rules: &[Rule], name: &str, arguments: &Arguments) -> bool {
    let mut same = rules.iter().filter(|rule| rule.syscall == name);
    same.any(|rule| rule.tests.iter().all(|test| test.holds(arguments)))
}

/// Arguments that `rule` allows.
fn right(rule: &Rule) -> Arguments {
    // A wait must not last, a signal must not be one: zero unless a condition asks for more.
    let mut arguments = [NOTHING, 0, 0, 0, 0, 0];
    for test in &rule.tests {
        let place = &mut arguments[usize::from(test.index)];
        let mut found = candidates(test.value).into_iter();
        *place = found
            .find(|value| {
                let mut tried = [0; 6];
                tried[usize::from(test.index)] = *value;
                test.holds(&tried)
            })
            .unwrap_or_else(|| panic!("{}: no argument satisfies it", rule.place));
    }
    arguments
}

/// Arguments that break one condition of `rule`, and that no other rule allows.
fn wrong(rules: &[Rule], rule: &Rule) -> Vec<Arguments> {
    let mut all = Vec::new();
    for test in &rule.tests {
        let broken = candidates(test.value).into_iter().find_map(|value| {
            let mut arguments = right(rule);
            arguments[usize::from(test.index)] = value;
            (!allowed(rules, &rule.syscall, &arguments)).then_some(arguments)
        });
        all.push(broken.unwrap_or_else(|| panic!("{}: a condition that refuses nothing", rule.place)));
    }
    all
}

/// Whether a child under `program` is killed for the call.
fn is_stopped(program: &[seccompiler::sock_filter], number: i64, arguments: &Arguments) -> bool {
    // SAFETY: the child makes system calls only, and allocates nothing.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork");
    if child == 0 {
        // A wait that the filter allows is ended by SIGALRM, which is not what a filter kills with.
        // SAFETY: sets a timer of this child.
        unsafe { libc::alarm(1) };
        if seccompiler::apply_filter(program).is_err() {
            // SAFETY: ends the child.
            unsafe { libc::_exit(99) };
        }
        let [a, b, c, d, e, f] = *arguments;
        // SAFETY: the arguments name nothing that this child needs before it ends.
        unsafe { libc::syscall(number, a, b, c, d, e, f) };
        // Allowed in every role.
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    let status = waitpid(nix::unistd::Pid::from_raw(child), None).expect("our child");
    assert!(!matches!(status, WaitStatus::Exited(_, 99)), "no filter");
    matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _))
}

fn check(role: Role) {
    let rules = load(Path::new("policy"), role.name()).expect("it was built");
    let program = compile(&rules, "kill_process").expect("it was built");
    for rule in &rules {
        let number = number(&rule.syscall);
        let good = right(rule);
        assert!(
            !is_stopped(&program, number, &good),
            "{}: stops {good:x?}",
            rule.place
        );
        for bad in wrong(&rules, rule) {
            assert!(
                is_stopped(&program, number, &bad),
                "{}: lets {bad:x?} pass",
                rule.place
            );
        }
    }
    let making_jails: &[&str] = match role {
        Role::Forker => &[],
        _ => &["mount", "unshare", "clone3", "keyctl"],
    };
    let by_nobody = [
        "socket",
        "openat2",
        "execve",
        "ptrace",
        "bpf",
        "perf_event_open",
        "init_module",
    ];
    for absent in by_nobody.iter().chain(making_jails) {
        assert!(
            is_stopped(&program, self::number(absent), &[NOTHING; 6]),
            "{role}: {absent}"
        );
    }
}

/// A call must pass both filters of a process.
#[test]
fn what_a_role_may_call_its_start_may_call_too() {
    let start = load(Path::new("policy"), Role::Startup.name()).expect("it was built");
    for role in Role::ALL {
        if matches!(role, Role::Spawner | Role::Forker | Role::Relay) {
            continue;
        }
        let rules = load(Path::new("policy"), role.name()).expect("it was built");
        let missing: Vec<_> = rules
            .iter()
            .filter(|rule| !allowed(&start, &rule.syscall, &right(rule)))
            .map(|rule| &rule.place)
            .filter(|place| !place.starts_with("startup-ring"))
            .collect();
        assert!(missing.is_empty(), "{role}: {missing:?}");
    }
}

#[test]
fn each_rule_behaves_as_written() {
    for role in Role::ALL {
        check(role);
    }
}

/// Where processes have no ids of their own, the spawner sees all that its user does.
#[test]
fn the_spawner_opens_nothing_to_read() {
    let rules = load(Path::new("policy"), Role::Spawner.name()).expect("it was built");
    let program = compile(&rules, "kill_process").expect("it was built");
    let stopped = |name, at: usize, flags: i32| {
        let mut arguments = [NOTHING, 0, 0, 0, 0, 0];
        arguments[at] = flags as u64;
        is_stopped(&program, number(name), &arguments)
    };
    for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_TMPFILE | libc::O_RDWR] {
        for more in [
            0,
            libc::O_CREAT | libc::O_TRUNC,
            libc::O_CREAT | libc::O_APPEND,
            libc::O_PATH,
        ] {
            let flags = flags | more | libc::O_CLOEXEC;
            assert!(stopped("openat", 2, flags), "openat {flags:#x}");
            assert!(stopped("open", 1, flags), "open {flags:#x}");
        }
    }
    assert!(stopped(
        "open",
        1,
        libc::O_DIRECTORY | libc::O_CREAT | libc::O_CLOEXEC
    ));
}
