//! Every attack: its name, family and words. What each does is in `attacks/`, which only probes hold.

use super::wall::Wall;

/// One attack.
#[derive(Clone, Copy, Debug)]
pub struct Attack {
    /// Its name in reports.
    pub name: &'static str,
    /// What it is one of.
    pub family: &'static str,
    /// What it does, in words.
    pub what: &'static str,
    /// The wall that answers it with EPERM.
    refuses: Wall,
}

impl Attack {
    /// The wall that answered with `errno`; `None` where that is no answer of a wall.
    ///
    /// A jailed process finds nothing (no path, no process, no network), which is the namespaces'
    /// doing; Landlock answers EACCES to paths; EPERM depends on what was tried.
    pub fn wall_of(&self, errno: i32) -> Option<Wall> {
        match errno {
            libc::EACCES => Some(Wall::Landlock),
            libc::EMFILE => Some(Wall::Limit),
            libc::EPERM => Some(self.refuses),
            libc::ENOENT | libc::EROFS | libc::ESRCH | libc::ENXIO | libc::ENODEV => Some(Wall::Namespace),
            libc::ECONNREFUSED | libc::ENETUNREACH | libc::EADDRNOTAVAIL => Some(Wall::Namespace),
            _ => None,
        }
    }
}

const fn attack(name: &'static str, family: &'static str, refuses: Wall, what: &'static str) -> Attack {
    Attack {
        name,
        family,
        what,
        refuses,
    }
}

