//! The names that a policy may use for numbers. Linux UAPI values for x86-64.

/// `_IOC(dir, type, nr, size)` of `asm-generic/ioctl.h`.
const fn ioc(dir: u64, kind: u8, nr: u64, size: u64) -> u64 {
    (dir << 30) | (size << 16) | ((kind as u64) << 8) | nr
}
const fn io(kind: u8, nr: u64) -> u64 {
    ioc(0, kind, nr, 0)
}
const fn iow(kind: u8, nr: u64, size: u64) -> u64 {
    ioc(1, kind, nr, size)
}
const fn ior(kind: u8, nr: u64, size: u64) -> u64 {
    ioc(2, kind, nr, size)
}
const fn iowr(kind: u8, nr: u64, size: u64) -> u64 {
    ioc(3, kind, nr, size)
}
/// `KVMIO`.
const KVM: u8 = 0xAE;

/// The value of `name`.
pub(crate) fn lookup(name: &str) -> Option<u64> {
    CONSTANTS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, value)| *value)
}

macro_rules! libc_constants {
    ($($name:ident)*) => { [$((stringify!($name), libc::$name as u64)),*] };
}

const FROM_LIBC: [(&str, u64); 77] = libc_constants! {
    PROT_NONE PROT_READ PROT_WRITE PROT_EXEC
    MAP_SHARED MAP_PRIVATE MAP_FIXED MAP_ANONYMOUS MAP_HUGETLB
    MADV_DONTNEED MADV_FREE MADV_REMOVE MADV_POPULATE_READ MADV_POPULATE_WRITE MADV_HUGEPAGE
    MADV_DONTDUMP MADV_DONTFORK
    FUTEX_WAIT FUTEX_WAKE FUTEX_REQUEUE FUTEX_WAIT_BITSET FUTEX_WAKE_BITSET FUTEX_LOCK_PI
    FUTEX_UNLOCK_PI
    F_GETFD F_SETFD F_GETFL F_SETFL F_DUPFD F_DUPFD_CLOEXEC F_GET_SEALS F_ADD_SEALS F_OFD_GETLK F_OFD_SETLK
    FALLOC_FL_KEEP_SIZE FALLOC_FL_PUNCH_HOLE FALLOC_FL_ZERO_RANGE
    AF_UNIX AF_INET SOCK_STREAM
    SIG_BLOCK SIG_UNBLOCK SIG_SETMASK
    PR_SET_NAME PR_SET_VMA
    CLOCK_MONOTONIC CLOCK_REALTIME
    TCGETS TCSETS TIOCGWINSZ
    MREMAP_MAYMOVE O_CLOEXEC O_CREAT O_TRUNC O_APPEND SIGKILL AT_EMPTY_PATH
    PR_SET_DUMPABLE PR_SET_NO_NEW_PRIVS PR_CAP_AMBIENT PR_CAP_AMBIENT_CLEAR_ALL
    SECCOMP_SET_MODE_FILTER O_DIRECTORY O_WRONLY MNT_DETACH
    CLONE_NEWUSER CLONE_NEWNS CLONE_NEWIPC CLONE_NEWUTS CLONE_NEWCGROUP CLONE_NEWNET
    PR_SET_PDEATHSIG PR_SET_SECUREBITS PR_CAPBSET_DROP CLOSE_RANGE_CLOEXEC SYNC_FILE_RANGE_WAIT_BEFORE
    RWF_NOWAIT
};

