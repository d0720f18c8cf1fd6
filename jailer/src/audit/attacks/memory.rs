//! Code from data, memory that others have mapped, limits, identity.

use super::{Attempt, MEMORY, MEMORY_SIZE, Outcome, call, try_call};
use crate::audit::order::Order;
use libc as l;
use std::sync::atomic::Ordering;

const PAGE: usize = 4096;
/// The default size of a huge page.
const HUGE_PAGE: usize = 2 << 20;
const NOWHERE: usize = usize::MAX;
const READ_WRITE: usize = (l::PROT_READ | l::PROT_WRITE) as usize;
const READ_EXEC: usize = (l::PROT_READ | l::PROT_EXEC) as usize;
const OF_ITS_OWN: usize = (l::MAP_PRIVATE | l::MAP_ANONYMOUS) as usize;
/// More descriptors than any jailed process may have.
const ENOUGH: usize = 4000;
/// More processes than a jailed one may make.
const MANY: usize = 200;
/// Address space in pieces: more than any jailed process may have. None is touched.
const PIECE: usize = 64 << 20;
const PIECES: usize = 512;

pub(super) const ALL: &[(&str, Attempt)] = &[
    ("map-writable-code", |_| {
        let all = READ_WRITE | READ_EXEC;
        try_call(l::SYS_mmap, [0, PAGE, all, OF_ITS_OWN, NOWHERE, 0])
    }),
    ("make-code", |_| {
        let page = call(l::SYS_mmap, [0, PAGE, READ_WRITE, OF_ITS_OWN, NOWHERE, 0])?;
        try_call(l::SYS_mprotect, [page, PAGE, READ_EXEC])
    }),
    ("make-code-by-key", |_| {
        let page = call(l::SYS_mmap, [0, PAGE, READ_WRITE, OF_ITS_OWN, NOWHERE, 0])?;
        try_call(l::SYS_pkey_mprotect, [page, PAGE, READ_EXEC, NOWHERE])
    }),
    ("memfd-code", |_| {
        let fd = call(l::SYS_memfd_create, [c"code".as_ptr() as usize, 0])?;
        try_call(l::SYS_ftruncate, [fd, PAGE])?;
        try_call(l::SYS_mmap, [0, PAGE, READ_EXEC, l::MAP_PRIVATE as usize, fd, 0])
    }),
    ("map-file-code", |_| {
        try_call(
            l::SYS_mmap,
            [0, PAGE, READ_EXEC, l::MAP_SHARED as usize, memory(), 0],
        )
    }),
    // READ_IMPLIES_EXEC.
    ("read-implies-exec", |_| {
        try_call(l::SYS_personality, [0x0040_0000])
    }),
    ("local-descriptor-table", |_| {
        // struct user_desc: entry, base, limit, flags (seg_32bit, limit_in_pages, useable).
        let entry = [0u32, 0, 0xF_FFFF, 0b101_0001];
        try_call(
            l::SYS_modify_ldt,
            [1, entry.as_ptr() as usize, size_of_val(&entry)],
        )
    }),
    ("truncate-memory", |_| try_call(l::SYS_ftruncate, [memory(), 0])),
    ("grow-memory", |_| {
        try_call(l::SYS_fallocate, [memory(), 0, MEMORY_SIZE as usize, PAGE])
    }),
    ("seal-memory", |_| {
        let write = l::F_SEAL_FUTURE_WRITE as usize;
        try_call(l::SYS_fcntl, [memory(), l::F_ADD_SEALS as usize, write])
    }),
    ("exhaust-fds", |_| {
        for _ in 0..ENOUGH {
            call(l::SYS_fcntl, [memory(), l::F_DUPFD_CLOEXEC as usize, 0])?;
        }
        Ok(())
    }),
    ("exhaust-pids", exhaust_pids),
    ("exhaust-memory", exhaust_memory),
    ("take-huge-pages", |_| {
        // Not reserved, so that it does not depend on how many the host has at the moment; none is touched.
        let flags = OF_ITS_OWN | (l::MAP_HUGETLB | l::MAP_NORESERVE) as usize;
        try_call(l::SYS_mmap, [0, HUGE_PAGE, READ_WRITE, flags, NOWHERE, 0])
    }),
    ("raise-fds", |_| raise(l::RLIMIT_NOFILE as usize, 1 << 19)),
    ("raise-core", |_| raise(l::RLIMIT_CORE as usize, 1 << 20)),
    ("realtime", |_| {
        let priority = 1i32;
        let fifo = l::SCHED_FIFO as usize;
        try_call(l::SYS_sched_setscheduler, [0, fifo, &raw const priority as usize])
    }),
    ("raise-priority", |_| {
        try_call(l::SYS_setpriority, [0, 0, -5isize as usize])
    }),
    ("lock-memory", |_| {
        // More than the 8 MiB that a process may lock by default.
        let length = 64 << 20;
        let area = call(l::SYS_mmap, [0, length, READ_WRITE, OF_ITS_OWN, NOWHERE, 0])?;
        // ENOMEM is RLIMIT_MEMLOCK's answer.
        match try_call(l::SYS_mlock, [area, length]) {
            Err(l::ENOMEM) => Err(l::EMFILE),
            other => other,
        }
    }),
    ("setuid", |_| identity(l::SYS_setuid)),
    ("setgid", |_| identity(l::SYS_setgid)),
    ("setgroups", |_| {
        let group = 1u32;
        try_call(l::SYS_setgroups, [1, &raw const group as usize])
    }),
    ("capset", capset),
    ("dumpable", |_| prctl(l::PR_SET_DUMPABLE, 1)),
    // SECBIT_NO_SETUID_FIXUP.
    ("keep-capabilities", |_| prctl(l::PR_SET_SECUREBITS, 4)),
];

