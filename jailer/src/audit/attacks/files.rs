//! Paths: host files, /proc, /sys, devices, mounts. By absolute path, as there is nothing else.

use super::{Attempt, Outcome, address, below, call, through_at, try_call};
use crate::audit::order::Order;
use libc as l;
use std::ffi::{CStr, CString};

const HERE: usize = l::AT_FDCWD as usize;

pub(super) const ALL: &[(&str, Attempt)] = &[
    ("open", |o| {
        try_call(l::SYS_open, [address(&below(o, "secret")), 0])
    }),
    ("openat", |o| {
        try_call(l::SYS_openat, [HERE, address(&below(o, "secret")), 0])
    }),
    ("openat2", openat2),
    ("stat", stat),
    ("statx", statx),
    ("access", |o| {
        try_call(l::SYS_access, [address(&below(o, "secret")), 4])
    }),
    ("name-to-handle", name_to_handle),
    ("open-by-handle", open_by_handle),
    ("list-folder", |o| {
        try_call(l::SYS_open, [address(&below(o, "")), l::O_DIRECTORY as usize])
    }),
    ("create-file", |o| {
        let flags = (l::O_CREAT | l::O_WRONLY) as usize;
        try_call(l::SYS_open, [address(&below(o, "new")), flags, 0o600])
    }),
    ("truncate-file", |o| {
        try_call(l::SYS_truncate, [address(&below(o, "secret")), 0])
    }),
    ("mkdir", |o| {
        try_call(l::SYS_mkdir, [address(&below(o, "new")), 0o700])
    }),
    ("unlink", |o| {
        try_call(l::SYS_unlink, [address(&below(o, "secret"))])
    }),
    ("rename", |o| {
        try_call(
            l::SYS_rename,
            [address(&below(o, "secret")), address(&below(o, "new"))],
        )
    }),
    ("link", |o| {
        try_call(
            l::SYS_link,
            [address(&below(o, "secret")), address(&below(o, "new"))],
        )
    }),
    ("symlink", |o| {
        try_call(
            l::SYS_symlink,
            [address(&below(o, "secret")), address(&below(o, "new"))],
        )
    }),
    ("chmod", |o| {
        try_call(l::SYS_chmod, [address(&below(o, "secret")), 0o644])
    }),
    ("utimensat", |o| {
        try_call(l::SYS_utimensat, [HERE, address(&below(o, "secret")), 0, 0])
    }),
    ("make-fifo", |o| {
        try_call(
            l::SYS_mknod,
            [address(&below(o, "new")), (l::S_IFIFO | 0o600) as usize, 0],
        )
    }),
    ("exhaust-disk", |o| {
        let flags = (l::O_CREAT | l::O_WRONLY) as usize;
        let file = call(l::SYS_open, [address(&below(o, "new")), flags, 0o600])?;
        try_call(l::SYS_fallocate, [file, 0, 0, 16 << 20])
    }),
    ("leave-cgroup", |_| {
        in_cgroups("cgroup.procs", |path| {
            let file = call(l::SYS_open, [address(path), l::O_WRONLY as usize])?;
            // Process 0 is whoever writes.
            try_call(l::SYS_write, [file, c"0".as_ptr() as usize, 1])
        })
    }),
    ("read-cgroup", |o| {
        let path = CString::new(format!("/proc/{}/cgroup", o.victim)).unwrap_or_default();
        open(&path, l::O_RDONLY)
    }),
    ("change-cgroup", |_| {
        in_cgroups("bulkhead-audit", |path| {
            call(l::SYS_mkdir, [address(path), 0o700])?;
            try_call(l::SYS_rmdir, [address(path)])
        })
    }),
    ("proc-self", |_| open(c"/proc/self/status", l::O_RDONLY)),
    ("proc-victim-memory", |o| {
        let path = CString::new(format!("/proc/{}/mem", o.victim)).unwrap_or_default();
        open(&path, l::O_RDONLY)
    }),
    ("proc-self-exe", |_| {
        let mut target = [0u8; 256];
        let path = c"/proc/self/exe".as_ptr() as usize;
        try_call(
            l::SYS_readlink,
            [path, target.as_mut_ptr() as usize, target.len()],
        )
    }),
    ("sysfs", |_| open(c"/sys/kernel", l::O_DIRECTORY)),
    ("list-processes", |_| open(c"/proc/1", l::O_DIRECTORY)),
    ("mount", mount),
    ("new-mount-api", |_| {
        try_call(l::SYS_fsopen, [c"tmpfs".as_ptr() as usize, 0])
    }),
    ("clone-mounts", |_| {
        // OPEN_TREE_CLONE.
        try_call(l::SYS_open_tree, [HERE, c"/".as_ptr() as usize, 1])
    }),
    ("chroot", |_| try_call(l::SYS_chroot, [c"/".as_ptr() as usize])),
    ("pivot-root", |_| {
        // The privilege is asked for before the folders are.
        let path = c"/bulkhead-no-such".as_ptr() as usize;
        through_at(try_call(l::SYS_pivot_root, [path, path]), l::ENOENT)
    }),
    ("make-device", |o| {
        // /dev/null's number.
        try_call(
            l::SYS_mknod,
            [address(&below(o, "new")), (l::S_IFCHR | 0o600) as usize, 0x103],
        )
    }),
    ("chroot-escape", |o| {
        let root = call(l::SYS_open, [c"/".as_ptr() as usize, l::O_DIRECTORY as usize])?;
        call(l::SYS_chroot, [address(&below(o, "folder"))])?;
        call(l::SYS_fchdir, [root])?;
        // Relative to where the changed root is not.
        try_call(l::SYS_open, [c"proc".as_ptr() as usize, l::O_DIRECTORY as usize])
    }),
    ("open-kvm", |_| open(c"/dev/kvm", l::O_RDWR)),
    ("open-null", |_| open(c"/dev/null", l::O_RDWR)),
    ("swapon", |_| {
        // The privilege is asked for before the file is.
        through_at(
            try_call(l::SYS_swapon, [c"/bulkhead-no-such".as_ptr() as usize, 0]),
            l::ENOENT,
        )
    }),
];

