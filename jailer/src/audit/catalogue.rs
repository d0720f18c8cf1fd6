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
    /// doing; Landlock answers EACCES to paths; a resource limit has none left of what
    /// was asked for; EPERM depends on what was tried.
    pub fn wall_of(&self, errno: i32) -> Option<Wall> {
        match errno {
            libc::EACCES => Some(Wall::Landlock),
            libc::EMFILE | libc::ENOMEM => Some(Wall::Limit),
            libc::EAGAIN => Some(Wall::Cgroup),
            libc::EPERM => Some(self.refuses),
            libc::ENOENT | libc::EROFS | libc::ESRCH | libc::ENXIO | libc::ENODEV => Some(Wall::Namespace),
            libc::ECONNREFUSED | libc::ENETUNREACH | libc::EADDRNOTAVAIL => Some(Wall::Namespace),
            _ => None,
        }
    }
}

/// A family's attacks, a line each: the wall that answers with EPERM, the name, the words.
macro_rules! attacks {
    ($($family:literal { $($refuses:ident $name:literal $what:literal)* })*) => {
        &[$($(Attack {
            name: $name,
            family: $family,
            what: $what,
            refuses: Wall::$refuses,
        },)*)*]
    };
}

/// Every attack, families together.
pub const ATTACKS: &[Attack] = attacks! {
    "read-file" {
        Capability "open"                 "open a host file"
        Capability "openat"               "open a host file relative to a folder"
        Capability "openat2"              "open a host file by openat2"
        Capability "stat"                 "look at a host file"
        Capability "statx"                "look at a host file by statx"
        Capability "access"               "ask whether a host file is there"
        Capability "name-to-handle"       "get a handle to a host file"
        Capability "open-by-handle"       "open a host file by a handle that it made up"
        Capability "list-folder"          "open a host folder"
    }
    "write-file" {
        Capability "create-file"          "create a file on the host"
        Capability "truncate-file"        "truncate a host file by its path"
        Capability "mkdir"                "make a folder on the host"
        Capability "unlink"               "remove a host file"
        Capability "rename"               "rename a host file"
        Capability "link"                 "link to a host file"
        Capability "symlink"              "make a symbolic link on the host"
        Capability "chmod"                "change a host file's mode"
        Capability "utimensat"            "change a host file's times"
        Capability "make-fifo"            "make a FIFO on the host"
    }
    "proc" {
        Capability "proc-self"            "read /proc/self/status"
        Capability "proc-victim-memory"   "open another process's memory in /proc"
        Capability "proc-self-exe"        "read the link /proc/self/exe"
        Capability "sysfs"                "open a folder of /sys"
        Capability "list-processes"       "open the folder of process 1 in /proc"
    }
    "process" {
        Landlock   "signal"               "signal another process"
        Landlock   "signal-thread"        "signal another process's thread by tkill"
        Landlock   "signal-group-thread"  "signal another process's thread by tgkill"
        Landlock   "queue-signal"         "signal another process by rt_sigqueueinfo"
        Landlock   "signal-by-descriptor" "have another process signalled by a descriptor's owner"
        Landlock   "pidfd-open"           "get a pidfd of another process"
        Landlock   "ptrace"               "trace another process"
        Landlock   "read-process"         "read another process's memory"
        Landlock   "write-process"        "write another process's memory"
        Landlock   "compare-process"      "compare two processes' kernel objects"
        Landlock   "find-pages"           "ask where another process's memory is"
        Landlock   "steal-fd"             "take another process's descriptor"
        Capability "read-affinity"        "ask for another process's CPUs"
        Capability "renice-process"       "lower another process's priority"
        Capability "limit-process"        "read another process's limits"
    }
    "socket" {
        Capability "connect-inet"         "connect to the host by TCP"
        Capability "udp"                  "make a UDP socket"
        Capability "listen-inet"          "listen on a TCP port"
        Capability "connect-inet6"        "make an IPv6 socket"
        Capability "connect-unix"         "connect to a socket in the file system"
        Landlock   "connect-abstract"     "connect to an abstract socket of the host"
        Capability "netlink"              "make a netlink socket"
        Capability "vsock"                "make a vsock socket"
        Capability "packet"               "make a packet socket"
        Capability "raw-icmp"             "make a raw socket"
        Capability "socketpair"           "make a socketpair"
        Capability "send-fd"              "send a descriptor out by a socket of its own"
    }
    "execute" {
        Capability "execute"              "execute a host program"
        Capability "fork"                 "make a process"
        Capability "vfork-by-clone"       "make a process by clone3"
        Capability "execute-memfd"        "execute a memfd of its own"
    }
    "namespace" {
        Capability "new-user-namespace"   "enter a new user namespace"
        Capability "new-mount-namespace"  "enter a new mount namespace"
        Capability "new-network-namespace" "enter a new network namespace"
        Capability "new-pid-namespace"    "make a new pid namespace"
        Capability "join-namespace"       "join another process's namespaces"
    }
    "mount" {
        Capability "mount"                "mount a file system"
        Capability "new-mount-api"        "make a file system by fsopen"
        Capability "clone-mounts"         "copy the mount tree by open_tree"
        Capability "chroot"               "change the root"
        Capability "pivot-root"           "change the root of the mount namespace"
        Capability "chroot-escape"        "leave a changed root by a folder's descriptor"
    }
    "device" {
        Capability "make-device"          "make a device node"
        Capability "open-kvm"             "open /dev/kvm again"
        Capability "open-null"            "open a device of /dev"
    }
    "io-uring" {
        Capability "io-uring"             "make an io_uring, whose requests no filter sees"
        Capability "io-uring-open"        "open a host file through an io_uring"
        Capability "io-uring-statx"       "look at a host file through an io_uring"
        Capability "io-uring-unlink"      "remove a host file through an io_uring"
        Capability "io-uring-mkdir"       "make a folder through an io_uring"
        Capability "io-uring-socket"      "make a socket through an io_uring"
        Capability "io-uring-rename"      "rename a host file through an io_uring"
        Capability "io-uring-link"        "make a symbolic link on the host through an io_uring"
    }
    "kernel" {
        Capability "userfaultfd"          "make a userfaultfd"
        Capability "bpf-map"              "make a BPF map"
        Capability "bpf-program"          "load a BPF program"
        Capability "perf-event"           "open a performance counter"
        Capability "add-key"              "add a key to a keyring"
        Capability "keyctl"               "make a keyring"
        Capability "load-module"          "load a kernel module"
        Capability "unload-module"        "unload a kernel module"
        Capability "swapon"               "use a file as swap"
        Capability "port-access"          "get access to I/O ports"
        Capability "set-hostname"         "set the host name"
        Capability "fanotify"             "watch file access of the whole host"
        Capability "inotify"              "make an inotify descriptor"
        Capability "kernel-log"           "read the kernel's log"
        Capability "set-clock"            "set the host's clock"
        Capability "reboot"               "reboot the host"
        Capability "load-kernel"          "load another kernel by kexec"
    }
    "ipc" {
        Capability "shared-memory"        "make System V shared memory"
        Capability "semaphores"           "make System V semaphores"
        Capability "message-queue"        "make a System V message queue"
        Capability "posix-queue"          "make a POSIX message queue"
    }
    "code" {
        Capability "map-writable-code"    "map memory that is writable and executable"
        Capability "make-code"            "make written memory executable"
        Capability "make-code-by-key"     "make written memory executable by pkey_mprotect"
        Capability "memfd-code"           "map a memfd of its own as code"
        Capability "map-file-code"        "map a descriptor of its own as code"
        Capability "read-implies-exec"    "make all readable memory executable"
        Capability "local-descriptor-table" "change the local descriptor table"
    }
    "memory" {
        Seal       "truncate-memory"      "truncate memory that others have mapped"
        Seal       "grow-memory"          "grow memory that others have mapped"
        Seal       "seal-memory"          "change the seals of memory that others use"
    }
    "limits" {
        Capability "exhaust-fds"          "open descriptors without end"
        Capability "raise-fds"            "raise the limit of open descriptors"
        Capability "raise-core"           "allow itself a core file"
        Capability "realtime"             "become a real-time process"
        Capability "raise-priority"       "raise its own priority"
        Capability "lock-memory"          "lock memory"
        Cgroup     "exhaust-pids"         "make processes without end"
        Limit      "exhaust-memory"       "map memory without end"
        Capability "take-huge-pages"      "take of the host's huge pages, which a VM's limits of memory leave out"
        Capability "exhaust-disk"         "fill a file of its own on the host"
    }
    "identity" {
        Capability "setuid"               "become another user"
        Capability "setgid"               "become another group"
        Capability "setgroups"            "join another group"
        Capability "capset"               "take capabilities"
        Capability "dumpable"             "make itself dumpable"
        Capability "keep-capabilities"    "change its securebits"
    }
    "terminal" {
        Capability "type-on-terminal"     "type on its person's terminal"
    }
    "cgroup" {
        Capability "leave-cgroup"         "move itself to another cgroup"
        Capability "read-cgroup"          "look for the cgroup of another process"
        Capability "change-cgroup"        "make a cgroup without limits"
    }
};