/// Every attack, families together.
pub const ATTACKS: &[Attack] = &[
    attack("open", "read-file", Wall::Capability, "open a host file"),
    attack(
        "openat",
        "read-file",
        Wall::Capability,
        "open a host file relative to a folder",
    ),
    attack(
        "openat2",
        "read-file",
        Wall::Capability,
        "open a host file by openat2",
    ),
    attack("stat", "read-file", Wall::Capability, "look at a host file"),
    attack(
        "statx",
        "read-file",
        Wall::Capability,
        "look at a host file by statx",
    ),
    attack(
        "access",
        "read-file",
        Wall::Capability,
        "ask whether a host file is there",
    ),
    attack(
        "name-to-handle",
        "read-file",
        Wall::Capability,
        "get a handle to a host file",
    ),
    attack("list-folder", "read-file", Wall::Capability, "open a host folder"),
    attack(
        "create-file",
        "write-file",
        Wall::Capability,
        "create a file on the host",
    ),
    attack(
        "truncate-file",
        "write-file",
        Wall::Capability,
        "truncate a host file by its path",
    ),
    attack(
        "mkdir",
        "write-file",
        Wall::Capability,
        "make a folder on the host",
    ),
    attack("unlink", "write-file", Wall::Capability, "remove a host file"),
    attack("rename", "write-file", Wall::Capability, "rename a host file"),
    attack("link", "write-file", Wall::Capability, "link to a host file"),
    attack(
        "symlink",
        "write-file",
        Wall::Capability,
        "make a symbolic link on the host",
    ),
    attack(
        "chmod",
        "write-file",
        Wall::Capability,
        "change a host file's mode",
    ),
    attack(
        "utimensat",
        "write-file",
        Wall::Capability,
        "change a host file's times",
    ),
    attack(
        "make-fifo",
        "write-file",
        Wall::Capability,
        "make a FIFO on the host",
    ),
    attack("proc-self", "proc", Wall::Capability, "read /proc/self/status"),
    attack(
        "proc-victim-memory",
        "proc",
        Wall::Capability,
        "open another process's memory in /proc",
    ),
    attack(
        "proc-self-exe",
        "proc",
        Wall::Capability,
        "read the link /proc/self/exe",
    ),
    attack("sysfs", "proc", Wall::Capability, "open a folder of /sys"),
    attack("signal", "process", Wall::Landlock, "signal another process"),
    attack(
        "signal-thread",
        "process",
        Wall::Landlock,
        "signal another process's thread by tkill",
    ),
    attack(
        "signal-group-thread",
        "process",
        Wall::Landlock,
        "signal another process's thread by tgkill",
    ),
    attack(
        "pidfd-open",
        "process",
        Wall::Landlock,
        "get a pidfd of another process",
    ),
    attack("ptrace", "process", Wall::Landlock, "trace another process"),
    attack(
        "read-process",
        "process",
        Wall::Landlock,
        "read another process's memory",
    ),
    attack(
        "write-process",
        "process",
        Wall::Landlock,
        "write another process's memory",
    ),
    attack(
        "compare-process",
        "process",
        Wall::Landlock,
        "compare two processes' kernel objects",
    ),
    attack(
        "steal-fd",
        "process",
        Wall::Landlock,
        "take another process's descriptor",
    ),
    attack(
        "read-affinity",
        "process",
        Wall::Capability,
        "ask for another process's CPUs",
    ),
    attack(
        "renice-process",
        "process",
        Wall::Capability,
        "lower another process's priority",
    ),
    attack(
        "limit-process",
        "process",
        Wall::Capability,
        "read another process's limits",
    ),
    attack(
        "connect-inet",
        "socket",
        Wall::Capability,
        "connect to the host by TCP",
    ),
    attack("udp", "socket", Wall::Capability, "make a UDP socket"),
    attack("listen-inet", "socket", Wall::Capability, "listen on a TCP port"),
    attack("connect-inet6", "socket", Wall::Capability, "make an IPv6 socket"),
    attack(
        "connect-unix",
        "socket",
        Wall::Capability,
        "connect to a socket in the file system",
    ),
    attack(
        "connect-abstract",
        "socket",
        Wall::Landlock,
        "connect to an abstract socket of the host",
    ),
    attack("netlink", "socket", Wall::Capability, "make a netlink socket"),
    attack("vsock", "socket", Wall::Capability, "make a vsock socket"),
    attack("packet", "socket", Wall::Capability, "make a packet socket"),
    attack("raw-icmp", "socket", Wall::Capability, "make a raw socket"),
    attack("socketpair", "socket", Wall::Capability, "make a socketpair"),
    attack("execute", "execute", Wall::Capability, "execute a host program"),
    attack("fork", "execute", Wall::Capability, "make a process"),
    attack(
        "vfork-by-clone",
        "execute",
        Wall::Capability,
        "make a process by clone3",
    ),
    attack(
        "new-user-namespace",
        "namespace",
        Wall::Capability,
        "enter a new user namespace",
    ),
    attack(
        "new-mount-namespace",
        "namespace",
        Wall::Capability,
        "enter a new mount namespace",
    ),
    attack(
        "new-network-namespace",
        "namespace",
        Wall::Capability,
        "enter a new network namespace",
    ),
    attack(
        "new-pid-namespace",
        "namespace",
        Wall::Capability,
        "make a new pid namespace",
    ),
    attack(
        "join-namespace",
        "namespace",
        Wall::Capability,
        "join another process's namespaces",
    ),
    attack("mount", "mount", Wall::Capability, "mount a file system"),
    attack(
        "new-mount-api",
        "mount",
        Wall::Capability,
        "make a file system by fsopen",
    ),
    attack(
        "clone-mounts",
        "mount",
        Wall::Capability,
        "copy the mount tree by open_tree",
    ),
    attack("chroot", "mount", Wall::Capability, "change the root"),
    attack("make-device", "device", Wall::Capability, "make a device node"),
    attack("open-kvm", "device", Wall::Capability, "open /dev/kvm again"),
    attack("open-null", "device", Wall::Capability, "open a device of /dev"),
    attack(
        "io-uring",
        "io-uring",
        Wall::Capability,
        "make an io_uring, whose requests no filter sees",
    ),
    attack(
        "io-uring-open",
        "io-uring",
        Wall::Capability,
        "open a host file through an io_uring",
    ),
    attack("userfaultfd", "kernel", Wall::Capability, "make a userfaultfd"),
    attack("bpf-map", "kernel", Wall::Capability, "make a BPF map"),
    attack("bpf-program", "kernel", Wall::Capability, "load a BPF program"),
    attack(
        "perf-event",
        "kernel",
        Wall::Capability,
        "open a performance counter",
    ),
    attack("add-key", "kernel", Wall::Capability, "add a key to a keyring"),
    attack("keyctl", "kernel", Wall::Capability, "make a keyring"),
    attack("load-module", "kernel", Wall::Capability, "load a kernel module"),
    attack(
        "unload-module",
        "kernel",
        Wall::Capability,
        "unload a kernel module",
    ),
    attack("swapon", "kernel", Wall::Capability, "use a file as swap"),
    attack(
        "port-access",
        "kernel",
        Wall::Capability,
        "get access to I/O ports",
    ),
    attack("set-hostname", "kernel", Wall::Capability, "set the host name"),
    attack(
        "fanotify",
        "kernel",
        Wall::Capability,
        "watch file access of the whole host",
    ),
    attack(
        "inotify",
        "kernel",
        Wall::Capability,
        "make an inotify descriptor",
    ),
    attack(
        "map-writable-code",
        "code",
        Wall::Capability,
        "map memory that is writable and executable",
    ),
    attack(
        "make-code",
        "code",
        Wall::Capability,
        "make written memory executable",
    ),
    attack(
        "make-code-by-key",
        "code",
        Wall::Capability,
        "make written memory executable by pkey_mprotect",
    ),
    attack(
        "memfd-code",
        "code",
        Wall::Capability,
        "map a memfd of its own as code",
    ),
    attack(
        "map-file-code",
        "code",
        Wall::Capability,
        "map a descriptor of its own as code",
    ),
    attack(
        "read-implies-exec",
        "code",
        Wall::Capability,
        "make all readable memory executable",
    ),
    attack(
        "local-descriptor-table",
        "code",
        Wall::Capability,
        "change the local descriptor table",
    ),
    attack(
        "truncate-memory",
        "memory",
        Wall::Seal,
        "truncate memory that others have mapped",
    ),
    attack(
        "grow-memory",
        "memory",
        Wall::Seal,
        "grow memory that others have mapped",
    ),
    attack(
        "seal-memory",
        "memory",
        Wall::Seal,
        "change the seals of memory that others use",
    ),
    attack(
        "exhaust-fds",
        "limits",
        Wall::Capability,
        "open descriptors without end",
    ),
    attack(
        "raise-fds",
        "limits",
        Wall::Capability,
        "raise the limit of open descriptors",
    ),
    attack(
        "raise-core",
        "limits",
        Wall::Capability,
        "allow itself a core file",
    ),
    attack(
        "realtime",
        "limits",
        Wall::Capability,
        "become a real-time process",
    ),
    attack(
        "raise-priority",
        "limits",
        Wall::Capability,
        "raise its own priority",
    ),
    attack("lock-memory", "limits", Wall::Capability, "lock memory"),
    attack("setuid", "identity", Wall::Capability, "become another user"),
    attack("setgid", "identity", Wall::Capability, "become another group"),
    attack("setgroups", "identity", Wall::Capability, "join another group"),
    attack("capset", "identity", Wall::Capability, "take capabilities"),
    attack("dumpable", "identity", Wall::Capability, "make itself dumpable"),
    attack(
        "keep-capabilities",
        "identity",
        Wall::Capability,
        "change its securebits",
    ),
    attack(
        "type-on-terminal",
        "terminal",
        Wall::Capability,
        "type on its person's terminal",
    ),
];
