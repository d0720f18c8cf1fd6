//! Other processes, new processes, programs, namespaces.

use super::{Attempt, Outcome, call, through_at, try_call};
use crate::audit::order::{EXECUTED, Order};
use libc as l;

pub(super) const ALL: &[(&str, Attempt)] = &[
    ("signal", |o| try_call(l::SYS_kill, [victim(o), CONTINUE])),
    ("signal-thread", |o| try_call(l::SYS_tkill, [victim(o), CONTINUE])),
    ("signal-group-thread", |o| {
        try_call(l::SYS_tgkill, [victim(o), victim(o), CONTINUE])
    }),
    ("queue-signal", |o| {
        // struct siginfo: si_signo, si_errno, si_code (SI_QUEUE).
        let mut about = [0i32; 32];
        (about[0], about[2]) = (l::SIGCONT, -1);
        try_call(
            l::SYS_rt_sigqueueinfo,
            [victim(o), CONTINUE, about.as_ptr() as usize],
        )
    }),
    // The descriptor is asked for no signals: none comes.
    ("signal-by-descriptor", |o| {
        try_call(l::SYS_fcntl, [o.report as usize, l::F_SETOWN as usize, victim(o)])
    }),
    ("pidfd-open", |o| try_call(l::SYS_pidfd_open, [victim(o), 0])),
    ("ptrace", |o| {
        try_call(l::SYS_ptrace, [l::PTRACE_SEIZE as usize, victim(o), 0, 0])
    }),
    ("read-process", |o| transfer(l::SYS_process_vm_readv, o)),
    ("write-process", |o| transfer(l::SYS_process_vm_writev, o)),
    // KCMP_VM.
    ("compare-process", |o| {
        try_call(l::SYS_kcmp, [victim(o), victim(o), 1, 0, 0])
    }),
    ("find-pages", |o| {
        try_call(l::SYS_move_pages, [victim(o), 0, 0, 0, 0, 0])
    }),
    ("steal-fd", |o| {
        let pidfd = call(l::SYS_pidfd_open, [victim(o), 0])?;
        try_call(l::SYS_pidfd_getfd, [pidfd, 0, 0])
    }),
    ("read-affinity", |o| {
        let mut cpus = [0u64; 128];
        let size = size_of_val(&cpus);
        try_call(
            l::SYS_sched_getaffinity,
            [victim(o), size, cpus.as_mut_ptr() as usize],
        )
    }),
    ("renice-process", |o| {
        try_call(l::SYS_setpriority, [0, victim(o), 1])
    }),
    ("limit-process", |o| {
        let mut limit = [0u64; 2];
        let nofile = l::RLIMIT_NOFILE as usize;
        try_call(
            l::SYS_prlimit64,
            [victim(o), nofile, 0, limit.as_mut_ptr() as usize],
        )
    }),
    ("execute", execute),
    ("execute-memfd", |_| {
        let fd = call(l::SYS_memfd_create, [c"program".as_ptr() as usize, 0])?;
        let script = b"#!/bin/sh\nexit 42\n";
        try_call(l::SYS_write, [fd, script.as_ptr() as usize, script.len()])?;
        let none = [0usize];
        let (path, none) = (c"".as_ptr() as usize, none.as_ptr() as usize);
        try_call(l::SYS_execveat, [fd, path, none, none, l::AT_EMPTY_PATH as usize])
    }),
    ("fork", |_| make_process(|| call(l::SYS_fork, []))),
    ("vfork-by-clone", |_| {
        make_process(|| {
            // struct clone_args: exit_signal at index 4.
            let mut arguments = [0u64; 11];
            arguments[4] = l::SIGCHLD as u64;
            call(
                l::SYS_clone3,
                [arguments.as_mut_ptr() as usize, size_of_val(&arguments)],
            )
        })
    }),
    ("new-user-namespace", |_| {
        // A process with threads may not: that it has some is no wall, and its thread-less child
        // is what an intruder would use.
        through_at(unshare(l::CLONE_NEWUSER), l::EINVAL)
    }),
    ("new-mount-namespace", |_| unshare(l::CLONE_NEWNS)),
    ("new-network-namespace", |_| unshare(l::CLONE_NEWNET)),
    ("new-pid-namespace", |_| unshare(l::CLONE_NEWPID)),
    ("join-namespace", |o| {
        let pidfd = call(l::SYS_pidfd_open, [victim(o), 0])?;
        try_call(l::SYS_setns, [pidfd, l::CLONE_NEWNET as usize])
    }),
];

/// A signal that the victim does not notice.
const CONTINUE: usize = l::SIGCONT as usize;

fn victim(o: &Order) -> usize {
    o.victim as usize
}

fn unshare(flag: i32) -> Outcome {
    try_call(l::SYS_unshare, [flag as usize])
}

/// The victim's word to or from one of ours.
fn transfer(number: l::c_long, o: &Order) -> Outcome {
    let mut word = 0usize;
    // struct iovec: address, length.
    let ours = [&raw mut word as usize, size_of::<usize>()];
    let theirs = [o.secret, size_of::<usize>()];
    let (ours, theirs) = (ours.as_ptr() as usize, theirs.as_ptr() as usize);
    try_call(number, [victim(o), ours, 1, theirs, 1, 0])
}

/// A shell that says by its exit code that it ran.
fn execute(_: &Order) -> Outcome {
    let script = format!("exit {EXECUTED}\0");
    let arguments = [
        c"/bin/sh".as_ptr() as usize,
        c"-c".as_ptr() as usize,
        script.as_ptr() as usize,
        0,
    ];
    try_call(
        l::SYS_execve,
        [
            arguments[0],
            arguments.as_ptr() as usize,
            arguments[3..].as_ptr() as usize,
        ],
    )
}

fn make_process(make: impl FnOnce() -> Result<usize, i32>) -> Outcome {
    match make()? {
        // SAFETY: the child, a copy of this thread alone, ends at once.
        0 => unsafe { l::_exit(0) },
        child => try_call(l::SYS_wait4, [child, 0, 0, 0]),
    }
}
