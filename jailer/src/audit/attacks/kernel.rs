//! Parts of the kernel that no role needs.

use super::{Attempt, Outcome, call, through_at, try_call};
use crate::audit::order::Order;
use libc as l;

pub(super) const ALL: &[(&str, Attempt)] = &[
    ("userfaultfd", |_| try_call(l::SYS_userfaultfd, [0])),
    ("bpf-map", |_| {
        // BPF_MAP_CREATE; union bpf_attr: array, key and value of 4 bytes, one entry.
        bpf(0, &[2, 4, 4, 1])
    }),
    ("bpf-program", bpf_program),
    ("perf-event", |_| {
        // struct perf_event_attr: PERF_TYPE_SOFTWARE, size, PERF_COUNT_SW_CPU_CLOCK.
        let mut attr = [0u32; 32];
        attr[0] = 1;
        attr[1] = size_of_val(&attr) as u32;
        try_call(
            l::SYS_perf_event_open,
            [attr.as_ptr() as usize, 0, usize::MAX, usize::MAX, 0],
        )
    }),
    ("add-key", |_| {
        let (kind, name) = (c"user".as_ptr() as usize, c"bulkhead-audit".as_ptr() as usize);
        // KEY_SPEC_PROCESS_KEYRING, which ends with this process.
        try_call(l::SYS_add_key, [kind, name, name, 4, -2isize as usize])
    }),
    ("keyctl", |_| {
        // KEYCTL_GET_KEYRING_ID of KEY_SPEC_PROCESS_KEYRING, made if it is not there.
        try_call(l::SYS_keyctl, [0, -2isize as usize, 1, 0, 0])
    }),
    ("load-module", |_| {
        let image = [0u8; 64];
        let none = c"".as_ptr() as usize;
        // The privilege is asked for before the image is looked at.
        let outcome = try_call(l::SYS_init_module, [image.as_ptr() as usize, image.len(), none]);
        through_at(outcome, l::ENOEXEC)
    }),
    ("unload-module", |_| {
        let name = c"bulkhead_no_such_module".as_ptr() as usize;
        through_at(
            try_call(l::SYS_delete_module, [name, l::O_NONBLOCK as usize]),
            l::ENOENT,
        )
    }),
    ("port-access", |_| try_call(l::SYS_ioperm, [0x80, 1, 1])),
    ("set-hostname", set_hostname),
    ("fanotify", |_| try_call(l::SYS_fanotify_init, [0, 0])),
    ("inotify", |_| try_call(l::SYS_inotify_init1, [0])),
    ("kernel-log", |_| {
        let mut text = [0u8; 64];
        // SYSLOG_ACTION_READ_ALL.
        try_call(l::SYS_syslog, [3, text.as_mut_ptr() as usize, text.len()])
    }),
    // Neither a time nor a zone: the privilege is asked for all the same.
    ("set-clock", |_| try_call(l::SYS_settimeofday, [0, 0])),
    // The privilege is asked for before the magic numbers, which these are not.
    ("reboot", |_| {
        through_at(try_call(l::SYS_reboot, [0, 0, 0, 0]), l::EINVAL)
    }),
    // And before the flags, which there are not.
    ("load-kernel", |_| {
        let flags = 1 << 15;
        through_at(try_call(l::SYS_kexec_load, [0, 0, 0, flags]), l::EINVAL)
    }),
    ("shared-memory", |_| {
        let memory = call(l::SYS_shmget, [PRIVATE, 4096, MAKE])?;
        try_call(l::SYS_shmctl, [memory, l::IPC_RMID as usize, 0])
    }),
    ("semaphores", |_| {
        let semaphores = call(l::SYS_semget, [PRIVATE, 1, MAKE])?;
        try_call(l::SYS_semctl, [semaphores, 0, l::IPC_RMID as usize])
    }),
    ("message-queue", |_| {
        let queue = call(l::SYS_msgget, [PRIVATE, MAKE])?;
        try_call(l::SYS_msgctl, [queue, l::IPC_RMID as usize, 0])
    }),
    ("posix-queue", |_| {
        let name = c"bulkhead-audit".as_ptr() as usize;
        let flags = (l::O_CREAT | l::O_RDWR) as usize;
        call(l::SYS_mq_open, [name, flags, 0o600, 0])?;
        try_call(l::SYS_mq_unlink, [name])
    }),
    ("type-on-terminal", |o| {
        let byte = b"x";
        let terminal = (o.report + 1) as usize;
        try_call(
            l::SYS_ioctl,
            [terminal, l::TIOCSTI as usize, byte.as_ptr() as usize],
        )
    }),
];

const PRIVATE: usize = l::IPC_PRIVATE as usize;
const MAKE: usize = (l::IPC_CREAT | 0o600) as usize;

fn bpf(command: usize, words: &[u32]) -> Outcome {
    let mut attr = [0u32; 32];
    attr[..words.len()].copy_from_slice(words);
    try_call(l::SYS_bpf, [command, attr.as_ptr() as usize, size_of_val(&attr)])
}

/// BPF_PROG_LOAD of a socket filter that answers 0.
fn bpf_program(_: &Order) -> Outcome {
    // r0 = 0; exit.
    let program = [0x0000_00B7u64, 0x0000_0095];
    let (code, licence) = (program.as_ptr() as u64, c"GPL".as_ptr() as u64);
    let halves = |n: u64| [n as u32, (n >> 32) as u32];
    let ([code, code_high], [licence, licence_high]) = (halves(code), halves(licence));
    bpf(5, &[1, 2, code, code_high, licence, licence_high])
}

/// To what it is.
fn set_hostname(_: &Order) -> Outcome {
    // struct utsname: six fields of 65 bytes, the second is the name.
    let mut names = [0u8; 6 * 65];
    call(l::SYS_uname, [names.as_mut_ptr() as usize])?;
    let name = &names[65..130];
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(64);
    try_call(l::SYS_sethostname, [name.as_ptr() as usize, length])
}