fn memory() -> usize {
    MEMORY.load(Ordering::Relaxed) as usize
}

/// Makes children that wait, and ends them.
fn exhaust_pids(_: &Order) -> Outcome {
    let mut children = [0; MANY];
    let mut outcome = Ok(());
    for child in &mut children {
        match call(l::SYS_fork, []) {
            // It is ended below.
            Ok(0) => loop {
                let _ = try_call(l::SYS_pause, []);
            },
            Ok(pid) => *child = pid,
            Err(errno) => {
                outcome = Err(errno);
                break;
            }
        }
    }
    for child in children.into_iter().filter(|child| *child != 0) {
        let _ = try_call(l::SYS_kill, [child, l::SIGKILL as usize]);
        let _ = try_call(l::SYS_wait4, [child, 0, 0, 0]);
    }
    outcome
}

fn exhaust_memory(_: &Order) -> Outcome {
    for _ in 0..PIECES {
        call(l::SYS_mmap, [0, PIECE, READ_WRITE, OF_ITS_OWN, NOWHERE, 0])?;
    }
    Ok(())
}

fn raise(resource: usize, to: u64) -> Outcome {
    let limit = [to, to];
    try_call(l::SYS_prlimit64, [0, resource, limit.as_ptr() as usize, 0])
}

/// User or group 1. EINVAL: the user namespace knows no such id.
fn identity(number: l::c_long) -> Outcome {
    match try_call(number, [1]) {
        Err(l::EINVAL) => Err(l::ENOENT),
        other => other,
    }
}

fn prctl(option: i32, value: usize) -> Outcome {
    try_call(l::SYS_prctl, [option as usize, value, 0, 0, 0])
}

/// CAP_SYS_ADMIN, effective and permitted.
fn capset(_: &Order) -> Outcome {
    // struct __user_cap_header_struct: version 3, this thread.
    let header = [0x2008_0522u32, 0];
    let admin = 1 << 21;
    let data = [admin, admin, 0u32, 0, 0, 0];
    try_call(l::SYS_capset, [header.as_ptr() as usize, data.as_ptr() as usize])
}