const BY_HAND: [(&str, u64); 71] = [
    // linux/keyctl.h.
    ("KEYCTL_JOIN_SESSION_KEYRING", 1),
    // enum io_uring_op.
    ("IORING_OP_READV", 1),
    ("IORING_OP_WRITEV", 2),
    // All of FUTEX_*'s flags off: FUTEX_PRIVATE_FLAG (128) and FUTEX_CLOCK_REALTIME (256).
    ("FUTEX_CMD_MASK", 0xFFFF_FE7F),
    // musl keeps 32 to 34 to itself.
    ("SIGRTMIN", 35),
    // enum io_uring_register_op.
    ("IORING_REGISTER_RESTRICTIONS", 11),
    ("IORING_REGISTER_ENABLE_RINGS", 12),
    ("ARCH_SET_FS", 0x1002),
    ("PR_SET_MEMORY_MERGE", 67),
    ("MADV_COLLAPSE", 25),
    ("TCSETSW", 0x5403),
    ("FIONBIO", 0x5421),
    ("FIONREAD", 0x541B),
    ("TUNSETIFF", iow(b'T', 202, 4)),
    ("TUNGETFEATURES", ior(b'T', 207, 4)),
    ("TUNSETOFFLOAD", iow(b'T', 208, 4)),
    ("TUNSETTXFILTER", iow(b'T', 209, 4)),
    ("TUNGETIFF", ior(b'T', 210, 4)),
    ("TUNSETVNETHDRSZ", iow(b'T', 216, 4)),
    ("TUNSETVNETLE", iow(b'T', 220, 4)),
    ("TUNSETQUEUE", iow(b'T', 217, 4)),
    ("TUNSETCARRIER", iow(b'T', 226, 4)),
    ("BLKGETSIZE64", ior(0x12, 114, 8)),
    ("BLKDISCARD", io(0x12, 119)),
    ("BLKZEROOUT", io(0x12, 127)),
    ("KVM_GET_API_VERSION", io(KVM, 0x00)),
    ("KVM_CREATE_VM", io(KVM, 0x01)),
    ("KVM_CHECK_EXTENSION", io(KVM, 0x03)),
    ("KVM_GET_VCPU_MMAP_SIZE", io(KVM, 0x04)),
    ("KVM_GET_SUPPORTED_CPUID", iowr(KVM, 0x05, 8)),
    ("KVM_CREATE_VCPU", io(KVM, 0x41)),
    ("KVM_GET_DIRTY_LOG", iow(KVM, 0x42, 16)),
    ("KVM_SET_USER_MEMORY_REGION", iow(KVM, 0x46, 32)),
    ("KVM_SET_TSS_ADDR", io(KVM, 0x47)),
    ("KVM_CREATE_IRQCHIP", io(KVM, 0x60)),
    ("KVM_IRQ_LINE", iow(KVM, 0x61, 8)),
    ("KVM_GET_IRQCHIP", iowr(KVM, 0x62, 520)),
    ("KVM_SET_IRQCHIP", ior(KVM, 0x63, 520)),
    ("KVM_SET_GSI_ROUTING", iow(KVM, 0x6A, 8)),
    ("KVM_IRQFD", iow(KVM, 0x76, 32)),
    ("KVM_IOEVENTFD", iow(KVM, 0x79, 64)),
    ("KVM_SET_CLOCK", iow(KVM, 0x7B, 48)),
    ("KVM_GET_CLOCK", ior(KVM, 0x7C, 48)),
    ("KVM_RUN", io(KVM, 0x80)),
    ("KVM_GET_REGS", ior(KVM, 0x81, 144)),
    ("KVM_SET_REGS", iow(KVM, 0x82, 144)),
    ("KVM_GET_SREGS", ior(KVM, 0x83, 312)),
    ("KVM_SET_SREGS", iow(KVM, 0x84, 312)),
    ("KVM_GET_MSRS", iowr(KVM, 0x88, 8)),
    ("KVM_SET_MSRS", iow(KVM, 0x89, 8)),
    ("KVM_SET_SIGNAL_MASK", iow(KVM, 0x8B, 4)),
    ("KVM_GET_FPU", ior(KVM, 0x8C, 416)),
    ("KVM_SET_FPU", iow(KVM, 0x8D, 416)),
    ("KVM_GET_LAPIC", ior(KVM, 0x8E, 1024)),
    ("KVM_SET_LAPIC", iow(KVM, 0x8F, 1024)),
    ("KVM_SET_CPUID2", iow(KVM, 0x90, 8)),
    ("KVM_GET_MP_STATE", ior(KVM, 0x98, 4)),
    ("KVM_SET_MP_STATE", iow(KVM, 0x99, 4)),
    ("KVM_NMI", io(KVM, 0x9A)),
    ("KVM_GET_VCPU_EVENTS", ior(KVM, 0x9F, 64)),
    ("KVM_SET_VCPU_EVENTS", iow(KVM, 0xA0, 64)),
    ("KVM_GET_DEBUGREGS", ior(KVM, 0xA1, 128)),
    ("KVM_SET_DEBUGREGS", iow(KVM, 0xA2, 128)),
    ("KVM_ENABLE_CAP", iow(KVM, 0xA3, 104)),
    ("KVM_GET_XSAVE", ior(KVM, 0xA4, 4096)),
    ("KVM_SET_XSAVE", iow(KVM, 0xA5, 4096)),
    ("KVM_SIGNAL_MSI", iow(KVM, 0xA5, 32)),
    ("KVM_GET_XCRS", ior(KVM, 0xA6, 392)),
    ("KVM_SET_XCRS", iow(KVM, 0xA7, 392)),
    ("KVM_KVMCLOCK_CTRL", io(KVM, 0xAD)),
    ("KVM_SET_USER_MEMORY_REGION2", iow(KVM, 0x49, 160)),
];

/// Every name.
static CONSTANTS: std::sync::LazyLock<Vec<(&str, u64)>> =
    std::sync::LazyLock::new(|| FROM_LIBC.into_iter().chain(BY_HAND).collect());