fn open(path: &CStr, flags: i32) -> Outcome {
    try_call(l::SYS_open, [path.as_ptr() as usize, flags as usize])
}

/// Where hierarchies of either version are mounted; the first that lets `attack` through counts.
fn in_cgroups(name: &str, attack: impl Fn(&CString) -> Outcome) -> Outcome {
    let mut outcome = Err(l::ENOENT);
    for folder in ["", "unified/", "memory/", "pids/"] {
        let path = CString::new(format!("/sys/fs/cgroup/{folder}{name}")).unwrap_or_default();
        outcome = attack(&path);
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}

fn openat2(o: &Order) -> Outcome {
    // struct open_how: flags, mode, resolve.
    let how = [0u64; 3];
    let path = below(o, "secret");
    try_call(
        l::SYS_openat2,
        [HERE, address(&path), how.as_ptr() as usize, size_of_val(&how)],
    )
}

fn stat(o: &Order) -> Outcome {
    let mut out = [0u64; 64];
    try_call(
        l::SYS_stat,
        [address(&below(o, "secret")), out.as_mut_ptr() as usize],
    )
}

fn statx(o: &Order) -> Outcome {
    let mut out = [0u64; 64];
    let path = below(o, "secret");
    let mask = l::STATX_SIZE as usize;
    try_call(
        l::SYS_statx,
        [HERE, address(&path), 0, mask, out.as_mut_ptr() as usize],
    )
}

fn name_to_handle(o: &Order) -> Outcome {
    // struct file_handle: handle_bytes, handle_type, then that many bytes.
    let mut handle = [0u32; 34];
    handle[0] = 128;
    let mut mount_id = 0i32;
    let path = below(o, "secret");
    let (handle, id) = (handle.as_mut_ptr() as usize, &raw mut mount_id as usize);
    try_call(l::SYS_name_to_handle_at, [HERE, address(&path), handle, id, 0])
}

/// The privilege is asked for before the handle is looked at, which no file of the descriptor's file system has.
fn open_by_handle(o: &Order) -> Outcome {
    // struct file_handle: 8 bytes of FILEID_INO32_GEN.
    let handle = [8u32, 1, 0, 0];
    let place = o.report as usize;
    let handle = handle.as_ptr() as usize;
    through_at(try_call(l::SYS_open_by_handle_at, [place, handle, 0]), l::ESTALE)
}

/// Over the audit's own folder, and off again.
fn mount(o: &Order) -> Outcome {
    let folder = below(o, "folder");
    let kind = c"tmpfs".as_ptr() as usize;
    call(l::SYS_mount, [kind, address(&folder), kind, 0, 0])?;
    try_call(l::SYS_umount2, [address(&folder), 0])
}
